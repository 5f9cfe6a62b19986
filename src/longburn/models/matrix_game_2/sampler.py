"""The few-step sampler of the distilled models: jump to the data, add fresh noise of the next level, and again.

B rows, N steps. Levels are those of `longburn.diffusion`: 1 is noise, 0 is video; a timestep is 1000 times a level.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longburn.diffusion import Schedule, draw_noise, seeded, shifted

SHIFT = 5.0
TIMESTEPS = 1000


def noise_levels(steps: Sequence[int], *, shift: float = SHIFT) -> Schedule:
    """N + 1 levels, the last one 0, from steps such as (1000, 666, 333), which are counted before the shift.

    Raises:
        ValueError: steps that do not fall within 1000 .. 1, or a shift that is not above 0.
    """
    falls = all(after < before for before, after in pairwise(steps))
    if not steps or not falls or not 1 <= steps[-1] <= steps[0] <= TIMESTEPS:
        raise ValueError(f"noise_levels: steps are {list(steps)}, wanted falling numbers within {TIMESTEPS} .. 1")
    if not 0 < shift < math.inf:
        raise ValueError(f"noise_levels: shift is {shift}, wanted a number above 0")
    return (*(shifted(step / TIMESTEPS, shift) for step in steps), 0.0)


def jump(x: Tensor, velocity: Tensor, fresh: Tensor, level: Tensor, after: Tensor) -> Tensor:
    """The data that the velocity at `level` points away from, with fresh noise of the level `after` (0: none).

    Levels are tensors, so that one recorded pass serves all steps.
    """
    return (1 - after) * (x - level * velocity) + after * fresh


class BlockNoise:
    """The noise of a stream's blocks: what each starts from, then what every step but the last adds, row by row.

    Every row has a generator of its own on the CPU, so it neither depends on its batch mates nor on the device. The
    next block's numbers are drawn while the device works on this one.

    Args:
        shape: of a block `[B, ...]`.
        steps: N.
        seeds: one a row; None asks the operating system for one.
        device: where they are needed.
    """

    def __init__(self, shape: tuple[int, ...], steps: int, seeds: Sequence[int | None], device: torch.device) -> None:
        self._generators = seeded(seeds)
        self._staged = torch.empty(steps, *shape, pin_memory=device.type == "cuda")
        self._sent: torch.cuda.Event | None = None
        self._ready = False

    def draw(self) -> None:
        """Draw the next block's numbers, unless that was done."""
        if self._ready:
            return
        if self._sent is not None:
            self._sent.synchronize()  # the copy of the last ones reads the same memory
        for noise in self._staged:
            noise.copy_(draw_noise(noise.shape, self._generators))
        self._ready = True

    def send(self, first: Tensor, fresh: Tensor) -> None:
        """Put the next block's numbers to where it starts from, and to `[N, ...]` of the steps (the last one's: 0)."""
        self.draw()
        first.copy_(self._staged[0], non_blocking=True)
        fresh[:-1].copy_(self._staged[1:], non_blocking=True)
        fresh[-1].zero_()
        self._ready = False
        if self._staged.is_pinned():
            self._sent = self._sent or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record(torch.cuda.current_stream(first.device))
