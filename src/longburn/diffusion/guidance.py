"""Guidance: one velocity from those with and without the condition.

Velocities may have any shape `[B, ...]`; scales are Python floats. Only `AdaptiveProjected` remembers anything from
step to step, and it does so in plain sight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ANGLE_LIMIT = 3.14 / 6  # ACE-Step 1.5's own rounding of pi


def classifier_free(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, `uncond + scale * (cond - uncond)` (https://arxiv.org/abs/2207.12598); 1 is none."""
    return uncond + scale * (cond - uncond)


def double_condition(
    cond: Tensor, uncond: Tensor, text_only: Tensor, *, text_scale: float, lyric_scale: float
) -> Tensor:
    """ACE-Step v1's guidance by two conditions: `text_scale` from nothing to text, `lyric_scale` from text to both."""
    return (1 - text_scale) * uncond + (text_scale - lyric_scale) * text_only + lyric_scale * cond


def zero_star(
    cond: Tensor, uncond: Tensor, scale: float, *, step: int, zero_steps: int = 1, zero_init: bool = True
) -> Tensor:
    """CFG-Zero* (https://arxiv.org/abs/2503.18886): guidance from the multiple of `uncond` nearest to `cond`.

    The multiple is found for each row of the batch over all its numbers. Steps up to *and with* index `zero_steps`
    give velocity 0, so the default of 1 silences two steps; ACE-Step v1 counts so. In its pipeline they are seen only
    where guidance starts that early: by default it starts at a quarter of the run.

    Args:
        step: index of this step, from 0.
        zero_steps: the last index that gives 0.
        zero_init: False never gives 0.
    """
    if zero_init and step <= zero_steps:
        return torch.zeros_like(cond)
    c, u = cond.flatten(1), uncond.flatten(1)
    multiple = (c * u).sum(1) / ((u * u).sum(1) + 1e-8)
    start = uncond * multiple.view(-1, *[1] * (cond.ndim - 1))
    return start + scale * (cond - start)


class AdaptiveProjected:
    """Adaptive projected guidance (APG, https://arxiv.org/abs/2410.02416) with its momentum.

    A call adds to `cond` the difference `cond - uncond`, first mixed with what was kept of the calls before
    (`average = difference + momentum * average`), then shortened to at most `limit`, then without its part along
    `cond`, times `scale - 1`. The part along `cond` is found in float64. One object serves one run of one batch.

    Args:
        dims: over which lengths and projections are taken. ACE-Step v1: (-2, -1), for each channel of `[B, C, 16, F]`;
            v1.5: (1,), over time for each channel of `[B, F, C]`.
        momentum: of the average; the released -0.75 takes three quarters of the last one away.
        limit: longest difference; 0 is no limit.
        parallel: how much of the part along `cond` stays (`eta` in the paper).

    Attributes:
        average: what the next call starts from; None before the first one.
    """

    def __init__(
        self, dims: tuple[int, ...], *, momentum: float = -0.75, limit: float = 2.5, parallel: float = 0.0
    ) -> None:
        if not dims:
            raise ValueError("AdaptiveProjected: dims must name at least one dimension, such as (1,) for [B, F, C]")
        self.dims = dims
        self.momentum = momentum
        self.limit = limit
        self.parallel = parallel
        self.average: Tensor | None = None

    def __call__(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        change = cond - uncond
        if self.average is not None:
            change = change + self.momentum * self.average
        self.average = change
        if self.limit > 0:
            length = torch.linalg.vector_norm(change, dim=self.dims, keepdim=True)
            change = change * (self.limit / length).clamp(max=1)  # length 0 gives infinity, and so 1
        exact, direction = change.double(), _unit(cond.double(), self.dims)
        along = (exact * direction).sum(self.dims, keepdim=True) * direction
        change = (exact - along).to(cond.dtype) + self.parallel * along.to(cond.dtype)
        return cond + (scale - 1) * change


def angle_based(
    x: Tensor, cond: Tensor, uncond: Tensor, t: float, scale: float, *, limit: float = ANGLE_LIMIT
) -> Tensor:
    """ADG of ACE-Step 1.5: turn the predicted data away from the unconditional one by a multiple of their angle.

    Angles are those between channel vectors: x, `cond` and `uncond` are `[B, F, C]`, and every frame turns by its own.

    Args:
        t: noise level of x, > 0.
        scale: the angle is multiplied by `max(scale - 1, 0) + 0.001` (the thousandth is upstream's).
        limit: largest angle in radians after that, released 3.14 / 6.

    Raises:
        ValueError: t is not above 0: at 0 there is no velocity to recover.
    """
    if not t > 0:
        raise ValueError(f"angle_based: noise level t must be above 0, got {t}; use classifier_free there")
    weight = max(scale - 1, 0.0) + 1e-3
    text, null = x - t * cond, x - t * uncond
    cosine = (_unit(text.double(), (-1,)) * _unit(null.double(), (-1,))).sum(-1, keepdim=True)
    angle = torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))
    turned = (weight * angle).clamp(-limit, limit)
    d, n = (text - null).float(), null.float()
    aside = d - (d * n).sum(-1, keepdim=True) / ((n * n).sum(-1, keepdim=True) + 1e-8) * n
    gain = torch.sin(turned) / torch.sin(angle)  # the clamp of the cosine keeps the angle above 0.0014
    return ((x - torch.cos(turned) * text - aside * gain) / t).to(x.dtype)


@dataclass(frozen=True)
class StepInterval:
    """Which steps of a run are guided, and how strongly: ACE-Step v1's middle part with linear decay.

    Args:
        width: part of the run in [0, 1], centred: of N steps, those from `int(N * (1 - width) / 2)` up to and without
            `int(N * (width / 2 + 0.5))`.
        scale: guidance scale at the first of them.
        decay: in [0, 1]: how much of the way from `scale` to `lowest` has been gone at the last of them. 0 is off.
        lowest: see `decay`.

    Raises:
        ValueError: width or decay is out of range.
    """

    width: float = 0.5
    scale: float = 15.0
    decay: float = 0.0
    lowest: float = 3.0

    def __post_init__(self) -> None:
        for name in ("width", "decay"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"StepInterval: {name} must be in [0, 1], got {value}")

    def steps(self, total: int) -> range:
        """Indices of the guided steps among `total`."""
        return range(int(total * ((1 - self.width) / 2)), int(total * (self.width / 2 + 0.5)))

    def scale_at(self, step: int, total: int) -> float | None:
        """Guidance scale at a step, None where it is not guided.

        An interval of one step has no way to go: it keeps `scale` (upstream divides by zero there if decay is on).
        """
        guided = self.steps(total)
        if step not in guided:
            return None
        way = (step - guided.start) / max(len(guided) - 1, 1)
        return self.scale - (self.scale - self.lowest) * way * self.decay


def _unit(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return x / length.clamp_min(1e-12)
