"""From noise to latents with ACE-Step v1. What begins with a recording is in `editing`.

B rows, latents `[B, 8, 16, F]` of F frames (10.77 a second). Levels are those of `longburn.diffusion`: 1 is noise, 0 is
music. They are exact here; the released pipeline rounds latents to the model's type after every step.

What the released pipeline does and one would not expect is done here too, and named: see `Sampling`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from longburn.diffusion import (
    AdaptiveProjected,
    Cancelled,
    OnStep,
    Schedule,
    StepInterval,
    Velocity,
    classifier_free,
    double_condition,
    euler,
    heun,
    heun_levels,
    omega_weight,
    renoise,
    run_steps,
    v1_schedule,
    zero_star,
)

FRAME_RATE = 44100 / 512 / 8  # latent frames a second
LONGEST = int(240 * FRAME_RATE)  # frames that the model was trained on
RELEASED_INTERVAL = StepInterval()


class Velocities(NamedTuple):
    """What a run asks a model, `(x, t) -> velocity`. `conditioning.velocities` makes them.

    cond: under all conditions.
    uncond: under weakened conditions, or none: wanted for guidance.
    text_only: under the text alone: wanted for guidance by two conditions.
    """

    cond: Velocity
    uncond: Velocity | None = None
    text_only: Velocity | None = None


@dataclass(frozen=True)
class Sampling:
    """Settings of a run, with the released defaults.

    As released: omega stretches a step around the mean of the whole batch (`longburn.diffusion.euler`). Heun's
    evaluations are counted as steps where guidance begins and ends, but their number is not what that is measured by,
    so the guided part lies in the first half of a Heun run.

    Args:
        steps: N.
        method: "euler"; "heun", 2N - 1 evaluations; "pingpong", which jumps to the data and adds fresh noise.
        shift: of the levels, which it bends twice (`v1_schedule`).
        chosen: numbers of the steps to keep, from 1, in place of `steps` (`oss_steps`, for distilled models).
        omega: of Euler and Heun (`omega_weight`); 0 is off.
        guidance: "apg", projected with momentum; "cfg"; "zero_star".
        interval: which steps are guided, and by how much. A scale of 0 or 1 turns guidance off.
        zero_steps: of "zero_star": the last step without any velocity, where it is guided at all.
        text_scale, lyric_scale: both above 1: guidance by two conditions in place of `guidance`, without decay.

    Raises:
        ValueError: a setting that is unknown or out of range, or steps chosen for Heun, which has no such schedule.
    """

    steps: int = 60
    method: Literal["euler", "heun", "pingpong"] = "euler"
    shift: float = 3.0
    chosen: tuple[int, ...] = ()
    omega: float = 10.0
    guidance: Literal["apg", "cfg", "zero_star"] = "apg"
    interval: StepInterval = RELEASED_INTERVAL
    zero_steps: int = 1
    text_scale: float = 0.0
    lyric_scale: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("method", ("euler", "heun", "pingpong")), ("guidance", ("apg", "cfg", "zero_star"))):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"Sampling: {name} is {value!r}, wanted one of {', '.join(known)}")
        for name in ("omega", "text_scale", "lyric_scale"):
            if not math.isfinite(value := getattr(self, name)):
                raise ValueError(f"Sampling: {name} is {value}, wanted a finite number")
        if self.chosen and self.method == "heun":
            raise ValueError("Sampling: steps can be chosen for euler and pingpong, not for heun")
        self.schedule()

    @property
    def doubled(self) -> bool:
        """True if text and lyrics are guided separately."""
        return self.text_scale > 1 and self.lyric_scale > 1

    def schedule(self) -> Schedule:
        """Levels of the run, the last one 0."""
        return v1_schedule(max(self.chosen, default=self.steps), shift=self.shift, chosen=self.chosen)


def frames_of(seconds: float) -> int:
    """Whole latent frames in a time."""
    return int(seconds * FRAME_RATE)


def text_to_music(
    velocities: Velocities,
    noise: Tensor,
    settings: Sampling,
    *,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    cancelled: Cancelled | None = None,
) -> Tensor:
    """Run a model from noise to latents. Nothing is read from the device until a caller does.

    Args:
        velocities: the model's, under its conditions.
        noise: `[B, 8, 16, F]`. The run keeps its type.
        settings: how.
        generator: of PingPong's fresh noise, for the whole batch at once; the released pipeline goes on with the one
            that drew the first row's `noise`. None is PyTorch's own.
        on_step: told (evaluations done, evaluations in all) after each one.
        cancelled: asked before each evaluation.

    Returns:
        Latents of the noise's shape.

    Raises:
        ValueError: the settings guide, but there is no velocity to guide by.
        SamplingCancelledError: `cancelled` said True.
    """
    return run_schedule(velocities, noise, settings, settings.schedule(), generator, on_step, cancelled)


def run_schedule(
    velocities: Velocities,
    x: Tensor,
    settings: Sampling,
    schedule: Schedule,
    generator: torch.Generator | None,
    on_step: OnStep | None,
    cancelled: Cancelled | None,
) -> Tensor:
    guide, weight = Guide(velocities, settings, len(schedule) - 1), omega_weight(settings.omega)
    levels = heun_levels(schedule) if settings.method == "heun" else schedule[:-1]
    before = x, x  # of Heun: where the step began, and its first velocity
    for i in run_steps(range(len(levels)), on_step=on_step, cancelled=cancelled):
        v = guide(x, levels[i], i)
        step = (i + 1) // 2 if settings.method == "heun" else i
        if settings.method == "heun" and i % 2:
            x = heun(*before, v, schedule[step - 1], schedule[step], weight=weight)
        elif settings.method == "pingpong" and schedule[step + 1] > 0:
            fresh = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = renoise(x, v, levels[i], schedule[step + 1], fresh)
        else:
            before = x, v
            stretch = 1.0 if settings.method == "pingpong" else weight
            x = euler(x, v, levels[i], schedule[step + 1], weight=stretch)
    return x


class Guide:
    """The velocity of a step with its guidance; APG's momentum lives as long as this."""

    def __init__(self, velocities: Velocities, settings: Sampling, total: int) -> None:
        self.velocities = velocities
        self.settings = settings
        self.total = total
        self.apg = AdaptiveProjected((-2, -1))
        self.guided = settings.interval.scale not in (0, 1)
        steps: Sequence[int] = settings.interval.steps(total)
        lacks = velocities.uncond is None or (settings.doubled and velocities.text_only is None)
        if self.guided and steps and lacks:
            raise ValueError(
                f"ACE-Step v1: steps {steps[0]} to {steps[-1]} of {total} are guided, but velocities.uncond or (with "
                "text_scale and lyric_scale) .text_only is missing; pass it, or set the interval's scale to 1"
            )

    def __call__(self, x: Tensor, t: float, step: int) -> Tensor:
        settings, velocities = self.settings, self.velocities
        cond = velocities.cond(x, t)
        scale = settings.interval.scale_at(step, self.total) if self.guided else None
        if scale is None or velocities.uncond is None:
            return cond
        uncond = velocities.uncond(x, t)
        if settings.doubled and velocities.text_only is not None:
            text = velocities.text_only(x, t)
            return double_condition(
                cond, uncond, text, text_scale=settings.text_scale, lyric_scale=settings.lyric_scale
            )
        if settings.guidance == "apg":
            return self.apg(cond, uncond, scale)
        if settings.guidance == "cfg":
            return classifier_free(cond, uncond, scale)
        return zero_star(cond, uncond, scale, step=step, zero_steps=settings.zero_steps)
