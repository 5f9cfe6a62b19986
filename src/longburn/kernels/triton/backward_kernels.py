"""The kernels of the gradients of q, k and v, and of the terms of a bias that their sums give: by slope and by key."""

import triton
import triton.language as tl

from longburn.kernels.triton.pairs import UNSPECIALISED, keys_at, matrix, pairs, queries_at, query_tile
from longburn.kernels.triton.ranges import NUMBERS
from longburn.kernels.triton.tiles import NEVER


@triton.jit
def _visit_keys(
    state,
    tile,
    mine,
    queries,
    main,
    codes,
    S,
    b,
    h,
    scale,
    per_pair,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    WINDOWED: tl.constexpr,
    LAW: tl.constexpr,
    WANTS_ROWS: tl.constexpr,
    WANTS_SLOPE: tl.constexpr,
):
    """The sums of a tile of queries after one more tile of keys."""
    dq, dq_sink, rows, distances = state
    k, v, k_strides, v_strides = main
    keys = keys_at(codes, tile * BN + tl.arange(0, BN), S)
    k_here = matrix(k, k_strides[2], tile * BN, keys[1], D, BN, BD, LAW)
    v_here = matrix(v, v_strides[2], tile * BN, keys[1], D, BN, BD, LAW)
    _, ds = pairs(mine, k_here, v_here, queries, keys, b, h, scale, per_pair, WINDOWED, LAW, False)
    if WANTS_ROWS:
        rows += tl.sum(ds, 1)
    if WANTS_SLOPE:
        distances += tl.sum(ds * tl.abs(queries[2][:, None] - keys[2][None, :]).to(tl.float32), 1)
    if LAW and per_pair[0] is not None:
        kept = (keys[3] == NEVER)[None, :]
        dq_sink = tl.dot(tl.where(kept, ds, 0.0).to(k_here.dtype), k_here, dq_sink, input_precision="ieee")
        ds = tl.where(kept, 0.0, ds)
    return tl.dot(ds.to(k_here.dtype), k_here, dq, input_precision="ieee"), dq_sink, rows, distances


@triton.jit(do_not_specialize=UNSPECIALISED)
def of_queries(
    heads,
    head_strides,
    numbers,
    main,
    q_pos,
    q_pos_stride,
    newest,
    newest_stride,
    codes,
    codes_stride,
    ranges,
    ranges_stride,
    slope,
    row,
    row_strides,
    bias,
    bias_strides,
    zero,
    entries,
    dq,
    dq_sink,
    dq_strides,
    rows,
    distances,
    T,
    S0,
    S,
    window,
    sink_tokens,
    lookahead,
    scale,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """The gradient of BT queries of one head; the sums of their scores' gradients [B, H, T], also by distance."""
    tiles = tl.cdiv(T, BT)
    pair = tl.program_id(0) % (tl.num_programs(0) // tiles)
    tile = tiles - 1 - tl.program_id(0) // (tl.num_programs(0) // tiles)
    b, h = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    t = tile * BT + tl.arange(0, BT)
    q_pos += b * q_pos_stride
    base = tl.load(newest + b * newest_stride)
    queries = queries_at(q_pos, t, T, base, window, lookahead, BLOCK, BOUNDED)
    there = queries[1]
    mine = query_tile(
        heads[0], heads[1], heads[2], head_strides, numbers, row, row_strides, b, h, H, T, tile * BT, t, there, D, BT,
        BD, True,
    )  # fmt: skip
    k, v, k_strides, v_strides = main
    k += b * k_strides[0] + (h // G) * k_strides[1]
    v += b * v_strides[0] + (h // G) * v_strides[1]
    main_here = (k, v, k_strides, v_strides)
    per_pair = (heads[1], slope, row, bias, bias_strides, zero, entries)
    codes += b * codes_stride

    at = ranges + b * ranges_stride + tile * NUMBERS
    kept, low, full_low = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    full_high, high = tl.load(at + 3), tl.load(at + 4)
    sums, row_sums = tl.zeros((BT, BD), tl.float32), tl.zeros((BT,), tl.float32)
    state = (sums, sums if dq_sink is not None else row_sums, row_sums, row_sums)
    for i in range(0, kept + full_low - low + high - full_high):
        j = tl.where(i < kept, i, i - kept + low)
        j = tl.where(j >= full_low, j + full_high - full_low, j)
        state = _visit_keys(
            state, j, mine, queries, main_here, codes, S, b, h, scale, per_pair, D, BN, BD, WINDOWED,
            True, rows is not None, distances is not None,
        )  # fmt: skip
    for j in range(full_low, full_high):
        state = _visit_keys(
            state, j, mine, queries, main_here, codes, S, b, h, scale, per_pair, D, BN, BD, WINDOWED,
            False, rows is not None, distances is not None,
        )  # fmt: skip

    d = tl.arange(0, BD)[None, :]
    inside = (t < T)[:, None] & (d < D)
    at = (b * dq_strides[0] + h * dq_strides[1] + t.to(tl.int64) * dq_strides[2])[:, None] + d
    tl.store(dq + at, tl.where(there[:, None], state[0] * scale, 0.0).to(dq.dtype.element_ty), mask=inside)
    if dq_sink is not None:
        tl.store(dq_sink + at, tl.where(there[:, None], state[1] * scale, 0.0).to(dq.dtype.element_ty), mask=inside)
    at = (b * H + h) * T + t
    if rows is not None:
        tl.store(rows + at, tl.where(there, state[2], 0.0), mask=t < T)
    if distances is not None:
        tl.store(distances + at, tl.where(there, state[3], 0.0), mask=t < T)


@triton.jit
def _visit_queries(
    state,
    tile,
    heads,
    head_strides,
    numbers,
    row,
    row_strides,
    k,
    v,
    keys,
    base,
    q_pos,
    T,
    window,
    lookahead,
    b,
    h,
    scale,
    per_pair,
    H: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    LAW: tl.constexpr,
    WANTS_KEY: tl.constexpr,
):
    """The sums of a tile of keys after one more tile of queries."""
    dk, dv, dkey = state
    t = tile * BT + tl.arange(0, BT)
    queries = queries_at(q_pos, t, T, base, window, lookahead, BLOCK, BOUNDED)
    mine = query_tile(
        heads[0], heads[1], heads[2], head_strides, numbers, row, row_strides, b, h, H, T, tile * BT, t, queries[1], D,
        BT, BD, LAW,
    )  # fmt: skip
    weights, ds = pairs(mine, k, v, queries, keys, b, h, scale, per_pair, WINDOWED, LAW, True)
    dv = tl.dot(weights.to(k.dtype), mine[2], dv, input_precision="ieee")
    if WANTS_KEY:
        dkey += tl.sum(ds, 1)
    if LAW and per_pair[0] is not None:
        kept = (keys[3] == NEVER)[:, None]
        dk = tl.dot(tl.where(kept, ds, 0.0).to(k.dtype), mine[1], dk, input_precision="ieee")
        ds = tl.where(kept, 0.0, ds)
    return tl.dot(ds.to(k.dtype), mine[0], dk, input_precision="ieee"), dv, dkey


@triton.jit(do_not_specialize=UNSPECIALISED)
def of_keys(
    heads,
    head_strides,
    numbers,
    main,
    q_pos,
    q_pos_stride,
    newest,
    newest_stride,
    codes,
    codes_stride,
    ranges,
    ranges_stride,
    slope,
    row,
    row_strides,
    bias,
    bias_strides,
    zero,
    entries,
    dk,
    dv,
    dk_strides,
    dkey,
    T,
    S0,
    S,
    window,
    sink_tokens,
    lookahead,
    scale,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """The gradients of BN keys and values of one kv head, over its group; `dkey` [B, H, S]: those of a key's bias."""
    tiles = tl.cdiv(S, BN)
    K: tl.constexpr = H // G
    pair, tile = tl.program_id(0) % (tl.num_programs(0) // tiles), tl.program_id(0) // (tl.num_programs(0) // tiles)
    b, kv = (pair // K).to(tl.int64), (pair % K).to(tl.int64)
    column = tile * BN + tl.arange(0, BN)
    codes += b * codes_stride
    q_pos += b * q_pos_stride
    base = tl.load(newest + b * newest_stride)
    keys = keys_at(codes, column, S)
    k, v, k_strides, v_strides = main
    k_here = matrix(k + b * k_strides[0] + kv * k_strides[1], k_strides[2], tile * BN, keys[1], D, BN, BD, True)
    v_here = matrix(v + b * v_strides[0] + kv * v_strides[1], v_strides[2], tile * BN, keys[1], D, BN, BD, True)

    at = ranges + b * ranges_stride + tile * NUMBERS
    low, full_low, full_high, high = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    sums = tl.zeros((BN, BD), tl.float32)
    state = (sums, sums, tl.zeros((BN,), tl.float32))
    per_pair = (heads[1], slope, row, bias, bias_strides, zero, entries)
    for g in range(0, G):
        h = kv * G + g
        for i in range(0, full_low - low + high - full_high):
            j = low + i
            j = tl.where(j >= full_low, j + full_high - full_low, j)
            state = _visit_queries(
                state, j, heads, head_strides, numbers, row, row_strides, k_here, v_here, keys, base, q_pos, T, window,
                lookahead, b, h, scale, per_pair, H, D, BT, BD, BLOCK, WINDOWED, BOUNDED, True, dkey is not None,
            )  # fmt: skip
        for j in range(full_low, full_high):
            state = _visit_queries(
                state, j, heads, head_strides, numbers, row, row_strides, k_here, v_here, keys, base, q_pos, T, window,
                lookahead, b, h, scale, per_pair, H, D, BT, BD, BLOCK, WINDOWED, BOUNDED, False, dkey is not None,
            )  # fmt: skip
        if dkey is not None:
            tl.store(dkey + (b * H + h) * S + column, state[2], mask=column < S)
            state = (state[0], state[1], tl.zeros((BN,), tl.float32))

    d = tl.arange(0, BD)[None, :]
    inside = (column < S)[:, None] & (d < D)
    at = (b * dk_strides[0] + kv * dk_strides[1] + column.to(tl.int64) * dk_strides[2])[:, None] + d
    tl.store(dk + at, (state[0] * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, state[1].to(dv.dtype.element_ty), mask=inside)
