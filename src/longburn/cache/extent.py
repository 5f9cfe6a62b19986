"""What the host knows about a cache without reading the device: how far each row's stream reaches."""

from collections.abc import Sequence

from longburn.cache.step import Run, Step
from longburn.kernels.attend import Known


class Extent:
    """How far the rows of one cache have been written; one entry for all rows, or one a row.

    As long as every call goes on from positions that were all written before, a row holds one stretch of positions, and
    plain numbers say which. After a call of unknown positions the host knows nothing until the rows are reset.
    """

    def __init__(self) -> None:
        self._end: list[int] | None = [0]  # positions 0 .. end - 1 were written; None: not known
        self._high: list[int] = [0]  # the most that `_end` has been since the row was cleared

    def runs(self, step: Step, batch: int) -> tuple[Run, ...] | None:
        """The step's runs, one for all rows or one a row, if each goes on within or right after what its row holds."""
        if step.runs is None or self._end is None:
            return None
        runs = self.spread(step.runs, batch)
        ends = self._end * len(runs) if len(self._end) == 1 else self._end
        return runs if all(run.size == 0 or run.start <= end for run, end in zip(runs, ends, strict=True)) else None

    def spread(self, runs: tuple[Run, ...], batch: int) -> tuple[Run, ...]:
        """One run for all rows as one a row, once rows have entries of their own."""
        return runs * batch if len(runs) == 1 and len(self._high) > 1 else runs

    @property
    def lost(self) -> bool:
        """Whether the host knows nothing."""
        return self._end is None

    def note(self, runs: Sequence[Run]) -> None:
        """These runs are written."""
        ends, highs = self._end, self._high
        assert ends is not None
        for b, (start, size, _) in enumerate(runs):  # many rows, in every layer, at every step
            if size:
                ends[b] = end = start + size
                if end > highs[b]:
                    highs[b] = end

    def forget(self, bound: int | None) -> None:
        """Positions that the host does not know were written, at most up to `bound` (None: it does not know that)."""
        self._end = None
        if bound is not None:
            self._high = [max(high, bound) for high in self._high]

    def widen(self, rows: int) -> None:
        """From one entry for all rows to one a row."""
        if rows > len(self._high):
            self._end = None if self._end is None else self._end * rows
            self._high = self._high * rows

    def truncate(self, limits: Sequence[int]) -> None:
        """Positions from `limits[row]` on were taken back. In a ring they leave holes, so `_high` stays."""
        self.widen(len(limits))
        if self._end is not None:
            every = list(limits) * len(self._end) if len(limits) == 1 else limits
            self._end = [min(end, limit) for end, limit in zip(self._end, every, strict=True)]

    def reset(self, rows: Sequence[int] | None) -> None:
        """Rows (None: all) are empty."""
        if rows is None:
            self._end, self._high = [0] * len(self._high), [0] * len(self._high)
            return
        for row in rows:
            self._high[row] = 0
            if self._end is not None:
                self._end[row] = 0

    def high(self, row: int) -> int:
        """One more than the highest position that the row ever held."""
        return self._high[row if len(self._high) > 1 else 0]

    def filled(self, rows: int, slots: int) -> int:
        """Leading slots of the fullest row that are filled, not counting positions that were taken back."""
        assert self._end is not None
        return max(slots if self._high[b] > slots else self._end[b] for b in range(rows))

    def known(self, runs: Sequence[Run], slots: int, sink_tokens: int) -> tuple[Known, ...] | None:
        """What the rows hold after these runs were written to a cache of so many slots."""
        rows = [self._known(b, run, slots, sink_tokens) for b, run in enumerate(runs)]
        complete = tuple(row for row in rows if row is not None)
        return complete if len(complete) == len(rows) else None

    def _known(self, b: int, run: Run, slots: int, sink_tokens: int) -> Known | None:
        assert self._end is not None
        end, high = self._end[b], self._high[b]
        start = run.start if run.size else end
        if high <= slots:
            return Known(start, run.size, end, 0, 0, True, run.offset)
        if end < high:  # taken back: slots of later positions stand between the others
            return None
        return Known(start, run.size, slots, sink_tokens, high - (slots - sink_tokens), False, run.offset)
