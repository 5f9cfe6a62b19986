"""Which tiles of keys a tile of queries visits, as five numbers.

Tiles `0 .. kept - 1` hold all keys that a window keeps for ever; `low .. high - 1` what else is seen, and of these
`full_low .. full_high - 1` are seen by every query, entirely. `low` is at least `kept`. Where the host knows the order
of the keys the numbers follow from its own, else a small kernels read the positions.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longburn.kernels.attend.call import AttendCall
from longburn.kernels.triton import arguments
from longburn.kernels.triton.tiles import NEVER, last_seen, relative, tile_start, tiles_over, tiles_within

NUMBERS = tl.constexpr(5)
MANY = tl.constexpr(1 << 30)  # more tiles than there are
ENDLESS = tl.constexpr(1 << 62)  # later than every position
TILES = 256  # looked at together
_UNSPECIALISED = ["stride", "spans_stride", "T", "S0", "S", "window", "sink_tokens", "lookahead"]


@triton.jit
def known_ranges(
    first,
    last,
    q_rest,
    q_base,
    head,
    k_shift,
    keys,
    S0,
    window,
    sink_tokens,
    lookahead,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    BN: tl.constexpr,
):
    """The ranges of queries at relative positions `first .. last` over keys in order (see `prefill`)."""
    end, full_end = keys, keys
    if BOUNDED:
        end = last_seen(last, True, (last + q_rest) % BLOCK, lookahead, BLOCK, True) - k_shift + 1
        full_end = last_seen(first, True, (first + q_rest) % BLOCK, lookahead, BLOCK, True) - k_shift + 1
    end = tl.minimum(tl.maximum(end, head), keys)
    full_end = tl.maximum(tl.minimum(full_end, keys), 0)
    begin, full_begin = head, head
    if WINDOWED:
        begin = tl.maximum(first - window + 1 - k_shift, head)
        full_begin = tl.maximum(last - window + 1 - k_shift, head)
    kept_end = tl.minimum(tl.maximum(sink_tokens - q_base - k_shift, head), end)
    kept = tiles_over(kept_end, S0, BN)
    low = tl.maximum(tiles_within(begin, S0, BN), kept)
    high = tl.maximum(tiles_over(end, S0, BN), low)
    full_low = tl.minimum(tl.maximum(tiles_over(full_begin, S0, BN), tl.maximum(low, tl.cdiv(S0, BN))), high)
    full_high = tl.minimum(tl.maximum(tiles_within(full_end, S0, BN), full_low), high)
    return kept, low, full_low, full_high, high


@triton.jit
def _first_seen(position, window, WINDOWED: tl.constexpr):
    """The first position that a query at this one (int64, not negative) sees."""
    return position - window + 1 if WINDOWED else position * 0


@triton.jit
def _last_seen(position, lookahead, BLOCK: tl.constexpr, BOUNDED: tl.constexpr):
    last = position * 0 + ENDLESS
    if BOUNDED:
        last = position + lookahead
        if BLOCK > 1:
            last = tl.maximum(last, position - position % BLOCK + BLOCK - 1)
    return last


@triton.jit
def _run(low, full_low, full_high, high, i, seen, whole):
    """The ranges so far, with these tiles: those seen, and the first stretch of those that are seen entirely."""
    low = tl.minimum(low, tl.min(tl.where(seen, i, MANY), 0))
    high = tl.maximum(high, tl.max(tl.where(seen, i + 1, 0), 0))
    full_low = tl.minimum(full_low, tl.min(tl.where(whole, i, MANY), 0))
    full_high = tl.minimum(full_high, tl.min(tl.where((i > full_low) & ~whole, i, MANY), 0))
    return low, full_low, full_high, high


@triton.jit
def _write(ranges, kept, low, full_low, full_high, high):
    """`high` and the stretch seen entirely must not lie below `low`."""
    high = tl.maximum(high, low)
    full_low = tl.minimum(tl.maximum(full_low, low), high)
    full_high = tl.minimum(tl.maximum(full_high, full_low), high)
    tl.store(ranges, kept)
    tl.store(ranges + 1, low)
    tl.store(ranges + 2, full_low)
    tl.store(ranges + 3, full_high)
    tl.store(ranges + 4, high)


@triton.jit(do_not_specialize=["stride", "S0", "S"])
def _spans(positions, stride, spans, S0, S, BN: tl.constexpr):
    """Of each tile of positions the oldest and the newest that are there, and the least: -1 if one is not there."""
    tile, b = tl.program_id(0), tl.program_id(1)
    column = tile_start(tile, S0, BN) + tl.arange(0, BN)
    inside = column < tl.where(tile < tl.cdiv(S0, BN), S0, S0 + S)
    j = tl.load(positions + b * stride + column, mask=inside, other=-1)
    at = spans + (b * tl.num_programs(0) + tile) * 3
    tl.store(at, tl.min(tl.where(j >= 0, j, ENDLESS), 0))
    tl.store(at + 1, tl.max(j, 0))
    tl.store(at + 2, tl.min(j, 0))


@triton.jit
def _load_spans(spans, i, tiles):
    """Of these tiles; those that do not exist look empty."""
    inside = i < tiles
    oldest = tl.load(spans + i * 3, mask=inside, other=ENDLESS)
    return oldest, tl.load(spans + i * 3 + 1, mask=inside, other=-1), tl.load(spans + i * 3 + 2, mask=inside, other=-1)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _of_queries(
    positions,
    stride,
    spans,
    spans_stride,
    ranges,
    T,
    S0,
    S,
    window,
    sink_tokens,
    lookahead,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    G: tl.constexpr,
    TOKENS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TILES: tl.constexpr,
):
    """What one tile of queries (BM rows, G a token) visits; TILES tiles of keys are looked at together."""
    tile, b = tl.program_id(0), tl.program_id(1)
    t = tile * BM // G + tl.arange(0, TOKENS)
    last_t = tl.minimum((tile * BM + BM - 1) // G, T - 1)
    p = tl.load(positions + b * stride + t, mask=t <= last_t, other=-1)
    newest, oldest = tl.max(p, 0), tl.min(tl.where(p >= 0, p, ENDLESS), 0)
    first, last = _first_seen(oldest, window, WINDOWED), _last_seen(newest, lookahead, BLOCK, BOUNDED)
    all_first, all_last = _first_seen(newest, window, WINDOWED), _last_seen(oldest, lookahead, BLOCK, BOUNDED)
    tiles0 = tl.cdiv(S0, BN)
    tiles = tiles0 + tl.cdiv(S, BN)
    kept, low, full_low, full_high, high = 0, 0 + MANY, 0 + MANY, 0 + MANY, 0
    for start in range(0, tiles, TILES):
        i = start + tl.arange(0, TILES)
        oldest_key, newest_key, least = _load_spans(spans + b * spans_stride, i, tiles)
        near = (oldest_key <= last) & (newest_key >= 0) & (newest >= 0)
        kept = tl.maximum(kept, tl.max(tl.where(near & (oldest_key < sink_tokens), i + 1, 0), 0))
        whole = (least >= 0) & (newest >= 0) & (newest_key <= all_last) & (oldest_key >= all_first) & (i >= tiles0)
        seen = near & (newest_key >= first)
        low, full_low, full_high, high = _run(low, full_low, full_high, high, i, seen, whole)
    at = ranges + (b * tl.num_programs(0) + tile) * NUMBERS
    _write(at, kept, tl.maximum(low, kept), full_low, full_high, high)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _of_keys(
    positions,
    stride,
    spans,
    spans_stride,
    ranges,
    T,
    S0,
    S,
    window,
    sink_tokens,
    lookahead,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    TILES: tl.constexpr,
):
    """Which tiles of BT tokens see one tile of keys. The first number says whether a window keeps any of the keys."""
    tile, b = tl.program_id(0), tl.program_id(1)
    column = tile_start(tile, S0, BN) + tl.arange(0, BN)
    inside = column < tl.where(tile < tl.cdiv(S0, BN), S0, S0 + S)
    j = tl.load(positions + b * stride + column, mask=inside, other=-1)
    newest_key, oldest_key = tl.max(j, 0), tl.min(tl.where(j >= 0, j, ENDLESS), 0)
    filled = tl.min(j, 0) >= 0
    kept = (oldest_key < sink_tokens).to(tl.int32)
    tiles = tl.cdiv(T, BT)
    low, full_low, full_high, high = 0 + MANY, 0 + MANY, 0 + MANY, 0
    for start in range(0, tiles, TILES):
        i = start + tl.arange(0, TILES)
        oldest, newest, least = _load_spans(spans + b * spans_stride, i, tiles)
        first, last = _first_seen(oldest, window, WINDOWED), _last_seen(newest, lookahead, BLOCK, BOUNDED)
        all_first, all_last = _first_seen(newest, window, WINDOWED), _last_seen(oldest, lookahead, BLOCK, BOUNDED)
        seen = (newest >= 0) & (newest_key >= 0) & (oldest_key <= last) & ((newest_key >= first) | (kept > 0))
        whole = (least >= 0) & filled & (newest_key <= all_last) & (oldest_key >= all_first) & (kept == 0)
        low, full_low, full_high, high = _run(low, full_low, full_high, high, i, seen, whole)
    _write(ranges + (b * tl.num_programs(0) + tile) * NUMBERS, kept, low, full_low, full_high, high)


@triton.jit(do_not_specialize=["stride", "newest_stride", "sink_tokens", "columns"])
def _codes(k_pos, stride, newest, newest_stride, codes, sink_tokens, columns, BN: tl.constexpr):
    """Two numbers a key: its position from the row's newest query, NEVER if empty; and NEVER if a window keeps it."""
    b = tl.program_id(1)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = column < columns
    position = tl.load(k_pos + b * stride + column, mask=inside, other=-1)
    j = tl.where(position >= 0, relative(position, tl.load(newest + b * newest_stride)), NEVER)
    at = codes + b * 2 * columns + column
    tl.store(at, j, mask=inside)
    tl.store(at + columns, tl.where(position < sink_tokens, NEVER, j), mask=inside)


def places(call: AttendCall) -> dict[str, Any]:
    """Where queries and keys stand, for kernels: from the positions, counted from each row's newest query."""
    q_pos, q_pos_stride = _rows(call.q_pos)
    newest, newest_stride = _rows(call.q_pos.amax(1))
    columns = call.k_pos.shape[1]
    codes = torch.empty(_count(call), 2, columns, dtype=torch.int32, device=call.q.device)
    _codes[triton.cdiv(columns, 1024), codes.shape[0]](
        *_rows(call.k_pos), newest, newest_stride, codes, call.sink_tokens, columns, BN=1024
    )
    return {
        **{"q_pos": q_pos, "q_pos_stride": q_pos_stride, "newest": newest, "newest_stride": newest_stride},
        **{"codes": codes, "codes_stride": stride(codes)},
    }


NOWHERE = {"q_pos": None, "q_pos_stride": 0, "newest": None, "newest_stride": 0, "codes": None, "codes_stride": 0}


def of_queries(call: AttendCall, BM: int, BN: int, G: int = 1) -> Tensor:
    """`[rows of positions, tiles, 5]` int32: what each tile of BM rows, G a token, visits among tiles of BN keys."""
    sizes = arguments.sizes(call)
    ranges = _numbers(call, triton.cdiv(sizes["T"] * G, BM))
    tokens = triton.next_power_of_2(triton.cdiv(BM - 1, G) + 1)
    spans = _spans_of(call.k_pos, sizes["S0"], sizes["S"], BN)
    _of_queries[ranges.shape[1::-1]](
        *_rows(call.q_pos), *_rows(spans), ranges, **sizes, **arguments.law(call), G=G, TOKENS=tokens, BM=BM, BN=BN,
        TILES=TILES,
    )  # fmt: skip
    return ranges


def of_keys(call: AttendCall, BT: int, BN: int) -> Tensor:
    """`[rows of positions, tiles of BN keys, 5]` int32: which tiles of BT tokens see each tile of keys."""
    sizes = arguments.sizes(call)
    ranges = _numbers(call, triton.cdiv(sizes["S0"], BN) + triton.cdiv(sizes["S"], BN))
    spans = _spans_of(call.q_pos, 0, sizes["T"], BT)
    _of_keys[ranges.shape[1::-1]](
        *_rows(call.k_pos), *_rows(spans), ranges, **sizes, **arguments.law(call), BT=BT, BN=BN, TILES=TILES
    )
    return ranges


def stride(ranges: Tensor | None) -> int:
    """From one row's ranges to the next one's: 0 if all rows have the same."""
    return 0 if ranges is None or ranges.shape[0] == 1 else ranges.stride(0)


def _rows(numbers: Tensor) -> tuple[Tensor, int]:
    """Positions or what follows from them, and the stride from row to row."""
    numbers = numbers if numbers.stride(-1) == 1 else numbers.contiguous()
    return numbers, stride(numbers)


def _spans_of(positions: Tensor, S0: int, S: int, BN: int) -> Tensor:
    tiles = triton.cdiv(S0, BN) + triton.cdiv(S, BN)
    spans = torch.empty(positions.shape[0], tiles, 3, dtype=torch.int64, device=positions.device)
    _spans[tiles, positions.shape[0]](*_rows(positions), spans, S0, S, BN=BN)
    return spans


def _count(call: AttendCall) -> int:
    return max(call.q_pos.shape[0], call.k_pos.shape[0])


def _numbers(call: AttendCall, tiles: int) -> Tensor:
    return torch.empty(_count(call), tiles, NUMBERS.value, dtype=torch.int32, device=call.q.device)
