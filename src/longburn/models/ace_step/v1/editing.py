"""What ACE-Step v1 makes of a recording: retake, repaint, extend, audio to audio.

As in the released pipeline, oddities included and named, but for `extend`, whose broken results are mended.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.diffusion import Cancelled, OnStep, euler, noised, run_steps, v1_schedule, v1_start_level
from longburn.models.ace_step.v1.sampling import LONGEST, Guide, Sampling, Velocities, run_schedule


def mixed_noise(noise: Tensor, other: Tensor, variance: float) -> Tensor:
    """Noise on the way from one to the other: `cos(pi v / 2) * noise + sin(pi v / 2) * other`, of variance 1 all along.

    A retake is `text_to_music` from the noise of the take before, mixed with other noise.

    Raises:
        ValueError: `variance` is not in [0, 1], or the shapes differ.
    """
    if not 0 <= variance <= 1 or noise.shape != other.shape:
        raise ValueError(
            f"mixed_noise: variance {variance}, noise {tuple(noise.shape)} and {tuple(other.shape)}; "
            "wanted a variance in [0, 1] and equal shapes"
        )
    return math.cos(variance * math.pi / 2) * noise + math.sin(variance * math.pi / 2) * other


def audio_to_audio(
    velocities: Velocities,
    reference: Tensor,
    noise: Tensor,
    settings: Sampling,
    *,
    strength: float = 0.5,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    cancelled: Cancelled | None = None,
) -> Tensor:
    """Music that begins as a reference with noise: `int((1 - strength) * steps)` steps from level `1 - strength` on.

    As released: the noise mixed in is of that level shifted once, 0.75 for a half, while the model is first asked at
    the level shifted twice, 0.9. Guided steps are counted among those that are left.

    Args:
        reference: latents `[B|1, 8, 16, F]`.
        strength: how much of the reference there is at the beginning, in [0, 1); 0 is noise alone.

    Raises:
        ValueError: no step is left, steps are chosen, shapes disagree, or as in `text_to_music`.
    """
    level, steps = 1 - strength, int((1 - strength) * settings.steps)
    if not 0 <= strength < 1 or steps < 1 or settings.chosen:
        raise ValueError(
            f"audio_to_audio: strength {strength} leaves {steps} of {settings.steps} steps (chosen: "
            f"{list(settings.chosen)}); wanted strength in [0, 1), at least one step, none chosen"
        )
    _check_source("audio_to_audio", reference, noise)
    x = noised(reference.to(noise), noise, v1_start_level(level, shift=settings.shift))
    schedule = v1_schedule(steps, shift=settings.shift, sigma_max=level)
    return run_schedule(velocities, x, settings, schedule, generator, on_step, cancelled)


def repaint(
    velocities: Velocities,
    source: Tensor,
    noise: Tensor,
    other: Tensor,
    settings: Sampling,
    *,
    span: tuple[int, int],
    variance: float = 0.5,
    on_step: OnStep | None = None,
    cancelled: Cancelled | None = None,
) -> Tensor:
    """Replace a span of a recording. What is outside comes back as it was.

    As released: the run enters at step `int(N * (1 - variance))`, with the source at that level of noise, and goes on
    by plain Euler steps without omega; after each, frames outside the span are set back to the source at the level
    reached. Other methods would be ignored there, and are an error here.

    Args:
        source: latents `[B|1, 8, 16, F]`.
        noise: `[B, 8, 16, F]`, of the recording's own run where it is known.
        other: of the same shape, mixed in within the span (`mixed_noise`).
        span: frames to replace, from the first one up to and without the second one.
        variance: how far to go, in (0, 1]: part of the steps that are run, and how much of `other` is in the noise.

    Raises:
        ValueError: an empty span, no step to run, a method that is not Euler, or shapes that disagree.
    """
    _check_source("repaint", source, noise)
    if not 0 <= span[0] < span[1] <= noise.shape[-1]:
        raise ValueError(f"repaint: span is {span}, wanted 0 <= start < end <= {noise.shape[-1]} frames")
    at = torch.arange(noise.shape[-1], device=noise.device)
    inside = (at >= span[0]) & (at < span[1])
    target = torch.where(inside, mixed_noise(noise, other, variance), noise)
    return _rerun("repaint", velocities, source, target, inside, settings, variance, on_step, cancelled)


def extend(
    velocities: Velocities,
    source: Tensor,
    noise: Tensor,
    other: Tensor,
    settings: Sampling,
    *,
    left: int = 0,
    right: int = 0,
    variance: float = 0.5,
    canvas: int = LONGEST,
    on_step: OnStep | None = None,
    cancelled: Cancelled | None = None,
) -> Tensor:
    """Make music before and after a recording, as `repaint` of frames that are not there yet.

    The model sees `canvas` frames at most: the new ones, and as much of the recording as fits beside them. The rest of
    it is put back unchanged. Three things that the released pipeline gets wrong there are done as they were meant: it
    puts back frames from the wrong end of what it kept, joins them in front along the batch in place of time (which
    fails), and, when both sides grow, makes the right one shorter by the left one.

    Args:
        source: latents `[B|1, 8, 16, F]`.
        noise: `[B, 8, 16, F]`, for the recording's frames.
        other: `[B, 8, 16, n]`, for the new ones: its first `left` and its last `right` frames.
        left, right: frames to make before and after.
        variance: part of the steps that are run, in (0, 1].
        canvas: frames that the model sees, the new ones with them; trained are 240 s. Fewer are faster, and hear less.

    Returns:
        `[B, 8, 16, left + F + right]`.

    Raises:
        ValueError: nothing to make, too little noise, no room for the recording, or as in `repaint`.
    """
    _check_source("extend", source, noise)
    frames = source.shape[-1]
    if left < 0 or right < 0 or not left + right or other.shape[-1] < max(left, right):
        raise ValueError(
            f"extend: left {left}, right {right} with {other.shape[-1]} frames of other noise; "
            "wanted at least one new frame, and noise for them"
        )
    over = max(left + frames + right - canvas, 0)
    if over >= frames or (over and left and right):
        raise ValueError(
            f"extend: {left} + {frames} + {right} frames on a canvas of {canvas}; extend by less than the canvas, and "
            "one side after the other where not all of it fits"
        )
    head, tail = (over, 0) if right else (0, over)
    kept = slice(head, frames - tail)
    source = source.to(noise).expand(noise.shape[0], -1, -1, -1)
    target = torch.cat([other[..., :left], noise[..., kept], other[..., other.shape[-1] - right :]], -1)
    at = torch.arange(target.shape[-1], device=noise.device)
    inside = (at < left) | (at >= target.shape[-1] - right)
    padded = F.pad(source[..., kept], (left, right))
    made = _rerun("extend", velocities, padded, target, inside, settings, variance, on_step, cancelled)
    return torch.cat([source[..., :head], made, source[..., frames - tail :]], -1)


def _rerun(
    operation: str,
    velocities: Velocities,
    source: Tensor,
    noise: Tensor,
    inside: Tensor,
    settings: Sampling,
    variance: float,
    on_step: OnStep | None,
    cancelled: Cancelled | None,
) -> Tensor:
    """From the source with noise on, holding it where `inside` `[F]` is False."""
    schedule = settings.schedule()
    steps = len(schedule) - 1
    start = int(max(settings.chosen, default=settings.steps) * (1 - variance))
    if settings.method != "euler":
        raise ValueError(f"{operation}: steps are Euler's, but the method is {settings.method!r}; ask for 'euler'")
    if not 0 < variance <= 1 or start >= steps:
        raise ValueError(
            f"{operation}: variance {variance} enters at step {start} of {steps}; "
            "wanted one in (0, 1] that leaves a step to run"
        )
    source, guide = source.to(noise), Guide(velocities, settings, steps)
    x = noised(source.expand_as(noise), noise, schedule[start])
    for i in run_steps(range(start, steps), on_step=on_step, cancelled=cancelled):
        x = euler(x, guide(x, schedule[i], i), schedule[i], schedule[i + 1])
        x = torch.where(inside, x, noised(source, noise, schedule[i + 1]))
    return x


def _check_source(operation: str, source: Tensor, noise: Tensor) -> None:
    if noise.dim() != 4 or source.shape[1:] != noise.shape[1:] or source.shape[0] not in (1, noise.shape[0]):
        raise ValueError(
            f"{operation}: source {tuple(source.shape)} beside noise {tuple(noise.shape)}; wanted [B, 8, 16, F] both"
        )
