"""The caches of a model's layers, and the one clock that they share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, overload

import torch
from torch import Tensor

from longburn.cache.extra import NO_EXTRA, Extra
from longburn.cache.geometry import geometry
from longburn.cache.rolling import RollingKVCache
from longburn.cache.step import Run, Step
from longburn.cache.window import AttnWindow


class CachedLayer(Protocol):
    """What a layer says about the cache that it needs; `Attention` does. One whose bias keeps numbers for every token
    has an `extra`, too."""

    window: AttnWindow
    kv_heads: int
    head_dim: int

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


class CacheManager(Sequence[RollingKVCache]):
    """One cache a layer, and the time: which positions the next tokens of every row take.

    A layer never advances the clock. `positions` hands out the next ones, the model's forward commits them once with
    `advance` when it is done, or not at all; then the next call writes the same positions again.

    Args:
        batch: rows B.
        windows: every layer's window; their number is the number of layers.
        kv_heads, head_dim: K and D of every layer.
        max_length: most positions a row may take; None for no end. Buffers are then allocated once and never grow.
        slack: slots beyond the window of every windowed layer: tokens that can be taken back (less one).
        dtype, device: of keys and values.
        packed: keep them as fp8, see `RollingKVCache`.
        extra: of every layer, see `RollingKVCache`; default none.
    """

    def __init__(
        self,
        batch: int,
        windows: Sequence[AttnWindow],
        *,
        kv_heads: int,
        head_dim: int,
        max_length: int | None = None,
        slack: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        packed: bool = False,
        extra: Sequence[Extra] | None = None,
    ) -> None:
        if batch < 1 or not windows or slack < 0 or (max_length is not None and max_length < 1):
            raise ValueError(
                f"CacheManager: batch {batch}, {len(windows)} layers, max_length {max_length}, slack {slack}: "
                "wanted at least one row, one layer and one position, and slack of at least 0"
            )
        self.batch = batch
        self.max_length = max_length
        numbers = extra or [NO_EXTRA] * len(windows)
        shapes = [geometry(window, max_length, slack, n) for window, n in zip(windows, numbers, strict=True)]
        sizes = (batch, kv_heads, head_dim)
        self._caches = tuple(
            RollingKVCache(*sizes, window=w, capacity=c, dtype=dtype, device=device, packed=packed, extra=n)
            for (w, c), n in zip(shapes, numbers, strict=True)
        )
        self._device = torch.device(device)
        self._next = [0]  # the next position of every row, or one for all rows
        self._fixed: Step | None = None
        self.recorded: object = None  # what has recorded steps over these buffers keeps itself here for the next time

    @classmethod
    def for_layers(
        cls,
        layers: Sequence[CachedLayer],
        batch: int,
        *,
        max_length: int | None = None,
        slack: int = 0,
        packed: bool = False,
    ) -> "CacheManager":
        """The caches that these layers need, in their type and on their device.

        Raises:
            ValueError: no layers, or layers of different kv heads, head sizes, types or devices.
        """
        kinds = {(layer.kv_heads, layer.head_dim, layer.dtype, layer.device) for layer in layers}
        if len(kinds) != 1:
            raise ValueError(
                f"CacheManager.for_layers: wanted layers that agree in kv heads, head size, type and device, "
                f"got {len(layers)} layers of {len(kinds)} kinds"
            )
        kv_heads, head_dim, dtype, device = kinds.pop()
        return cls(
            batch,
            [layer.window for layer in layers],
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_length=max_length,
            slack=slack,
            dtype=dtype,
            device=device,
            packed=packed,
            extra=[getattr(layer, "extra", NO_EXTRA) for layer in layers],
        )

    def __len__(self) -> int:
        return len(self._caches)

    @overload
    def __getitem__(self, layer: int) -> RollingKVCache: ...

    @overload
    def __getitem__(self, layer: slice) -> Sequence[RollingKVCache]: ...

    def __getitem__(self, layer: int | slice) -> RollingKVCache | Sequence[RollingKVCache]:
        return self._caches[layer]

    def __iter__(self) -> Iterator[RollingKVCache]:
        return iter(self._caches)

    @property
    def position(self) -> int:
        """The next position of the row that is farthest."""
        return max(self._next)

    @property
    def row_positions(self) -> tuple[int, ...]:
        """The next position of every row."""
        return tuple(self._next) if len(self._next) == self.batch else tuple(self._next) * self.batch

    @property
    def device(self) -> torch.device:
        """Where keys, values and positions are."""
        return self._device

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' keys, values and positions."""
        return sum(cache.nbytes for cache in self._caches)

    def positions(self, tokens: int | Tensor) -> Step:
        """The next positions: of T tokens in every row, or of the tokens `[B, T]` given, where -1 is no token.

        Tokens on another device than the CPU are taken to be all there, because the host does not read them.

        Raises:
            ValueError: the tokens' rows disagree with the batch, or a row would pass `max_length`.
        """
        if self._fixed is not None:
            return self._fixed
        step = self.upcoming(tokens)
        return Step(step.positions.to(self._device), step.runs, step.bound)

    def upcoming(self, tokens: int | Tensor) -> Step:
        """What `positions` would hand out, with its tensor on the CPU: nothing goes to the device.

        Raises:
            ValueError: as `positions`.
        """
        counts, length, offsets = self._counts(tokens)
        rows = max(len(self._next), len(counts))
        runs = tuple(Run(*run) for run in zip(*(_spread(x, rows) for x in (self._next, counts, offsets)), strict=True))
        for row, run in enumerate(runs):
            if self.max_length is not None and run.end > self.max_length:
                raise ValueError(
                    f"CacheManager.positions: {run.size} tokens from position {run.start} of row {row} pass max_length "
                    f"{self.max_length}; make the cache longer, or give it no max_length"
                )
        ids = torch.full((rows, length), -1, dtype=torch.int64)
        for row, run in enumerate(runs):
            ids[row, run.offset : run.offset + run.size] = torch.arange(run.start, run.end)
        return Step(ids, runs, max(run.end for run in runs))

    def _counts(self, tokens: int | Tensor) -> tuple[list[int], int, list[int]]:
        """Tokens a row (or one number for all rows), columns, and each row's first column."""
        if isinstance(tokens, int):
            return [tokens], tokens, [0]
        B, T = tokens.shape
        if self.batch != B:
            raise ValueError(f"CacheManager.positions: tokens have {B} rows, the cache {self.batch}")
        if tokens.device.type != "cpu" or not bool((tokens < 0).any()):
            return [T], T, [0]
        held = [[c for c, token in enumerate(row) if token >= 0] for row in tokens.tolist()]
        for row, columns in enumerate(held):
            if columns and columns[-1] - columns[0] + 1 != len(columns):
                raise ValueError(
                    f"CacheManager.positions: row {row} has padding (-1) between its tokens; "
                    "pad on the left or on the right"
                )
        return [len(columns) for columns in held], T, [columns[0] if columns else 0 for columns in held]

    def advance(self, step: Step) -> None:
        """Commit the step's positions: the next call goes on after them."""
        if step.runs is None:
            raise ValueError("CacheManager.advance: the step was not handed out by positions(); advance that one")
        if len(step.runs) == 1 and len(self._next) == 1:
            self._next = [step.runs[0].end]
        else:
            runs = step.runs * self.batch if len(step.runs) == 1 else step.runs
            nexts = self.row_positions
            self._next = [run.end if run.size else at for run, at in zip(runs, nexts, strict=True)]
        for cache in self._caches:
            cache.rebase()

    @contextmanager
    def fixed_step(self, positions: Tensor) -> Iterator[None]:
        """Within it, `positions` hands out this tensor, of whose values the host knows nothing.

        So a step can be recorded and run again on other values. Whatever runs it sees to it that `takes` allows that,
        and says so by `wrote`. What is written within is not noted.
        """
        before = [cache.bookmark() for cache in self._caches]
        self._fixed = Step(positions, None, None, fits=True)
        try:
            yield
        finally:
            self._fixed = None
            for cache, mark in zip(self._caches, before, strict=True):
                cache.restore(mark)

    def takes(self, step: Step) -> bool:
        """Whether every layer would write this step in place, into the memory that it has."""
        return all(cache.takes(step) for cache in self._caches)

    def reserve(self, positions: int) -> None:
        """Room for this many positions of every row in layers that grow: one allocation instead of several.

        Raises:
            ValueError: `max_length` is less.
        """
        for cache in self._caches:
            cache.reserve(positions)

    def part(self) -> None:
        """Give every row a clock of its own now, so that the buffers stay when one of them pauses."""
        self._next = list(self.row_positions)
        for cache in self._caches:
            cache.part()

    def wrote(self, step: Step) -> None:
        """A recorded step wrote these positions, which `takes` allowed."""
        for cache in self._caches:
            cache.wrote(step)

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """Keys, values and positions of every layer; other tensors after a buffer has grown."""
        return tuple(tensor for cache in self._caches for tensor in cache.memory)

    def rewind(self, tokens: int | Sequence[int]) -> None:
        """Take back the last `tokens` positions of every row, or a number for each row.

        Raises:
            ValueError: a row has fewer, or a windowed layer no longer holds the window before them (its slack is too
                small). Nothing is taken back then.
        """
        back = [tokens] * len(self._next) if isinstance(tokens, int) else list(tokens)
        if not isinstance(tokens, int) and len(back) != self.batch:
            raise ValueError(f"CacheManager.rewind: {len(back)} numbers for {self.batch} rows")
        nexts = self._next if len(self._next) == len(back) else list(self.row_positions)
        target = [at - n for at, n in zip(nexts, back, strict=True)]
        for row, (at, to) in enumerate(zip(nexts, target, strict=True)):
            if to < 0 or to > at:
                raise ValueError(f"CacheManager.rewind: {at - to} tokens of row {row}, which stands at position {at}")
            for layer, cache in enumerate(self._caches):
                if to < at and to < cache.earliest_restart(row):
                    raise ValueError(
                        f"CacheManager.rewind: row {row} back to position {to}, but layer {layer} (window "
                        f"{cache.window.size}, slack {cache.slack}) can go back to {cache.earliest_restart(row)} only; "
                        "make the cache with more slack"
                    )
        for cache in self._caches:
            cache.truncate(target)
        self._next = target

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Clear some rows (None: all): they start again at position 0 while the others go on.

        Raises:
            IndexError: no such row.
        """
        if rows is None:
            self._next = [0]
        else:
            wrong = [row for row in rows if not 0 <= row < self.batch]
            if wrong:
                raise IndexError(f"CacheManager.reset: no row {wrong[0]} in a batch of {self.batch}")
            self._next = [0 if row in rows else at for row, at in enumerate(self.row_positions)]
        for cache in self._caches:
            cache.reset(rows)


def _spread(values: list[int], rows: int) -> list[int]:
    """One value for all rows, or already one a row, as one a row."""
    return values if len(values) == rows else values * rows
