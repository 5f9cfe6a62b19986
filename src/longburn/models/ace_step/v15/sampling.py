"""From noise to latents with ACE-Step 1.5: the loops of its turbo and of its base and sft models.

B rows, N frames of C channels (25 a second, 64). Levels are those of `longburn.diffusion`: 1 is noise, 0 is music. They
are exact here; the released loops round them to the model's type.

What the released loops do and one would not expect is done here too, and named where it is chosen: `Turbo`, `Base`,
`Cover`, `Repaint`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longburn.diffusion import (
    AdaptiveProjected,
    Cancelled,
    OnStep,
    Schedule,
    Velocity,
    angle_based,
    classifier_free,
    denoised,
    euler,
    flow_schedule,
    heun,
    nearest_level,
    noised,
    run_steps,
    turbo_schedule,
)

Method = Literal["euler", "heun", "sde"]
METHODS = ("euler", "heun", "sde")


@dataclass(frozen=True)
class Turbo:
    """How the distilled models are run: 8 steps without guidance, which is distilled into them.

    The last step goes straight to the data: Heun does not correct it (2N - 1 evaluations), and a repaint does not
    hold its source in it.

    Args:
        shift: 1, 2 or 3; others are rounded to the nearest of them (`turbo_schedule`).
        levels: in place of a shift, 1 to 20 levels, each moved to the nearest that the model was distilled on.
        method: "euler"; "heun"; "sde", which jumps to the data and adds fresh noise of the next level.

    Raises:
        ValueError: an unknown method, or what `turbo_schedule` refuses.
    """

    shift: float = 3.0
    levels: tuple[float, ...] | None = None
    method: Method = "euler"

    def __post_init__(self) -> None:
        _check_method("Turbo", self.method)
        self.schedule()

    def schedule(self) -> Schedule:
        """Levels of the run, the last one 0."""
        return turbo_schedule(shift=self.shift, levels=self.levels)


@dataclass(frozen=True)
class Base:
    """How the base and sft models are run: 50 steps with guidance.

    As released: "sde" adds noise of level `1 - (i + 1) / N` after step i, whatever the shift, so with a shift the model
    is asked at another level than the latents have. Heun corrects the last step too (2N evaluations), and guides its
    corrections plainly, so that APG's momentum moves once a step.

    Args:
        steps: N.
        shift: of the levels; above 1, more steps near noise.
        method: "euler", "heun" or "sde".
        guidance_scale: 1 and less is none.
        guidance: "apg" (projected over time, with momentum) or "adg" (by angles).
        interval: levels between which there is guidance, both ends with it. They are noise levels, as in the released
            code: 0 to 0.5 guides the second half. diffusers counts from the other end (`1 - t`).

    Raises:
        ValueError: a setting that is unknown or out of range.
    """

    steps: int = 50
    shift: float = 1.0
    method: Method = "euler"
    guidance_scale: float = 7.0
    guidance: Literal["apg", "adg"] = "apg"
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_method("Base", self.method)
        if self.guidance not in ("apg", "adg"):
            raise ValueError(f"Base: guidance is {self.guidance!r}, wanted apg or adg")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"Base: guidance_scale is {self.guidance_scale}, wanted a number >= 0 (1 is none)")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"Base: interval is {self.interval}, wanted 0 <= start <= end <= 1, as noise levels")
        self.schedule()

    def schedule(self) -> Schedule:
        """Levels of the run, the last one 0."""
        return flow_schedule(self.steps, shift=self.shift)


@dataclass(frozen=True, eq=False)
class Cover:
    """A run that is led by another recording.

    The first `int(N * strength)` of N steps are run by the velocity of the cover, the rest by `otherwise` (diffusers
    blends both velocities at every step instead). With `noise_strength`, the run starts from the recording's latents
    with noise of the schedule's level nearest to `1 - noise_strength`, and N counts the steps from there.

    Args:
        strength: in [0, 1]; 1 never changes.
        otherwise: the velocity without the recording; wanted where `strength` is below 1.
        noise_strength: in [0, 1]; 0 starts from noise, more starts nearer to the recording.
        source: the recording's latents `[B|1, N, C]`; wanted where `noise_strength` is above 0.

    Raises:
        ValueError: a strength out of range, or what it wants is missing.
    """

    strength: float = 1.0
    otherwise: Velocity | None = None
    noise_strength: float = 0.0
    source: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("strength", "noise_strength"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"Cover: {name} is {value}, wanted a number in [0, 1]")
        if self.strength < 1 and self.otherwise is None:
            raise ValueError(f"Cover: strength {self.strength} changes the velocity, but there is no `otherwise`")
        if self.noise_strength > 0 and self.source is None:
            raise ValueError(f"Cover: noise_strength {self.noise_strength} starts from a source, but there is none")


@dataclass(frozen=True, eq=False)
class Repaint:
    """A run that replaces a span of a recording and keeps the rest.

    Args:
        source: the recording's latents `[B|1, N, C]`, without silence in them.
        span: frames to replace, from the first one up to and without the second one.
        held: part of the steps in [0, 1] after which frames outside the span are set back to the source, with the run's
            first noise at the level reached; of N steps the first `round(N * held)` (halves go to the even number).
        blend: frames on either side of the span, outside it, over which the result passes linearly into the source.
            0 leaves what the run made, which outside the span only is the source's if every step held it.

    Raises:
        ValueError: an empty span, or a number out of range.
    """

    source: Tensor
    span: tuple[int, int]
    held: float = 0.5
    blend: int = 10

    def __post_init__(self) -> None:
        frames = self.source.shape[1]
        if not 0 <= self.span[0] < self.span[1] <= frames:
            raise ValueError(f"Repaint: span is {self.span}, wanted 0 <= start < end <= {frames}, the source's frames")
        if not 0 <= self.held <= 1 or self.blend < 0:
            raise ValueError(f"Repaint: held {self.held}, blend {self.blend}: wanted held in [0, 1] and blend >= 0")

    def inside(self) -> Tensor:
        """True within the span, `[1, N, 1]`."""
        at = torch.arange(self.source.shape[1], device=self.source.device)
        return ((at >= self.span[0]) & (at < self.span[1]))[None, :, None]

    def share(self) -> Tensor:
        """How much of each frame the run makes, `[1, N, 1]` float32: 1 within the span, falling to 0 over `blend`."""
        share, (start, end) = self.inside().float(), self.span
        left, right = min(self.blend, start), min(self.blend, share.shape[1] - end)
        share[0, start - left : start, 0] = torch.arange(1, left + 1, device=share.device) / (left + 1)
        share[0, end : end + right, 0] = torch.arange(right, 0, -1, device=share.device) / (right + 1)
        return share


def sample(
    velocity: Velocity,
    noise: Tensor,
    settings: Turbo | Base,
    *,
    cover: Cover | None = None,
    repaint: Repaint | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    cancelled: Cancelled | None = None,
) -> Tensor:
    """Run a model from noise to latents. Nothing is read from the device until a caller does.

    Args:
        velocity: `(x, t) -> velocity`, of x's shape. For guidance it is given the same B rows twice, `[2 B, N, C]`, and
            gives those with the conditions first and those with the null condition after. Without, and outside the
            guided interval, it is given `[B, N, C]` and gives the former alone. See `tasks.DiTVelocity`.
        noise: `[B, N, C]`, from `draw_noise`. The run keeps its type: float32 beside a bf16 model is more exact, bf16
            is what the released loops do.
        settings: `Turbo` or `Base`.
        cover, repaint: see there.
        generator: of the fresh noise of "sde", which is drawn on its device. None is PyTorch's own, as in the released
            loops, which no seed fixes.
        on_step: told (steps done, steps in all) after each step.
        cancelled: asked before each step.

    Returns:
        Latents `[B, N, C]`.

    Raises:
        ValueError: shapes that disagree.
        SamplingCancelledError: `cancelled` said True.
    """
    if noise.dim() != 3:
        raise ValueError(f"sample: noise is {tuple(noise.shape)}, wanted [B, N, C]")
    cover = cover or Cover()
    for name, source in (("cover", cover.source), ("repaint", None if repaint is None else repaint.source)):
        if source is not None and (source.shape[1:] != noise.shape[1:] or source.shape[0] not in (1, noise.shape[0])):
            raise ValueError(f"sample: {name}'s source is {tuple(source.shape)} beside noise {tuple(noise.shape)}")
    levels, x = settings.schedule(), noise
    if cover.source is not None and cover.noise_strength > 0:
        start = nearest_level(levels, 1 - cover.noise_strength)
        levels, x = levels[start:], noised(cover.source.to(noise), noise, levels[start])
    steps, turbo, guide = len(levels) - 1, isinstance(settings, Turbo), _Guide(settings)
    changes = int(steps * cover.strength)
    held = 0 if repaint is None else round(steps * repaint.held)
    inside = None if repaint is None else repaint.inside().to(noise.device)
    for step in run_steps(range(steps), on_step=on_step, cancelled=cancelled):
        t, t_next, last = levels[step], levels[step + 1], step + 1 == steps
        now = cover.otherwise if step >= changes and cover.otherwise is not None else velocity
        v = guide(now, x, t)
        if settings.method == "sde":
            t_next = t_next if turbo else 1 - (step + 1) / steps
            x = denoised(x, v, t)
            if t_next > 0:
                place = x.device if generator is None else generator.device
                fresh = torch.randn(x.shape, generator=generator, device=place, dtype=x.dtype)
                x = noised(x, fresh.to(x.device), t_next)
        elif settings.method == "heun" and not (last and turbo):
            ahead = euler(x, v, t, t_next)
            x = heun(x, v, guide(now, ahead, t_next, correcting=True), t, t_next)
        else:
            x = euler(x, v, t, t_next)
        if repaint is not None and inside is not None and step < held and not (last and turbo):
            x = torch.where(inside, x, noised(repaint.source.to(x), noise, t_next))
    if repaint is not None and repaint.blend > 0:
        share = repaint.share().to(x.device)
        x = (share * x + (1 - share) * repaint.source.to(x)).to(x.dtype)
    return x


class _Guide:
    """A velocity with the guidance of the settings; APG's momentum lives as long as this."""

    def __init__(self, settings: Turbo | Base) -> None:
        self.settings = settings if isinstance(settings, Base) and settings.guidance_scale > 1 else None
        self.apg = AdaptiveProjected((1,))

    def __call__(self, velocity: Velocity, x: Tensor, t: float, *, correcting: bool = False) -> Tensor:
        settings = self.settings
        if settings is None or not settings.interval[0] <= t <= settings.interval[1]:
            return velocity(x, t)
        cond, null = velocity(torch.cat([x, x]), t).chunk(2)
        if settings.guidance == "adg" and t > 0:
            return angle_based(x, cond, null, t, settings.guidance_scale)
        if settings.guidance == "adg" or correcting:
            return classifier_free(cond, null, settings.guidance_scale)
        return self.apg(cond, null, settings.guidance_scale)


def _check_method(owner: str, method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"{owner}: method is {method!r}, wanted one of {', '.join(METHODS)}")
