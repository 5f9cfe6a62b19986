"""The decode kernel: one block reads one split of the keys of one row and kv head."""

import triton
import triton.language as tl

from longburn.kernels.triton.decode_tiles import attend_tiles, merge_splits, store_rows, weight_of
from longburn.kernels.triton.tiles import LOG2E, last_seen, relative

SCANNED = tl.constexpr(2048)  # positions that a block looks at together


@triton.jit
def _in_fp16(q, factor):
    """Queries `[W, M, D]` in fp16, in which fp8 is exact, by powers of two; and the factor `[W, M, 1]` of their scores.

    Rows of bf16 may lie beyond the range of fp16; their largest entry becomes about 2^10.
    """
    q = q.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(q), 2, keep_dims=True), 1e-30)
    power = 10.0 - tl.floor(tl.log2(largest))
    return (q * tl.exp2(power)).to(tl.float16), factor * tl.exp2(-power)


_NUMBERS = [
    *("S", "S0", "H", "G", "T", "limit", "scale", "window", "sink_tokens", "lookahead", "zero", "entries"),
    *("key_by_row", "key_by_head", "key_by_slot", "bias_by_row", "bias_by_head", "bias_by_query", "table_by_head"),
    *("dense_by_row", "dense_by_head", "dense_by_query", "dense_by_slot"),
]


@triton.jit(do_not_specialize=_NUMBERS)
def decode_kernel(
    q,
    q_sink,
    k,
    v,
    k_scale,
    v_scale,
    k_before,
    v_before,
    q_pos,
    k_pos,
    sinks,
    slope,
    key,
    row,
    table,
    dense,
    out,
    lse,
    partial,
    counters,
    S,
    S0,
    H,
    G,
    T,
    limit,  # most splits of a row
    scale,
    window,
    sink_tokens,
    lookahead,
    zero,
    entries,
    key_by_row,  # strides of the biases
    key_by_head,
    key_by_slot,
    bias_by_row,
    bias_by_head,
    bias_by_query,
    table_by_head,
    dense_by_row,
    dense_by_head,
    dense_by_query,
    dense_by_slot,
    q_strides,  # by row, head, and query or slot
    q_sink_strides,
    k_strides,
    v_strides,
    k_scale_strides,
    v_scale_strides,
    k_before_strides,
    v_before_strides,
    q_pos_strides,  # by row, by query
    k_pos_strides,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    ASCENDING: tl.constexpr,
    KEY_BY_HEAD: tl.constexpr,
    SCAN: tl.constexpr,
    LEAST: tl.constexpr,  # tiles of a split
    TOGETHER: tl.constexpr,  # splits merged at once
):
    TILE: tl.constexpr = W * N
    split, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row_tiles = tl.cdiv(G * T, M)
    head = tile // row_tiles
    b64, head64 = b.to(tl.int64), head.to(tl.int64)

    # --- rows of the tile ---
    r = tile % row_tiles * M + tl.arange(0, M)
    real = r < G * T
    h, t = head * G + tl.minimum(r // T, G - 1), r % T
    p = tl.where(real, tl.load(q_pos + b64 * q_pos_strides[0] + t * q_pos_strides[1]), -1)

    # --- how many slots the row can see, and this split's share of their tiles: by the row's own positions only ---
    if ASCENDING and BOUNDED:
        farthest = tl.max(tl.load(q_pos + b64 * q_pos_strides[0] + tl.arange(0, 16) % T * q_pos_strides[1]))
        end = farthest + 1 + lookahead
        if BLOCK > 1:
            end = tl.maximum(end, (farthest // BLOCK + 1) * BLOCK)
        slots = tl.minimum(tl.where(farthest < 0, 0, end), S).to(tl.int32)
    else:
        slots = S
    before = tl.cdiv(S0, TILE)
    tiles = before + tl.cdiv(slots, TILE)
    active = tl.maximum(tl.minimum(limit, tiles // LEAST), 1)
    if split >= active:
        return
    first, last = (split * tiles) // active, ((split + 1) * tiles) // active

    d = tl.arange(0, BLOCK_D)[None, :]
    is_q = real[:, None] & (d < D)
    at = b64 * q_strides[0] + h * q_strides[1] + t * q_strides[2]
    queries = tl.broadcast_to(tl.load(q + at[:, None] + d, mask=is_q, other=0.0)[None], [W, M, BLOCK_D])
    others = None
    if q_sink is not None:
        at = b64 * q_sink_strides[0] + h * q_sink_strides[1] + t * q_sink_strides[2]
        others = tl.broadcast_to(tl.load(q_sink + at[:, None] + d, mask=is_q, other=0.0)[None], [W, M, BLOCK_D])
    slope_row, bias_row = None, None
    if slope is not None:
        slope_row = (tl.load(slope + h).to(tl.float32) * LOG2E)[None, :, None]
    if row is not None:
        at = b64 * bias_by_row + h * bias_by_head + t * bias_by_query
        bias_row = (tl.load(row + at).to(tl.float32) * LOG2E)[None, :, None]
    base = tl.max(p, 0)
    p_row = relative(p, base)
    until = last_seen(p_row, p >= 0, (p % BLOCK).to(tl.int32), lookahead, BLOCK, BOUNDED)[None, :, None]
    p_row = p_row[None, :, None]
    since = p_row - window + 1
    factor = scale * LOG2E

    # --- biases by key ---
    key_at, table_at, dense_at = None, None, None
    if key is not None:
        key_at = key + b64 * key_by_row
        if KEY_BY_HEAD:
            key_at = (key_at + h * key_by_head)[None, :, None]
    if table is not None:
        table_at = (table + h * table_by_head)[None, :, None]
    if dense is not None:
        dense_at = (dense + b64 * dense_by_row + h * dense_by_head + t * dense_by_query)[None, :, None]
    positions = k_pos + b64 * k_pos_strides[0]

    acc = tl.zeros([W, M, BLOCK_DV], tl.float32)
    mass, top = tl.zeros([W, M], tl.float32), tl.full([W, M], float("-inf"), tl.float32)
    if k_before is not None:
        stop = tl.maximum(tl.minimum(last, before), first)
        acc, mass, top = attend_tiles(
            acc, mass, top, queries, others, p_row, since, until, slope_row, bias_row,
            k_before + b64 * k_before_strides[0] + head64 * k_before_strides[1],
            v_before + b64 * v_before_strides[0] + head64 * v_before_strides[1],
            k_before_strides[2], v_before_strides[2], None, None, positions,
            key_at, table_at, dense_at, key_by_slot, dense_by_slot, zero, entries, base, sink_tokens,
            0, 0, first, stop, S0, factor, factor, D, DV, BLOCK_D, BLOCK_DV, W, N, WINDOWED,
        )  # fmt: skip
        first, last = tl.maximum(first - before, 0), tl.maximum(last - before, 0)
        positions += S0
        if key is not None:
            key_at += S0 * key_by_slot
        if dense is not None:
            dense_at += S0 * dense_by_slot

    heads, low, high = 0, first, last
    if SCAN:
        # Only tiles with a visible key are read: kept sink tokens in the first ones, then one stretch.
        heads = tl.minimum(tl.maximum(tl.cdiv(sink_tokens, TILE) - first, 0), last - first)
        earliest = tl.min(tl.where(p < 0, 1 << 62, p))
        lowest, highest = last * TILE, 0
        for start in range((first + heads) * TILE, tl.minimum(last * TILE, slots), SCANNED):
            s = start + tl.arange(0, SCANNED)
            j = tl.load(positions + s, mask=s < tl.minimum(last * TILE, slots), other=-1)
            near = (j >= 0) & ((earliest - j < window) | (j < sink_tokens))
            lowest = tl.minimum(lowest, tl.min(tl.where(near, s, last * TILE)))
            highest = tl.maximum(highest, tl.max(tl.where(near, s + 1, 0)))
        low = lowest // TILE
        high = tl.maximum(tl.cdiv(highest, TILE), low)
    k_scales, v_scales = None, None
    sink_factor = factor
    if k_scale is not None:
        if queries.dtype != tl.float32:
            queries, factor = _in_fp16(queries, factor)
            if others is not None:
                others, sink_factor = _in_fp16(others, sink_factor)
        k_scales = k_scale + b64 * k_scale_strides[0] + head64 * k_scale_strides[1]
        v_scales = v_scale + b64 * v_scale_strides[0] + head64 * v_scale_strides[1]
    k += b64 * k_strides[0] + head64 * k_strides[1]
    v += b64 * v_strides[0] + head64 * v_strides[1]
    if others is not None and ASCENDING:
        # No slot holds a position below its index: the second query matters in the first slots only.
        mixed = tl.minimum(tl.maximum(tl.cdiv(sink_tokens, TILE), first), last)
        acc, mass, top = attend_tiles(
            acc, mass, top, queries, others, p_row, since, until, slope_row, bias_row,
            k, v, k_strides[2], v_strides[2], k_scales, v_scales, positions,
            key_at, table_at, dense_at, key_by_slot, dense_by_slot, zero, entries, base, sink_tokens,
            first, mixed - first, mixed, mixed, slots, factor, sink_factor, D, DV, BLOCK_D, BLOCK_DV, W, N, WINDOWED,
        )  # fmt: skip
        first, heads, low, high = mixed, 0, tl.maximum(low, mixed), tl.maximum(high, mixed)
        others = None
    acc, mass, top = attend_tiles(
        acc, mass, top, queries, others, p_row, since, until, slope_row, bias_row,
        k, v, k_strides[2], v_strides[2], k_scales, v_scales, positions,
        key_at, table_at, dense_at, key_by_slot, dense_by_slot, zero, entries, base, sink_tokens,
        first, heads, low, high, slots, factor, sink_factor, D, DV, BLOCK_D, BLOCK_DV, W, N, WINDOWED,
    )  # fmt: skip

    # --- the warps' softmaxes become one ---
    ways = top
    top = tl.max(ways, 0)
    weight = weight_of(ways, top[None])
    mass = tl.sum(mass * weight, 0)
    acc = tl.sum(acc * weight[:, :, None], 0)
    if active == 1:
        store_rows(acc, mass, top, out, lse, sinks, b, h, t, real, H, T, DV, BLOCK_DV)
    elif partial is not None:
        unit = b * tl.num_programs(1) + tile
        units = tl.num_programs(2) * tl.num_programs(1)
        tops = partial + units.to(tl.int64) * tl.num_programs(0) * (M * BLOCK_DV)
        masses = tops + units * tl.num_programs(0) * M
        first_part = unit.to(tl.int64) * tl.num_programs(0)
        dv, at = tl.arange(0, BLOCK_DV)[None, :], (first_part + split) * M + tl.arange(0, M)
        tl.store(partial + at[:, None] * BLOCK_DV + dv, acc, mask=real[:, None])
        tl.store(tops + at, top)
        tl.store(masses + at, mass)
        tl.debug_barrier()  # all of the block's stores come before its one arrival
        if tl.atomic_add(counters + unit, 1, sem="acq_rel") == active - 1:
            tl.store(counters + unit, 0)
            left = G * T - tile % row_tiles * M
            acc, mass, top = merge_splits(partial, tops, masses, first_part, active, left, M, BLOCK_DV, TOGETHER)
            store_rows(acc, mass, top, out, lse, sinks, b, h, t, real, H, T, DV, BLOCK_DV)
