"""The memory of one layer's cache: keys, values and positions in numbered slots, as they are or in fp8."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longburn.cache.extra import NO_EXTRA, REBASED, Extra
from longburn.kernels.append import FP8, AppendCall, Rotated, append, put, quantised, rotated, slots_of
from longburn.kernels.attend import Known
from longburn.kernels.attend.call import unpacked
from longburn.kernels.norm import HeadNorms

Pair = tuple[Tensor, Tensor]  # of keys and of values


class Rotation(NamedTuple):
    """Rotary angles for keys on their way into the cache, and queries `[B, H, T, D]` that are rotated with them.

    `angles` and `sink_angles` are cos and sin, `[B|1, 1, T, R]`; the second ones, if given, are those at which the
    queries look at kept sink tokens. With `norms` both are normalised before.
    """

    q: Tensor | None
    angles: Pair | None
    sink_angles: Pair | None = None
    interleaved: bool = False
    norms: HeadNorms | None = None

    def apply(self, k: Tensor) -> tuple[Tensor, Rotated]:
        """k `[B, K, T, D]` and the queries, normalised and rotated."""
        return rotated(k, *self)


NO_ROTATION = Rotation(None, None)


class KeyValues(NamedTuple):
    """What a layer attends to: keys and values `[B, K, S, D]` and their positions `[B|1, S0 + S]` (-1: empty).

    The first S0 slots are those of `before`, which lie elsewhere, where it is given. With `scales`, k and v are fp8.
    `q` and `q_sink` are the queries that came with a `Rotation`, rotated. `extra` are the numbers `[B, C, S0 + S]` that
    are kept beside every token.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    known: tuple[Known, ...] | None
    ascending: bool  # no slot in k holds a position below its own index
    before: Pair | None = None
    scales: Pair | None = None
    q: Tensor | None = None
    q_sink: Tensor | None = None
    extra: Tensor | None = None


class Buffers:
    """Slots `0 .. slots - 1`, and one more that takes the writes of columns that hold no token.

    Args:
        shape: B, K and D.
        slots: how many.
        sink_tokens: the first slots, which belong to these positions for ever.
        ring: slots that are reused after them; None if none are.
        dtype: of the keys and values that are written.
        packed: keep them as fp8 (e4m3) with one fp32 scale for every token and head. Kept sink tokens stay in `dtype`.
        extra: further numbers for every token.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        slots: int,
        *,
        sink_tokens: int,
        ring: int | None,
        dtype: torch.dtype,
        device: torch.device,
        packed: bool,
        extra: Extra = NO_EXTRA,
    ) -> None:
        B, K, D = shape
        self.shape, self.slots, self.sink_tokens, self.ring = shape, slots, sink_tokens, ring
        self.dtype, self.device, self.packed, self.extra = dtype, device, packed, extra
        self._apart = sink_tokens if packed else 0  # slots that lie in `before`

        def pair(of: torch.dtype, *size: int) -> Pair:
            return torch.empty(size, dtype=of, device=device), torch.empty(size, dtype=of, device=device)

        here = slots - self._apart + 1
        self.k, self.v = pair(FP8 if packed else dtype, B, K, here, D)
        self.scales = pair(torch.float32, B, K, here) if packed else None
        self.before = pair(dtype, B, K, self._apart + 1, D) if self._apart else None
        wide = torch.promote_types(dtype, torch.float32)
        size = (B, extra.channels, slots + 1)
        self._since = 0  # tokens written since sums were brought back near 0
        self.numbers = torch.empty(size, dtype=wide, device=device) if extra.channels else None
        self.pos = torch.full((1, slots + 1), -1, dtype=torch.int64, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of the memory, positions last."""
        numbers = () if self.numbers is None else (self.numbers,)
        return self.k, self.v, *(self.scales or ()), *(self.before or ()), *numbers, self.pos

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def write(
        self, k: Tensor, v: Tensor, positions: Tensor, rotation: Rotation | None = None, extra: Tensor | None = None
    ) -> Rotated:
        """Put k and v `[B, K, T, D]`, and numbers `[B, C, T]`, into the slots of their positions `[B|1, T]`."""
        turn = rotation or NO_ROTATION
        if self.numbers is not None and extra is not None:
            self.wrote(positions.shape[1])
            self.put_extra(positions, extra)
        return append(
            AppendCall(
                *(k, v, positions, self.k, self.v, self.pos, self.sink_tokens, self.ring),
                *turn,
                scales=self.scales,
                before=self.before,
            )
        )

    def put_extra(self, positions: Tensor, extra: Tensor) -> None:
        """Put numbers `[B, C, T]` into the slots of these positions `[B|1, T]`."""
        assert self.numbers is not None
        put(self.numbers, slots_of(positions, self.sink_tokens, self.ring, self.slots), extra)

    def view(self, n: int, known: tuple[Known, ...] | None, turned: Rotated) -> KeyValues:
        """The first n slots, in place."""
        a = self._apart
        n = max(n, min(a + 1, self.slots))  # kept sink tokens are never all there is
        scales = None if self.scales is None else (self.scales[0][:, :, : n - a], self.scales[1][:, :, : n - a])
        before = None if self.before is None else (self.before[0][:, :, :a], self.before[1][:, :, :a])
        k, v = self.k[:, :, : n - a], self.v[:, :, : n - a]
        extra = None if self.numbers is None else self.numbers[:, :, :n]
        return KeyValues(k, v, self.pos[:, :n], known, True, before, scales, *turned, extra)

    def read(self, slots: Sequence[slice]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """A copy of keys and values of these slots in turn, in the type in which they were written; pos; numbers."""
        pos = torch.cat([self.pos[:, s] for s in slots], 1)
        k, v = (torch.cat([self._read(i, s) for s in slots], 2) for i in (0, 1))
        extra = None if self.numbers is None else torch.cat([self.numbers[:, :, s] for s in slots], 2)
        return k, v, pos, extra

    def _read(self, i: int, s: slice) -> Tensor:
        """Keys (0) or values (1) of some slots."""
        here = (self.k, self.v)[i]
        if self.scales is None:
            return here[:, :, s]
        a = self._apart
        rest = slice(max(s.start - a, 0), max(s.stop - a, 0))
        x = unpacked(here[:, :, rest], self.scales[i][:, :, rest], self.dtype)
        return x if self.before is None else torch.cat([self.before[i][:, :, s.start : min(s.stop, a)], x], 2)

    def turns(self, low: int, high: int) -> list[slice]:
        """The slots of the ring that hold the positions `low .. high - 1`, at most one turn of it, in their order."""
        assert self.ring is not None
        if low >= high:
            return []
        start = self.sink_tokens + (low - self.sink_tokens) % self.ring
        first = min(high - low, self.slots - start)
        rest = slice(self.sink_tokens, self.sink_tokens + high - low - first)
        return [slice(start, start + first), *([rest] if first < high - low else [])]

    def rounded(self, k: Tensor, v: Tensor, positions: Tensor) -> Pair:
        """k and v `[B, K, T, D]` as they would be read back."""
        if not self.packed:
            return k, v
        kept = (positions < self.sink_tokens)[:, None, :, None]
        pair = (torch.where(kept, x, unpacked(*quantised(x), x.dtype)) for x in (k, v))
        return next(pair), next(pair)

    def before_first(self, positions: Tensor, *, sure: bool) -> Tensor:
        """The numbers `[B, C]` of the token right before each row's first of `[B|1, T]`; 0 where a row begins or has
        none.

        Unless it is `sure` that these tokens are held, the device itself checks.
        """
        assert self.numbers is not None
        far = torch.iinfo(torch.int64).max
        first = torch.where(positions < 0, far, positions).amin(1, keepdim=True)
        at = torch.where(first == far, 0, first) - 1
        slot = slots_of(at, self.sink_tokens, self.ring, self.slots)
        if not sure:
            rows = max(slot.shape[0], self.pos.shape[0])
            held = self.pos.expand(rows, -1).gather(1, slot.expand(rows, -1))
            torch._assert_async((held == at).all(), "RollingKVCache.previous: the token right before is not held")
        return torch.where(at >= 0, _in_slot(self.numbers, slot), 0)

    def wrote(self, tokens: int) -> None:
        """So many tokens a row came to be here, by `write` or by other hands."""
        self._since += tokens

    def rebase(self) -> None:
        """When it is time, move sums of each row so that its newest token's are near 0."""
        if self.numbers is not None and self.extra.sums and self._since >= REBASED:
            self._since = 0
            at, slot = self.pos.max(1, keepdim=True)
            newest = torch.where(at >= 0, _in_slot(self.numbers, slot), 0)
            self.numbers -= newest.nan_to_num(0.0, 0.0, 0.0).trunc_().unsqueeze(-1)

    def grown(self, slots: int) -> "Buffers":
        """The same in more slots. Only for buffers that never wrap."""
        other = Buffers(
            self.shape,
            slots,
            sink_tokens=self.sink_tokens,
            ring=None,
            dtype=self.dtype,
            device=self.device,
            packed=self.packed,
            extra=self.extra,
        )
        other.widen(self.pos.shape[0])
        for new, old in zip(other.tensors[:-1], self.tensors[:-1], strict=True):
            n = old.shape[2] - 1
            new[:, :, :n] = old[:, :, :n]
        other.pos[:, : self.slots] = self.pos[:, :-1]
        return other

    def widen(self, rows: int) -> None:
        """From one row of positions to one for every row of the batch."""
        if rows > self.pos.shape[0]:
            self.pos = self.pos.expand(rows, -1).clone()


def _in_slot(numbers: Tensor, slot: Tensor) -> Tensor:
    """The numbers `[B, C]` in one slot of each row, `[B|1, 1]`, of `[B, C, slots]`."""
    return numbers.gather(2, slot.unsqueeze(1).expand(*numbers.shape[:2], 1))[..., 0]
