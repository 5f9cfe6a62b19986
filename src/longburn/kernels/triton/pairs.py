"""What the gradients of attention share on the device: the weights of one tile of pairs, and the scores' gradients."""

import triton
import triton.language as tl

from longburn.kernels.triton.tiles import LOG2E, NEVER, biased, last_seen, relative, sees_pairs

# Numbers that change from call to call: kernels are not compiled anew for each.
UNSPECIALISED = [
    "T",
    "S0",
    "S",
    "window",
    "sink_tokens",
    "lookahead",
    "q_pos_stride",
    "newest_stride",
    "codes_stride",
    "ranges_stride",
    "zero",
    "entries",
]


@triton.jit
def matrix(pointer, stride, first, there, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """Rows `first .. first + ROWS - 1` of a matrix, `[ROWS, BD]`; zeros beyond D and, if MASKED, where none is."""
    d = tl.arange(0, BD)[None, :]
    at = pointer + tl.cast(first, tl.int64) * stride + tl.arange(0, ROWS)[:, None] * stride + d
    if MASKED:
        return tl.load(at, mask=there[:, None] & (d < D), other=0)
    elif D < BD:
        return tl.load(at, mask=d < D, other=0)
    else:
        return tl.load(at)


@triton.jit
def queries_at(q_pos, t, T, base, window, lookahead, BLOCK: tl.constexpr, BOUNDED: tl.constexpr):
    """Queries by index: index, whether they are there, position from the base, first and last position they see."""
    position = tl.load(q_pos + t, mask=t < T, other=-1)
    there, p = position >= 0, relative(position, base)
    return t, there, p, p - window + 1, last_seen(p, there, (position % BLOCK).to(tl.int32), lookahead, BLOCK, BOUNDED)


@triton.jit
def keys_at(codes, column, S):
    """Keys by column: column, whether it is filled, position from the newest query, and the same for a window."""
    j = tl.load(codes + column, mask=column < S, other=NEVER)
    return column, j != NEVER, j, tl.load(codes + S + column, mask=column < S, other=NEVER)


@triton.jit
def of_query(x, TRANSPOSED: tl.constexpr):
    """One number a query, to be broadcast over keys."""
    return x[None, :] if TRANSPOSED else x[:, None]


@triton.jit
def of_key(x, TRANSPOSED: tl.constexpr):
    return x[:, None] if TRANSPOSED else x[None, :]


@triton.jit
def product(a, b, TRANSPOSED: tl.constexpr):
    """`a @ b^T` for queries a and keys b, or its transpose."""
    if TRANSPOSED:
        return tl.dot(b, tl.trans(a), input_precision="ieee")
    else:
        return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def pairs(
    mine,
    k,
    v,
    queries,
    keys,
    b,
    h,
    scale,
    per_pair,
    WINDOWED: tl.constexpr,
    LAW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The weights of a tile of pairs and the gradients of their biased scores, `[queries, keys]` or TRANSPOSED.

    mine: a `query_tile`. queries, keys: where they stand. k, v: `[keys, BD]`. With the LAW, some pairs are not seen.
    """
    q, second, dout, lse, delta, row_here = mine
    t, there, p, first, last = queries
    column, filled, j, since = keys
    q_sink, slope, row, bias, bias_strides, zero, entries = per_pair
    s = product(q, k, TRANSPOSED)
    if LAW and q_sink is not None:
        s = tl.where(of_key(since == NEVER, TRANSPOSED), product(second, k, TRANSPOSED), s)
    s *= scale * LOG2E
    if slope is not None:
        slope = tl.load(slope + h).to(tl.float32) * LOG2E
    if row is not None:
        row = of_query(row_here, TRANSPOSED)
    s = biased(
        s,
        of_query(p, TRANSPOSED),
        of_key(j, TRANSPOSED),
        h,
        of_query(t, TRANSPOSED),
        of_key(column, TRANSPOSED),
        of_query(there, TRANSPOSED),
        of_key(filled, TRANSPOSED),
        b,
        slope,
        row,
        bias,
        bias_strides,
        zero,
        entries,
    )
    weights = tl.exp2(s - of_query(lse, TRANSPOSED))
    if LAW:
        seen = sees_pairs(
            of_key(j, TRANSPOSED),
            of_key(since, TRANSPOSED),
            of_query(first, TRANSPOSED),
            of_query(last, TRANSPOSED),
            WINDOWED,
        )
        weights = tl.where(seen, weights, 0.0)
    return weights, weights * (product(dout, v, TRANSPOSED) - of_query(delta, TRANSPOSED))


@triton.jit
def query_tile(
    q,
    q_sink,
    dout,
    strides,
    numbers,
    row,
    row_strides,
    b,
    h,
    H,
    T,
    first,
    t,
    there,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Queries `first .. first + BT - 1` of one head: q, q_sink and dout `[BT, BD]`; lse in units of log 2 and delta.

    Something stands also where there is no q_sink or no row's bias.
    """
    q += b * strides[0][0] + h * strides[0][1]
    dout += b * strides[2][0] + h * strides[2][1]
    q_here = matrix(q, strides[0][2], first, there, D, BT, BD, MASKED)
    second = q_here
    if q_sink is not None:
        q_sink += b * strides[1][0] + h * strides[1][1]
        second = matrix(q_sink, strides[1][2], first, there, D, BT, BD, MASKED)
    dout_here = matrix(dout, strides[2][2], first, there, D, BT, BD, MASKED)
    at = (b * H + h) * T + t
    if MASKED:
        lse, delta = tl.load(numbers[0] + at, mask=there, other=0), tl.load(numbers[1] + at, mask=there, other=0)
    else:
        lse, delta = tl.load(numbers[0] + at), tl.load(numbers[1] + at)
    row_here = delta
    if row is not None:
        at = b * row_strides[0] + h * row_strides[1] + t
        row_here = tl.load(row + at, mask=there, other=0).to(tl.float32) * LOG2E
    return q_here, second, dout_here, lse, delta, row_here


@triton.jit
def products(
    out, dout, out_strides, dout_strides, lse, base2, delta, T, H, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """delta [B, H, T]: the sum over D of output and output gradient. base2: the lse in units of log 2.

    Where a query sees nothing, base2 is made finite: the query has no weights anyway.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    there, first = t < T, tl.program_id(0) * BT
    x = matrix(out + b * out_strides[0] + h * out_strides[1], out_strides[2], first, there, D, BT, BD, True)
    y = matrix(dout + b * dout_strides[0] + h * dout_strides[1], dout_strides[2], first, there, D, BT, BD, True)
    at = (b * H + h) * T + t
    tl.store(delta + at, tl.sum(x.to(tl.float32) * y.to(tl.float32), 1), mask=there)
    sums = tl.load(lse + at, mask=there, other=0)
    tl.store(base2 + at, tl.where(sums == float("-inf"), 0.0, sums * LOG2E), mask=there)
