"""What ACE-Step 1.5's transformer is told besides the conditions, by task, and the velocity that a sampler runs.

| task | source of the context | span |
|---|---|---|
| text to music | silence | None |
| the same, with a planner's codes | their hints (`AceStep15.hints`) | None |
| cover | hints of the recording's own tokens | None |
| repaint | the recording's latents | what to replace, with silence in it |
| lego | the recording's latents | what to add to, without silence |
| extract, complete | the recording's latents | None |
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longburn.attention import CrossKeyValues
from longburn.diffusion import Recorded
from longburn.models.ace_step.v15.config import FRAME_RATE
from longburn.models.ace_step.v15.dit import AceStepDiT, Modulation

Span = tuple[int, int]
Passes = Recorded[bool]


def frames_of(seconds: float) -> int:
    """Frames that hold so many seconds. What multiplying adds by rounding (16.6 x 25 is above 415) is no frame."""
    return math.ceil(round(seconds * FRAME_RATE, 6))


def frame_span(start: float, end: float, frames: int) -> Span:
    """Frames of a span in seconds, cut to those that there are; at least one. Parts of frames are dropped.

    Raises:
        ValueError: the span is empty, or does not touch the recording.
    """
    if not (start < end and end > 0 and start * FRAME_RATE < frames):
        raise ValueError(f"frame_span: {start} to {end} s of {frames / FRAME_RATE} s; wanted start < end within them")
    first = int(max(start * FRAME_RATE, 0))
    return first, max(int(min(end * FRAME_RATE, frames)), first + 1)


def context_latents(source: Tensor, *, span: Span | None = None, silence: Tensor | None = None) -> Tensor:
    """Source latents `[B, N, C]` beside the mask of what is to be made: `[B, N, 2 C]`.

    Args:
        source: see the table above.
        span: the frames that are to be made; None is all of them.
        silence: `[1, N, C]`, in place of the source within the span (repaint).

    Raises:
        ValueError: the span is empty or leaves the source, or silence comes without a span or in another shape.
    """
    frames = source.shape[1]
    if span is not None and not 0 <= span[0] < span[1] <= frames:
        raise ValueError(f"context_latents: span is {span}, wanted 0 <= start < end <= {frames}, the source's frames")
    if silence is not None and (span is None or silence.shape != (1, *source.shape[1:])):
        raise ValueError(
            f"context_latents: silence {tuple(silence.shape)} with span {span} beside a source {tuple(source.shape)}; "
            "wanted a span, and silence of one row with as many frames"
        )
    mask = torch.ones_like(source)
    if span is not None:
        mask[:, : span[0]] = 0
        mask[:, span[1] :] = 0
    if silence is not None:
        source = torch.where(mask > 0, silence.to(source), source)
    return torch.cat([source, mask], -1)


class DiTVelocity:
    """The velocity of a transformer under one context and one set of conditions, for `sample`.

    Keys and values of the conditions are computed here, once; what a noise level modulates, when it first comes, or in
    every recorded pass, where it costs the host nothing.

    Args:
        dit: the transformer.
        context: `[B, N, 128]` (`context_latents`).
        hidden: conditions `[B, S, C]`.
        null: `[1, 1, C]`, what stands for no conditions (`ConditionEncoder.null`). Wanted for guidance: x of 2 B rows
            then gives the velocities with `hidden`, and after them those with it.
        mask: bool `[B, S]`, where there is a condition; None attends to all, padding too, as the released pipelines
            do.
        passes: of `recorded_passes`, shared by the pieces that a transformer makes; None launches kernel by kernel.

    Raises:
        ValueError: shapes that disagree.
    """

    def __init__(
        self,
        dit: AceStepDiT,
        context: Tensor,
        hidden: Tensor,
        *,
        null: Tensor | None = None,
        mask: Tensor | None = None,
        passes: Passes | None = None,
    ) -> None:
        B = context.shape[0]
        if hidden.dim() != 3 or hidden.shape[0] != B:
            raise ValueError(
                f"DiTVelocity: conditions {tuple(hidden.shape)} for {B} rows of context, wanted [{B}, S, C]"
            )
        self.dit = dit
        self.passes = passes
        self.dtype = dit.table.dtype
        self.context = {B: context}
        both = None if mask is None else torch.cat([mask, mask])
        if null is not None:
            every = dit.conditions(torch.cat([hidden, null.to(hidden).expand_as(hidden)]), both)
            self.context[2 * B] = torch.cat([context, context])
            self.conditions = {B: _first(every, B), 2 * B: every}
        else:
            self.conditions = {B: dit.conditions(hidden, mask)}
        self._fixed = {
            rows: (self.context[rows], *(part for one in held for part in one[:3]))
            for rows, held in self.conditions.items()
        }
        self._modulations: dict[float, Modulation] = {}

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Velocity of x `[B, N, 64]` or, with a null condition, `[2 B, N, 64]`, in the transformer's type."""
        if (rows := x.shape[0]) not in self.context:
            raise ValueError(f"DiTVelocity: x has {rows} rows, wanted {' or '.join(map(str, self.context))}")
        x, context, held = x.to(self.dtype), self.context[rows], self.conditions[rows]
        if self.passes is not None:
            level = torch.full((1,), t, dtype=torch.float32, device=x.device)
            return self.passes((x, level), self._fixed[rows], held[0].full)
        if t not in self._modulations:
            (self._modulations[t],) = self.dit.modulations((t,))
        return self.dit.forward(x, self._modulations[t], context, held)


def recorded_passes(dit: AceStepDiT) -> Passes:
    """The transformer's passes as CUDA graphs, one for every shape: for `DiTVelocity`."""

    def run(changing: tuple[Tensor, ...], fixed: tuple[Tensor, ...], full: bool) -> Tensor:
        x, level = changing
        context, *parts = fixed
        layers_of = zip(parts[0::3], parts[1::3], parts[2::3], strict=True)
        held = tuple(CrossKeyValues(k, v, pos, full) for k, v, pos in layers_of)
        return dit.forward(x, level, context, held)

    return Recorded(run, dit)


def _first(conditions: Sequence[CrossKeyValues], rows: int) -> tuple[CrossKeyValues, ...]:
    """The first rows of conditions, as views. Positions may be shared by all rows."""
    return tuple(held._replace(k=held.k[:rows], v=held.v[:rows], pos=held.pos[:rows]) for held in conditions)
