"""The positions of one forward call, and what its layers derive from them."""

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Shared = TypeVar("Shared")


class Run(NamedTuple):
    """Consecutive positions `start, start + 1, ...` in `size` columns from column `offset` on."""

    start: int
    size: int
    offset: int = 0

    @property
    def end(self) -> int:
        return self.start + self.size


class Step:
    """One forward call's positions, `[B, T]` or `[1, T]` (one clock for all rows), int64, -1 where there is no token.

    Args:
        positions: the positions, on the model's device.
        runs: what the host knows of them: one `Run` for all rows, or one a row; None if it knows nothing.
        bound: the host's upper bound of every position plus one; None if it knows none.
        fits: whoever made the step has seen to it that every cache has room for it.
    """

    def __init__(
        self, positions: Tensor, runs: tuple[Run, ...] | None, bound: int | None, *, fits: bool = False
    ) -> None:
        self.positions = positions
        self.runs = runs
        self.bound = bound
        self.fits = fits
        self._shared: dict[Hashable, object] = {}

    @classmethod
    def of(cls, positions: "Step | Tensor", *, read: bool = True) -> "Step":
        """Wrap positions. On the CPU the host reads them (unless `read` is False); elsewhere it never does."""
        if isinstance(positions, Step):
            return positions
        if positions.dim() != 2 or positions.dtype != torch.int64:
            raise ValueError(
                f"positions: got {positions.dtype} of shape {tuple(positions.shape)}, wanted int64 [B, T] or [1, T]"
            )
        if positions.device.type != "cpu" or not read:
            return cls(positions, None, None)
        rows = positions.tolist()
        runs = [_run(row) for row in rows]
        known = tuple(run for run in runs if run is not None)
        bound = max((p for row in rows for p in row), default=-1) + 1
        return cls(positions, known if len(known) == len(runs) else None, bound)

    @classmethod
    def from_zero(cls, length: int, device: torch.device | str = "cpu") -> "Step":
        """The positions `0 .. length - 1` in every row."""
        return cls(torch.arange(length, device=device)[None], (Run(0, length),), length)

    @property
    def length(self) -> int:
        """T, the number of columns."""
        return self.positions.shape[1]

    def share(self, key: Hashable, make: Callable[[], Shared]) -> Shared:
        """`make()`, computed by the first layer that asks for `key` in this call and handed to the others."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]  # type: ignore[return-value]


def _run(row: list[int]) -> Run | None:
    """The row as one run of consecutive positions between columns without a token, or None."""
    held = [c for c, p in enumerate(row) if p >= 0]
    if not held:
        return Run(0, 0)
    first, count = held[0], len(held)
    if row[first : first + count] != list(range(row[first], row[first] + count)):
        return None
    return Run(row[first], count, first)
