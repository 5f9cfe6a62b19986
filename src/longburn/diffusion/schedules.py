"""Noise levels of a run, as tuples of floats from the first level down to 0.

One convention everywhere: level t mixes `x_t = t * noise + (1 - t) * x0`, so 1 is noise and 0 is data, and a model's
velocity points from data to noise, `noise - x0`. A schedule of N steps has N + 1 levels, the last of them 0.

Sources: ACE-Step's flow-matching schedulers (https://github.com/ace-step/ACE-Step) and the sampling loops of ACE-Step
1.5 (https://github.com/ace-step/ACE-Step-1.5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

Schedule = tuple[float, ...]

TURBO_STEPS = 8
TURBO_SHIFTS = (1.0, 2.0, 3.0)
TURBO_MAX_STEPS = 20
V1_SHIFT = 3.0
V1_LOWEST = 1e-3  # the first of the 1000 levels that v1 was trained on


def shifted(level: float, shift: float) -> float:
    """Move a level in [0, 1] towards noise: `shift * t / (1 + (shift - 1) * t)`; 0 and 1 stay where they are."""
    return shift * level / (1 + (shift - 1) * level)


def flow_schedule(steps: int, *, shift: float = 1.0) -> Schedule:
    """Levels `1 - i / steps`, shifted: what ACE-Step 1.5's base and sft models use (50 steps, shift 1).

    Args:
        steps: N >= 1.
        shift: > 0; above 1, more steps are spent near noise.

    Raises:
        ValueError: `steps` or `shift` is out of range.
    """
    _check("flow_schedule", steps, shift)
    return tuple(shifted((steps - i) / steps, shift) for i in range(steps + 1))


# The only levels that the distilled models saw: those of the three tables, from noise to data.
TURBO_LEVELS = tuple(
    sorted({shifted(i / TURBO_STEPS, s) for s in TURBO_SHIFTS for i in range(1, TURBO_STEPS + 1)}, reverse=True)
)


def turbo_schedule(*, shift: float = 3.0, levels: Iterable[float] | None = None) -> Schedule:
    """The levels of ACE-Step 1.5's turbo models: 8 steps at shift 1, 2 or 3, or levels of your own.

    Args:
        shift: rounded to the nearest of 1, 2 and 3, as the released code does (halves go down: 2.5 is 2).
        levels: instead of a shift, 1 to 20 levels from high to low, without the final 0 (zeros at the end are
            dropped). Each is moved to the nearest of `TURBO_LEVELS`, the 20 that the model was distilled on; of two
            as near, the higher one. Two that meet on one level make a step of length 0. The released code cuts off
            what is beyond 20 and replaces an empty list by the table of `shift`; here both are errors.

    Raises:
        ValueError: a bad shift, or levels that are none, too many, out of (0, 1] or not descending.
    """
    if levels is None:
        _check("turbo_schedule", TURBO_STEPS, shift)
        return flow_schedule(TURBO_STEPS, shift=min(TURBO_SHIFTS, key=lambda s: abs(s - shift)))
    wanted = list(levels)
    while wanted and wanted[-1] == 0:
        wanted.pop()
    if not 1 <= len(wanted) <= TURBO_MAX_STEPS:
        raise ValueError(f"turbo_schedule: wants 1 to {TURBO_MAX_STEPS} levels above 0, got {len(wanted)}")
    if not all(0 < t <= 1 for t in wanted) or any(b > a for a, b in pairwise(wanted)):
        raise ValueError(f"turbo_schedule: levels must descend within (0, 1], got {wanted}; sort them from high to low")
    return (*(min(TURBO_LEVELS, key=lambda known: abs(known - t)) for t in wanted), 0.0)


def v1_schedule(steps: int, *, shift: float = V1_SHIFT, sigma_max: float = 1.0, chosen: Sequence[int] = ()) -> Schedule:
    """The levels of ACE-Step v1, which the shift bends twice.

    Its scheduler shifts the range it was trained on, 0.001 to `sigma_max`, then spaces `steps` levels evenly in what
    came out and shifts those again. So the first level is `shifted(shifted(sigma_max))` (1 for 1), and the last one
    before 0 is not near 0 (0.0089 at shift 3).

    Args:
        steps: N >= 1 (60 by default upstream). With `chosen`, the length of the schedule to choose from.
        shift: > 0; released 3.
        sigma_max: highest level before shifting, in (0.001, 1]; below 1 for audio to audio (`v1_start_level`).
        chosen: numbers of the steps to keep, from 1 (`oss_steps` upstream, where `steps` is then the largest of
            them). What is chosen is shifted a third time, as upstream does; upstream also rounds it to the type of
            the model, which is left out here.

    Raises:
        ValueError: a number is out of range, or `chosen` does not ascend within 1 .. steps.
    """
    _check("v1_schedule", steps, shift)
    high, low = v1_start_level(sigma_max, shift=shift), shifted(V1_LOWEST, shift)
    levels = [high + (low - high) * i / max(steps - 1, 1) for i in range(steps)]
    levels = [shifted(t, shift) for t in levels]
    if chosen:
        if any(not 1 <= i <= steps for i in chosen) or any(b <= a for a, b in pairwise(chosen)):
            raise ValueError(f"v1_schedule: chosen steps must ascend within 1 .. {steps}, got {list(chosen)}")
        levels = [shifted(levels[i - 1], shift) for i in chosen]
    return (*levels, 0.0)


def v1_start_level(sigma_max: float, *, shift: float = V1_SHIFT) -> float:
    """How much noise v1's audio to audio mixes into its reference: `sigma_max`, shifted once.

    The run then starts as if there were more, at `v1_schedule(...)[0]`, where it is shifted twice. Upstream does so.

    Raises:
        ValueError: `sigma_max` is not in (0.001, 1].
    """
    if not V1_LOWEST < sigma_max <= 1:
        raise ValueError(f"v1_start_level: sigma_max must be in ({V1_LOWEST}, 1], got {sigma_max}")
    return shifted(sigma_max, shift)


def heun_levels(schedule: Schedule) -> Schedule:
    """The level of each of Heun's 2N - 1 evaluations: the first one once, all others twice, 0 never."""
    return (schedule[0], *(t for t in schedule[1:-1] for _ in range(2)))


def nearest_level(schedule: Schedule, level: float) -> int:
    """Index of the level of `schedule` nearest to `level`, its final 0 left out; the higher one of two as near."""
    return min(range(len(schedule) - 1), key=lambda i: abs(schedule[i] - level))


def _check(operation: str, steps: int, shift: float) -> None:
    if steps < 1:
        raise ValueError(f"{operation}: steps must be at least 1, got {steps}")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"{operation}: shift must be finite and > 0 (1 changes nothing), got {shift}")
