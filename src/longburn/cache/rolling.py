"""One layer's keys and values, over a ring of slots or a buffer that grows."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from longburn.cache.buffers import NO_ROTATION, Buffers, KeyValues, Rotation
from longburn.cache.checks import check_consecutive, check_new, check_restart
from longburn.cache.extent import Extent
from longburn.cache.extra import NO_EXTRA, Extra, joined, span
from longburn.cache.step import Run, Step
from longburn.cache.window import AttnWindow
from longburn.kernels.append import Rotated
from longburn.kernels.attend import Known

PAGE = 256  # tokens; a growing buffer is a multiple of it


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
        packed: keep keys and values as fp8 (e4m3) with one fp32 scale for every token and head, about half the bytes of
            bf16; kept sink tokens stay in `dtype`. Queries then attend to the rounded numbers.
        extra: numbers to keep for every token, for a bias.

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
        packed: bool = False,
        extra: Extra = NO_EXTRA,
    ) -> None:
        window = window or AttnWindow()
        if not window.streams:
            raise ValueError(
                f"RollingKVCache: lookahead {window.lookahead}: a cache cannot hold keys that are yet to come"
            )
        self._span = None if window.size is None else span(window.size, extra)
        need = 1 if self._span is None else window.sink_tokens + self._span
        if capacity is not None and capacity < need:
            raise ValueError(
                f"RollingKVCache: capacity {capacity} is below {need} "
                f"(sink_tokens {window.sink_tokens} + window {self._span}); give at least that many slots"
            )
        self.window = window
        self.batch = batch
        self.fixed = capacity is not None or window.size is not None
        slots, sinks = (capacity or need) if self.fixed else 0, window.sink_tokens if window.size is not None else 0
        self._buffers = Buffers(
            (batch, kv_heads, head_dim),
            slots,
            sink_tokens=sinks,
            ring=None if window.size is None else slots - sinks,
            dtype=dtype,
            device=torch.device(device),
            packed=packed,
            extra=extra,
        )
        self._extent = Extent()

    # --- what it holds -----------------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """How many slots there are."""
        return self._buffers.slots

    @property
    def ring(self) -> int | None:
        """Slots that are reused; None if none are."""
        return self._buffers.ring

    @property
    def slack(self) -> int:
        """Slots beyond kept sink tokens and window."""
        return 0 if self._span is None else self.slots - self.window.sink_tokens - self._span

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and positions: `2 * B * K * (slots + 1) * D * itemsize + 8 * rows * (slots + 1)`.

        The one slot beyond `slots` takes the writes of columns that hold no token. In fp8 a number is one byte and
        every token and head have 4 more for a scale, twice; kept sink tokens, and one slot more, lie apart. Extra
        numbers are `B * C * (slots + 1)` of at least fp32.
        """
        return self._buffers.nbytes

    @property
    def positions(self) -> Tensor:
        """The position in every slot, `[B|1, slots]`; -1 where there is none."""
        return self._buffers.pos[:, : self.slots]

    # --- writing -----------------------------------------------------------------------------------------------------

    def update(
        self,
        k: Tensor,
        v: Tensor,
        positions: Step | Tensor,
        *,
        rotation: Rotation | None = None,
        extra: Tensor | None = None,
    ) -> KeyValues:
        """Write this call's keys and values (`[B, K, T, D]`) and return all that its queries may need to see.

        With a rotation, k is rotated on its way, and its queries come back rotated beside the keys. `extra` are the
        new tokens' numbers `[B, C, T]`. Positions `[B|1, T]` go on where the row stands, or write again what it holds;
        -1 is written nowhere. A chunk that would push out keys its own first queries still see is attended to together
        with the old keys, before any of them is overwritten.

        Raises:
            ValueError: shapes or types disagree with the cache, a fixed capacity is full, or positions lie so far back
                that keys of their windows are gone. Nothing is written then.
        """
        step = Step.of(positions)
        check_new(self._buffers, k, v, extra, step)
        self._reserve(step)
        runs = self._extent.runs(step, self.batch)
        if runs is None:
            self._extent.forget(step.bound)
            self._widen(step.positions.shape[0])
        else:
            check_restart(runs, map(self.earliest_restart, range(len(runs))), self.window.size, self.slack)
            self._widen(len(runs))
        turn = rotation or NO_ROTATION
        if (
            self.ring is None
            or step.length <= self.slack + 1
            or (runs and all(r.end <= self.slots or r.size <= self.slack + 1 for r in runs))
        ):
            return self._update_in_place(k, v, step, runs, turn, extra)
        k, turned = turn.apply(k)
        return self._update_past_window(k, v, step, runs, turned, extra)

    def previous(self, positions: Step | Tensor) -> Tensor:
        """The extra numbers `[B, C]` of the token right before the first of these positions; 0 at the start of a row.

        Raises:
            ValueError: there are no such numbers, or the positions do not go on from a token that is held.
        """
        step = Step.of(positions)
        known = check_consecutive(self._buffers, self._extent, step)
        if not step.fits:  # a step that is recorded would do it every time
            self.rebase()
        return self._buffers.before_first(step.positions, sure=known or step.fits)

    def renew(self, positions: Tensor, extra: Tensor) -> None:
        """Put other extra numbers `[B, C, S]` beside tokens that are held, those at these positions `[B|1, S]`."""
        self._buffers.put_extra(positions, extra)

    def rebase(self) -> None:
        """Bring extra numbers that are sums back near 0 when it is time; between two calls."""
        self._buffers.rebase()

    # A step that is recorded once and then run again does not come through `update`.

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """The buffers of keys and values, and of positions, which come last."""
        return self._buffers.tensors

    def takes(self, step: Step) -> bool:
        """Whether `update` would write this step in place, into the memory that there is."""
        if step.bound is None or (self.ring is None and step.bound > self.slots) or step.length > self.slack + 1:
            return False
        runs = self._extent.runs(step, self.batch)
        return (
            runs is not None
            and len(runs) == self._buffers.pos.shape[0]
            and all(run.start >= self.earliest_restart(row) for row, run in enumerate(runs))
        )

    def wrote(self, step: Step) -> None:
        """The step, which `takes` allowed, was written by other hands."""
        assert step.runs is not None
        self._extent.note(self._extent.spread(step.runs, self.batch))
        self._buffers.wrote(step.length)

    def bookmark(self) -> Extent:
        """What the host knows now, for `restore`."""
        return copy.deepcopy(self._extent)

    def restore(self, mark: Extent) -> None:
        """Forget what was noted since the bookmark."""
        self._extent = mark

    def _update_in_place(
        self, k: Tensor, v: Tensor, step: Step, runs: Sequence[Run] | None, turn: Rotation, extra: Tensor | None
    ) -> KeyValues:
        turned = self._buffers.write(k, v, step.positions, turn, extra)
        n, known = self.slots, None
        if runs is not None:
            self._extent.note(runs)
            n = self._extent.filled(len(runs), self.slots)
            known = self._extent.known(runs, self.slots, self.window.sink_tokens)
        return self._buffers.view(n, known, turned)

    def _update_past_window(
        self, k: Tensor, v: Tensor, step: Step, runs: Sequence[Run] | None, turned: Rotated, extra: Tensor | None
    ) -> KeyValues:
        """A chunk beyond the slack: attended to together with the old keys, and written after those were copied."""
        unrounded = k, v
        k, v = self._buffers.rounded(k, v, step.positions)
        if runs is not None and len(runs) == 1:
            result = self._old_and_new(k, v, step, runs[0], turned, extra)
        else:
            old_k, old_v, held, numbers = self._buffers.read([slice(0, self.slots)])
            pos = step.positions.expand(held.shape[0], -1)
            first = torch.where(pos >= 0, pos, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
            pos = torch.cat([torch.where(held < first, held, -1), pos], 1)
            result = KeyValues(k, v, pos, None, False, (old_k, old_v), None, *turned, joined(numbers, extra))
        self._buffers.write(*unrounded, step.positions, extra=extra)
        if runs is not None:
            self._extent.note(runs)
        return result

    def _old_and_new(
        self, k: Tensor, v: Tensor, step: Step, run: Run, turned: Rotated, extra: Tensor | None
    ) -> KeyValues:
        """The keys that the run's first query still sees, in order, and then the run's own."""
        assert self.window.size is not None
        sinks = self.window.sink_tokens
        low = max(run.start - self.window.size + 1, sinks)
        old = [slice(0, min(sinks, run.start)), *self._buffers.turns(low, run.start)]
        old_k, old_v, pos, numbers = self._buffers.read(old)
        new = slice(run.offset, run.offset + run.size)
        numbers = joined(numbers, None if extra is None else extra[:, :, new])
        pos = torch.cat([pos, step.positions[:, new]], 1)
        head, first = (0, 0) if low == sinks else (sinks, low)
        known = Known(run.start, run.size, pos.shape[1], head, first, True, run.offset)
        before = (old_k, old_v) if old_k.shape[2] else None
        return KeyValues(k[:, :, new], v[:, :, new], pos, (known,), False, before, None, *turned, numbers)

    # --- going back --------------------------------------------------------------------------------------------------

    def earliest_restart(self, row: int) -> int:
        """The lowest position at which the row can go on with its whole window still there."""
        high = self._extent.high(row)
        return 0 if high <= self.slots else high - self.slack - 1

    def truncate(self, positions: Sequence[int]) -> None:
        """Forget every position from `positions[row]` on (one for all rows, or one a row)."""
        self._widen(len(positions))
        held = self._buffers.pos
        held.masked_fill_(held >= torch.tensor(positions, device=held.device)[:, None], -1)
        self._extent.truncate(positions)

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Clear some rows (None: all), as if nothing had ever been written to them."""
        if rows is None:
            self._buffers.pos.fill_(-1)
        else:
            self._widen(self.batch)
            self._buffers.pos[list(rows)] = -1
        self._extent.reset(rows)

    def part(self) -> None:
        """Keep the positions of every row for themselves from now on."""
        self._widen(self.batch)

    def _widen(self, rows: int) -> None:
        """From one clock for all rows to one a row."""
        if rows > 1:
            self._buffers.widen(self.batch)
        self._extent.widen(rows)

    # --- memory ------------------------------------------------------------------------------------------------------

    def reserve(self, positions: int) -> None:
        """Room for so many positions of every row in a layer that never wraps; in a ring there is nothing to do.

        Raises:
            ValueError: a fixed capacity is less.
        """
        if self.ring is not None or positions <= self.slots:
            return
        if self.fixed:
            raise ValueError(
                f"RollingKVCache.update: position {positions - 1} does not fit a fixed capacity of {self.slots}; "
                "give a larger max_length, a window, or no max_length so that the cache grows"
            )
        slots = -(-max(positions, self.slots + self.slots // 4) // PAGE) * PAGE
        self._buffers = self._buffers.grown(slots)

    def _reserve(self, step: Step) -> None:
        if self.ring is not None or step.fits:
            return
        if step.bound is not None:
            self.reserve(step.bound)
        elif self.fixed:  # the host must not wait for the device: the device itself refuses
            torch._assert_async((step.positions < self.slots).all(), "RollingKVCache.update: capacity exceeded")
        else:
            self.reserve(int(step.positions.max()) + 1)
