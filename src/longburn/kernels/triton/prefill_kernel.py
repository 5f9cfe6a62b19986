"""The kernel of attention of many queries.

The queries of one kv head are rows, token after token and within a token head after head of the group, so that a tile
of them covers few positions and needs few masks. It visits the keys that a window keeps for ever, then the tiles at the
edges of what it sees, with the law, then those in between, without.
"""

import triton
import triton.language as tl

from longburn.kernels.triton.pairs import matrix
from longburn.kernels.triton.ranges import NUMBERS, known_ranges
from longburn.kernels.triton.tiles import LOG2E, NEVER, biased, last_seen, relative, sees_pairs, tile_start

LOWEST = tl.constexpr(-3e38)  # below every score, and finite: differences with it stay numbers
_UNSPECIALISED = [
    *(
        "T",
        "S0",
        "S",
        "columns",
        "q_pos_stride",
        "newest_stride",
        "codes_stride",
        "ranges_stride",
        "window",
        "sink_tokens",
        "lookahead",
    ),
    *("q_base", "q_rest", "head", "k_shift", "zero", "entries"),
]


@triton.jit
def _visit(
    state, tile, given, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, WINDOWED: tl.constexpr,
    KNOWN: tl.constexpr, LAW: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The running softmax after one more tile. LAW: some pairs are not seen. KEPT: the second query has some keys."""
    q, q_sink, scale, rows, keys, main, before, per_pair = given
    bias, bias_strides, zero, entries = per_pair
    b, h, t, there, p, first, last, slope, row = rows
    k, v, k_strides, v_strides = main
    k_stride, v_stride = k_strides[2], v_strides[2]
    codes, codes_columns, S0, S, columns, sink_tokens, head, q_base, k_shift = keys
    start = tile * BN
    end = S0 + S
    if before[0] is not None:
        start = tile_start(tile, S0, BN)
        if start < S0:
            k, v, end = before[0], before[1], S0
            k_stride, v_stride = before[2][2], before[3][2]
    column = start + tl.arange(0, BN)
    inside = column < tl.minimum(end, columns)
    if KNOWN:
        j = column + tl.where(column < head, -q_base, k_shift)
        filled, since = inside, tl.where(j < sink_tokens - q_base, NEVER, j)
        j = tl.where(inside, j, NEVER)
    elif LAW or slope is not None or bias[1] is not None:
        j = tl.load(codes + column, mask=inside, other=NEVER)
        filled, since = j != NEVER, j
        if WINDOWED or KEPT:
            since = tl.load(codes + codes_columns + column, mask=inside, other=NEVER)
    else:
        filled, since, j = inside, column, column

    keys_here = matrix(k, k_stride, start, inside, D, BN, BD, LAW)
    s = tl.dot(q, tl.trans(keys_here), input_precision="ieee")
    if KEPT and q_sink is not None:
        s = tl.where((since == NEVER)[None, :], tl.dot(q_sink, tl.trans(keys_here), input_precision="ieee"), s)
    factor = scale * LOG2E
    if slope is not None or row is not None or bias[0] is not None or bias[1] is not None or bias[2] is not None:
        s = biased(
            s * factor, p[:, None], j[None, :], h[:, None], t[:, None], column[None, :], there[:, None],
            filled[None, :], b, slope, row, bias, bias_strides, zero, entries,
        )  # fmt: skip
        factor = 1.0
    if LAW:
        seen = sees_pairs(j[None, :], since[None, :], first[:, None], last[:, None], WINDOWED)
        s = tl.where(seen, s, float("-inf"))
    values = matrix(v, v_stride, start, filled, D, BN, BD, LAW)

    acc, most, total = state
    new = tl.maximum(most, tl.max(s, 1) * factor)
    weights = tl.exp2(s * factor - new[:, None])
    rescale = tl.exp2(most - new)
    acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
    return acc, new, total * rescale + tl.sum(weights, 1)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_kernel(
    q,
    q_sink,
    k,
    v,
    before_k,
    before_v,
    q_strides,
    q_sink_strides,
    k_strides,
    v_strides,
    before_k_strides,
    before_v_strides,
    q_pos,
    q_pos_stride,
    newest,
    newest_stride,
    codes,
    codes_stride,
    ranges,
    ranges_stride,
    sinks,
    slope,
    row,
    row_strides,
    bias,
    bias_strides,
    zero,
    entries,
    out,
    out_strides,
    lse,
    T,
    S0,
    S,
    columns,
    window,
    sink_tokens,
    lookahead,
    q_base,
    q_rest,
    head,
    k_shift,
    scale,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    KNOWN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """One tile of BM rows of queries of one kv head; the last tiles, which see most, come first.

    What it visits stands in `ranges`, or, if KNOWN, follows from what the host knows: the query in column t stands at
    position q_base + t, the key in column c at position c, or k_shift + q_base + c from column `head` on.
    """
    tiles = tl.cdiv(T * G, BM)
    tile = tiles - 1 - tl.program_id(0) // (tl.num_programs(0) // tiles)
    pair = tl.program_id(0) % (tl.num_programs(0) // tiles)
    b, kv = (pair // K).to(tl.int64), (pair % K).to(tl.int64)

    rows = tile * BM + tl.arange(0, BM)
    t, h = rows // G, kv * G + rows % G
    if KNOWN:
        there, p, own = t < T, t, (t + q_rest) % BLOCK
        first_t, last_t = tile * BM // G, tl.minimum((tile * BM + BM - 1) // G, T - 1)
        kept, low, full_low, full_high, high = known_ranges(
            first_t, last_t, q_rest, q_base, head, k_shift, columns, S0, window, sink_tokens, lookahead,
            BLOCK, WINDOWED, BOUNDED, BN,
        )  # fmt: skip
    else:
        position = tl.load(q_pos + b * q_pos_stride + t, mask=t < T, other=-1)
        there, own = position >= 0, (position % BLOCK).to(tl.int32)
        p = relative(position, tl.load(newest + b * newest_stride))
        at = ranges + b * ranges_stride + tile * NUMBERS
        kept, low, full_low = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        full_high, high = tl.load(at + 3), tl.load(at + 4)
    first = p - window + 1
    last = last_seen(p, there, own, lookahead, BLOCK, BOUNDED)

    # `there` guards every read: the query of a row without a token may be NaN.
    d = tl.arange(0, BD)
    here = there[:, None] & (d < D)[None, :]
    at = b * q_strides[0] + h * q_strides[1] + t.to(tl.int64) * q_strides[2]
    query = tl.load(q + at[:, None] + d[None, :], mask=here, other=0)
    if q_sink is not None:
        at = b * q_sink_strides[0] + h * q_sink_strides[1] + t.to(tl.int64) * q_sink_strides[2]
        q_sink = tl.load(q_sink + at[:, None] + d[None, :], mask=here, other=0)
    k_at, v_at = k + b * k_strides[0] + kv * k_strides[1], v + b * v_strides[0] + kv * v_strides[1]
    if before_k is not None:  # a column of the main part is counted from the first column of both
        k_at, v_at = k_at - S0.to(tl.int64) * k_strides[2], v_at - S0.to(tl.int64) * v_strides[2]
        before_k += b * before_k_strides[0] + kv * before_k_strides[1]
        before_v += b * before_v_strides[0] + kv * before_v_strides[1]

    # A learned sink is a first key with the value 0.
    most = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + h, mask=t < T, other=0).to(tl.float32)
        most, total = tl.maximum(sink * LOG2E, LOWEST), tl.where(sink == float("-inf"), 0.0, 1.0)
    state = (tl.zeros((BM, BD), tl.float32), most, total)

    if slope is not None:
        slope = tl.load(slope + h, mask=t < T, other=0).to(tl.float32)[:, None] * LOG2E
    if row is not None:
        row += b * row_strides[0] + h * row_strides[1] + t
        row = tl.load(row, mask=there, other=0).to(tl.float32)[:, None] * LOG2E
    if codes is not None:
        codes += b * codes_stride
    per_row = (b, h, t, there, p, first, last, slope, row)
    per_key = (codes, S0 + S, S0, S, columns, sink_tokens, head, q_base, k_shift)
    main = (k_at, v_at, k_strides, v_strides)
    before = (before_k, before_v, before_k_strides, before_v_strides)
    given = (query, q_sink, scale, per_row, per_key, main, before, (bias, bias_strides, zero, entries))

    edges = full_low - low + high - full_high
    if q_sink is None:
        edges += kept
    else:
        for tile in range(0, kept):
            state = _visit(state, tile, given, D, BN, BD, WINDOWED, KNOWN, True, True)
    for i in range(0, edges):
        tile = low + i
        if q_sink is None:
            tile = tl.where(i < kept, i, tile - kept)
        tile = tl.where(tile >= full_low, tile + full_high - full_low, tile)
        state = _visit(state, tile, given, D, BN, BD, WINDOWED, KNOWN, True, False)
    for tile in range(full_low, full_high):
        state = _visit(state, tile, given, D, BN, BD, WINDOWED, KNOWN, False, False)

    acc, most, total = state
    # A query that sees nothing gives 0, and -inf or its sink. One without a token went through tiles for the others.
    some = total != 0  # NaN is something, and must be seen
    logs = tl.where(some, most / LOG2E + tl.log(total), float("-inf"))
    if not KNOWN:
        some = some & there
        nothing = tl.full((BM,), float("-inf"), tl.float32)
        if sinks is not None:
            nothing = tl.load(sinks + h, mask=t < T, other=0).to(tl.float32)
        logs = tl.where(there, logs, nothing)
    result = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    at = b * out_strides[0] + h * out_strides[1] + t.to(tl.int64) * out_strides[2]
    inside = (t < T)[:, None] & (d < D)[None, :]
    tl.store(out + at[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + (b * K * G + h) * T + t, logs, mask=t < T)
