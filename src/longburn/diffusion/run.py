"""What every sampling loop needs around its steps: seeded noise, progress, and a way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]  # of x at a noise level: noise - data, as a model predicts it
OnStep = Callable[[int, int], None]  # (steps done, steps in all)
Cancelled = Callable[[], bool]


class SamplingCancelledError(RuntimeError):
    """A run was cancelled between two steps. What it had is still noise, so there is no partial result."""


def seeded(seeds: Sequence[int | None], device: torch.device | str | None = None) -> list[torch.Generator]:
    """One generator for each seed, on `device` (the CPU's give the same numbers on every machine).

    Args:
        seeds: a number in [0, 2**64) each; None asks the operating system for a fresh one.

    Raises:
        ValueError: no seed, or one that is no number or out of range.
    """
    if not seeds or any(seed is not None and not (hasattr(seed, "__index__") and 0 <= seed < 2**64) for seed in seeds):
        raise ValueError(f"seeded: wants at least one seed, each in [0, 2**64) or None, got {list(seeds)}")
    made = [torch.Generator(device or "cpu") for _ in seeds]
    for generator, seed in zip(made, seeds, strict=True):
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
    return made


def draw_noise(
    shape: Sequence[int], generators: Sequence[torch.Generator], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normal noise of `shape` `[B, ...]`, on the generators' device.

    Args:
        generators: one a row, so that a row does not depend on its batch mates; or a single one that draws the whole
            batch at once.

    Raises:
        ValueError: neither one generator nor one a row.
    """
    if len(generators) not in (1, shape[0]):
        raise ValueError(f"draw_noise: {len(generators)} generators for {shape[0]} rows; pass one, or one a row")

    def draw(rows: int, generator: torch.Generator) -> Tensor:
        return torch.randn((rows, *shape[1:]), generator=generator, device=generator.device, dtype=dtype)

    if len(generators) == 1:
        return draw(shape[0], generators[0])
    return torch.cat([draw(1, generator) for generator in generators])


def run_steps(steps: range, *, on_step: OnStep | None = None, cancelled: Cancelled | None = None) -> Iterator[int]:
    """Count through a run, `for step in run_steps(range(n))`.

    Args:
        steps: indices to yield.
        on_step: told (steps done, steps in all) after each one.
        cancelled: asked before each one.

    Raises:
        SamplingCancelledError: `cancelled` said True.
    """
    for done, step in enumerate(steps):
        if cancelled is not None and cancelled():
            raise SamplingCancelledError(f"run cancelled after {done} of {len(steps)} steps")
        yield step
        if on_step is not None:
            on_step(done + 1, len(steps))
