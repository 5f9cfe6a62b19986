"""One layer's keys and values, over a ring of slots or a buffer that grows."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longburn.cache.extent import Extent
from longburn.cache.step import Run, Step
from longburn.cache.window import AttnWindow
from longburn.kernels.append import AppendCall, append
from longburn.kernels.attend import Known
from longburn.kernels.native.tape import is_recording

PAGE = 256  # tokens; a growing buffer is a multiple of it


class KeyValues(NamedTuple):
    """What a layer attends to: keys and values `[B, K, S, D]` and their positions `[B|1, S]` (-1: empty)."""

    k: Tensor
    v: Tensor
    pos: Tensor
    known: tuple[Known, ...] | None
    ascending: bool  # no slot holds a position below its own index


class RollingKVCache:
    """Keys and values of one layer, with the position of each.

    The slot is a function of the position p: `p` if `p < sink_tokens`, else `sink_tokens + (p - sink_tokens) % ring`.
    Nothing is ever moved: a later token overwrites the slot of the one that left the window, and a token written again
    lands on its own slot. A layer without a window never wraps: it grows by pages, or has a fixed capacity and raises
    when that is full.

    Args:
        batch: rows B.
        kv_heads: K.
        head_dim: D of keys and values.
        window: the layer's window; its size and sink tokens set the geometry.
        capacity: slots. For a windowed layer at least `sink_tokens + size` (the default); what is beyond is *slack*,
            which lets chunks of up to `slack + 1` tokens be written in place and as many be taken back. For a layer
            without a window: a fixed number of positions; None (default) grows without end.
        dtype, device: of keys and values.

    Raises:
        ValueError: the capacity cannot hold the window, or the window sees later keys.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: AttnWindow | None = None,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        window = window or AttnWindow()
        if not window.streams:
            raise ValueError(
                f"RollingKVCache: lookahead {window.lookahead}: a cache cannot hold keys that are yet to come"
            )
        need = 1 if window.size is None else window.sink_tokens + window.size
        if capacity is not None and capacity < need:
            raise ValueError(
                f"RollingKVCache: capacity {capacity} is below {need} "
                f"(sink_tokens {window.sink_tokens} + window {window.size}); give at least that many slots"
            )
        self.window = window
        self.batch = batch
        self.fixed = capacity is not None or window.size is not None
        self.slots = (capacity or need) if self.fixed else 0
        self._shape = (kv_heads, head_dim)
        self._k, self._v, self._pos = self._allocate(self.slots, dtype, torch.device(device))
        self._extent = Extent()

    # --- what it holds -----------------------------------------------------------------------------------------------

    @property
    def ring(self) -> int | None:
        """Slots that are reused; None if none are."""
        return None if self.window.size is None else self.slots - self.window.sink_tokens

    @property
    def slack(self) -> int:
        """Slots beyond kept sink tokens and window."""
        return 0 if self.window.size is None else self.slots - self.window.sink_tokens - self.window.size

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and positions: `2 * B * K * (slots + 1) * D * itemsize + 8 * rows * (slots + 1)`.

        The one slot beyond `slots` takes the writes of columns that hold no token.
        """
        return self._k.nbytes + self._v.nbytes + self._pos.nbytes

    @property
    def positions(self) -> Tensor:
        """The position in every slot, `[B|1, slots]`; -1 where there is none."""
        return self._pos[:, : self.slots]

    # --- writing -----------------------------------------------------------------------------------------------------

    def update(self, k: Tensor, v: Tensor, positions: Step | Tensor) -> KeyValues:
        """Write this call's keys and values (`[B, K, T, D]`) and return all that its queries may need to see.

        Positions `[B|1, T]` go on where the row stands, or write again what it holds; -1 is written nowhere.
        A chunk that would push out keys its own first queries still see is attended to together with the old keys,
        before any of them is overwritten.

        Raises:
            ValueError: shapes or types disagree with the cache, a fixed capacity is full, or positions lie so far back
                that keys of their windows are gone. Nothing is written then.
        """
        step = Step.of(positions)
        self._check(k, v, step)
        self._reserve(step)
        runs = self._extent.runs(step, self.batch)
        if runs is None:
            self._extent.forget(step.bound)
            self._widen(step.positions.shape[0])
        else:
            self._check_restart(runs)
            self._widen(len(runs))
        if self.ring is None or step.length <= self.slack + 1 or (runs and all(self._in_place(run) for run in runs)):
            return self._update_in_place(k, v, step, runs)
        return self._update_past_window(k, v, step, runs)

    # A step that is recorded once and then run again does not come through `update`.

    @property
    def memory(self) -> tuple[Tensor, Tensor, Tensor]:
        """The buffers of keys, values and positions."""
        return self._k, self._v, self._pos

    def takes(self, step: Step) -> bool:
        """Whether `update` would write this step in place, into the memory that there is."""
        if step.bound is None or (self.ring is None and step.bound > self.slots) or step.length > self.slack + 1:
            return False
        runs = self._extent.runs(step, self.batch)
        return (
            runs is not None
            and len(runs) == self._pos.shape[0]
            and all(run.start >= self.earliest_restart(row) for row, run in enumerate(runs))
        )

    def wrote(self, step: Step) -> None:
        """The step was written by other hands."""
        runs = self._extent.runs(step, self.batch)
        assert runs is not None
        self._extent.note(runs)

    def bookmark(self) -> Extent:
        """What the host knows now, for `restore`."""
        return copy.deepcopy(self._extent)

    def restore(self, mark: Extent) -> None:
        """Forget what was noted since the bookmark."""
        self._extent = mark

    def _in_place(self, run: Run) -> bool:
        return run.end <= self.slots or run.size <= self.slack + 1

    def _update_in_place(self, k: Tensor, v: Tensor, step: Step, runs: Sequence[Run] | None) -> KeyValues:
        self._append(k, v, step)
        n, known = self.slots, None
        if runs is not None:
            self._extent.note(runs)
            n = self._extent.filled(len(runs), self.slots)
            known = self._extent.known(runs, self.slots, self.window.sink_tokens)
        return KeyValues(self._k[:, :, :n], self._v[:, :, :n], self._pos[:, :n], known, True)

    def _update_past_window(self, k: Tensor, v: Tensor, step: Step, runs: Sequence[Run] | None) -> KeyValues:
        """A chunk beyond the slack: attended to together with the old keys, and written after that was put together."""
        if runs is not None and len(runs) == 1:
            result = self._old_and_new(k, v, step, runs[0])
        else:
            pos, n = step.positions.expand(self._pos.shape[0], -1), self.slots
            first = torch.where(pos >= 0, pos, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
            old = torch.where(self._pos[:, :n] < first, self._pos[:, :n], -1)
            keys, values = torch.cat([self._k[:, :, :n], k], 2), torch.cat([self._v[:, :, :n], v], 2)
            result = KeyValues(keys, values, torch.cat([old, pos], 1), None, False)
        self._append(k, v, step)
        if runs is not None:
            self._extent.note(runs)
        return result

    def _old_and_new(self, k: Tensor, v: Tensor, step: Step, run: Run) -> KeyValues:
        """The keys that the run's first query still sees, in order, and then the run's own."""
        assert self.window.size is not None
        sinks = self.window.sink_tokens
        low = max(run.start - self.window.size + 1, sinks)
        old = [slice(0, min(sinks, run.start)), *self._slot_slices(low, run.start)]
        new = slice(run.offset, run.offset + run.size)
        keys = torch.cat([*(self._k[:, :, s] for s in old), k[:, :, new]], 2)
        values = torch.cat([*(self._v[:, :, s] for s in old), v[:, :, new]], 2)
        pos = torch.cat([*(self._pos[:, s] for s in old), step.positions[:, new]], 1)
        head, first = (0, 0) if low == sinks else (sinks, low)
        known = Known(run.start, run.size, keys.shape[2], head, first, True, run.offset)
        return KeyValues(keys, values, pos, (known,), False)

    def _append(self, k: Tensor, v: Tensor, step: Step) -> None:
        append(AppendCall(k, v, step.positions, self._k, self._v, self._pos, self.window.sink_tokens, self.ring))

    def _slot_slices(self, low: int, high: int) -> list[slice]:
        """The slots of the positions `low .. high - 1` (at most one turn of the ring), in their order."""
        sinks, ring = self.window.sink_tokens, self.ring
        if ring is None:
            return [slice(low, high)] if low < high else []
        slices = [slice(low, min(high, sinks))] if low < min(high, sinks) else []
        low = max(low, sinks)
        if low < high:
            a = (low - sinks) % ring
            first = min(high - low, ring - a)
            slices.append(slice(sinks + a, sinks + a + first))
            if first < high - low:
                slices.append(slice(sinks, sinks + high - low - first))
        return slices

    # --- going back --------------------------------------------------------------------------------------------------

    def earliest_restart(self, row: int) -> int:
        """The lowest position at which the row can go on with its whole window still there."""
        high = self._extent.high(row)
        return 0 if high <= self.slots else high - self.slack - 1

    def truncate(self, positions: Sequence[int]) -> None:
        """Forget every position from `positions[row]` on (one for all rows, or one a row)."""
        self._widen(len(positions))
        bound = torch.tensor(positions, device=self._pos.device)[:, None]
        self._pos.masked_fill_(self._pos >= bound, -1)
        self._extent.truncate(positions)

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Clear some rows (None: all), as if nothing had ever been written to them."""
        if rows is None:
            self._pos.fill_(-1)
        else:
            self._widen(self.batch)
            self._pos[list(rows)] = -1
        self._extent.reset(rows)

    def _widen(self, rows: int) -> None:
        """From one clock for all rows to one a row."""
        if rows > 1 and self._pos.shape[0] == 1:
            self._pos = self._pos.expand(self.batch, -1).clone()
        self._extent.widen(rows)

    # --- checks and memory -------------------------------------------------------------------------------------------

    def _check(self, k: Tensor, v: Tensor, step: Step) -> None:
        wanted = (self.batch, self._shape[0], step.length, self._shape[1])
        for name, given in (("k", k), ("v", v)):
            if tuple(given.shape) != wanted:
                raise ValueError(
                    f"RollingKVCache.update: {name} is {tuple(given.shape)}, wanted {wanted} "
                    f"(batch {wanted[0]}, kv_heads {wanted[1]}, positions {wanted[2]}, head_dim {wanted[3]})"
                )
            if given.dtype != self._k.dtype or given.device != self._k.device:
                raise ValueError(
                    f"RollingKVCache.update: {name} is {given.dtype} on {given.device}, "
                    f"the cache {self._k.dtype} on {self._k.device}; build it with the model's dtype and device"
                )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError(
                "RollingKVCache.update: gradients do not flow through a cache; "
                "use torch.no_grad(), or train without one"
            )
        if step.positions.shape[0] not in (1, self.batch):
            raise ValueError(
                f"RollingKVCache.update: positions have {step.positions.shape[0]} rows, wanted 1 or {self.batch}"
            )

    def _check_restart(self, runs: Sequence[Run]) -> None:
        for row, run in enumerate(runs):
            earliest = self.earliest_restart(row)
            if run.size and run.start < earliest:
                raise ValueError(
                    f"RollingKVCache.update: row {row} goes back to position {run.start}, but its window is whole only "
                    f"from {earliest} on (window {self.window.size}, slack {self.slack}); "
                    "build the cache with more slack, or reset the row"
                )

    def _reserve(self, step: Step) -> None:
        """Room for the step in a layer that never wraps."""
        if self.ring is not None:
            return
        bound = step.bound
        if bound is None:
            if is_recording():  # whoever runs the tape sees to it that there is room
                return
            if self.fixed:  # the host must not wait for the device: the device itself refuses
                torch._assert_async((step.positions < self.slots).all(), "RollingKVCache.update: capacity exceeded")
                return
            bound = int(step.positions.max()) + 1
        if bound <= self.slots:
            return
        if self.fixed:
            raise ValueError(
                f"RollingKVCache.update: position {bound - 1} does not fit a fixed capacity of {self.slots}; "
                "give a larger max_length, a window, or no max_length so that the cache grows"
            )
        slots = -(-max(bound, self.slots + self.slots // 4) // PAGE) * PAGE
        k, v, pos = self._allocate(slots, self._k.dtype, self._k.device)
        k[:, :, : self.slots], v[:, :, : self.slots] = self._k[:, :, :-1], self._v[:, :, :-1]
        pos = pos.expand(self._pos.shape[0], -1).clone()
        pos[:, : self.slots] = self._pos[:, :-1]
        self._k, self._v, self._pos, self.slots = k, v, pos, slots

    def _allocate(self, slots: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        K, D = self._shape
        shape = (self.batch, K, slots + 1, D)
        k, v = torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
        return k, v, torch.full((1, slots + 1), -1, dtype=torch.int64, device=device)
