"""What a block of the decode kernel does with its tiles of keys, and how the states of several blocks become one.

The state of a softmax is the weighted sum of the values seen so far, the sum of the weights (mass), and the largest
score (top, in units of log 2), by which all weights are scaled.
"""

import triton
import triton.language as tl

from longburn.kernels.triton.tiles import LOG2E, NEVER, relative, sees_pairs

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def weight_of(part, whole):
    """2^(part - whole); nothing (-inf) weighs 0 even within nothing."""
    return tl.exp2(part - tl.where(whole == float("-inf"), 0.0, whole))


@triton.jit
def _product(a, b, acc):
    """a [W, M, X] times b [W, X, Y] onto acc: a warp for each of W if there are several, else all warps for one."""
    PRECISION: tl.constexpr = "ieee" if a.dtype == tl.float32 else "tf32"
    if a.shape[0] > 1:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        a, b = tl.reshape(a, [a.shape[1], a.shape[2]]), tl.reshape(b, [b.shape[1], b.shape[2]])
        return tl.dot(a, b, tl.reshape(acc, [acc.shape[1], acc.shape[2]]), input_precision=PRECISION)[None]


@triton.jit
def attend_tiles(
    acc,  # [W, M, DV] weighted values
    mass,  # [W, M] weights
    top,  # [W, M] largest score, in log2
    q,  # [W, M, D]
    q_sink,
    p,  # [1, M, 1] positions relative to the base, and the first and the last one that is seen
    since,
    until,
    slope,
    row,
    k,
    v,
    k_step,
    v_step,
    k_scale,
    v_scale,
    k_pos,
    key,  # pointers to column 0 of this part, [1, M, 1] or one for all rows
    table,
    dense,
    key_step,
    dense_step,
    zero,
    entries,
    base,
    sink_tokens,
    first,  # tiles [first, first + head) and [low, high) of this part
    head,
    low,
    high,
    slots,
    factor,  # of the scores with q and with q_sink
    sink_factor,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """The softmax's state after these tiles of one part of the keys."""
    nothing = tl.zeros([W, q.shape[1], N], tl.float32)
    way = tl.arange(0, W)[:, None, None] * N
    across, down = way + tl.arange(0, N)[None, None, :], way + tl.arange(0, N)[None, :, None]
    d, dv = tl.arange(0, BLOCK_D)[None, None, :], tl.arange(0, BLOCK_DV)[None, None, :]
    for i in range(0, head + high - low):
        start = tl.where(i < head, first + i, low + i - head) * (W * N)
        # Beyond the last slot that one is read again and not seen: cheaper than to predicate every load.
        inside, below = start + across < slots, start + down < slots
        column, slot = tl.minimum(start + across, slots - 1), tl.minimum(start + down, slots - 1)
        if D < BLOCK_D:
            kk = tl.load(k + (slot.to(tl.int64) * k_step + d), mask=d < D, other=0.0)
        else:
            kk = tl.load(k + (slot.to(tl.int64) * k_step + d))
        # What is not filled may hold NaN, which no weight of 0 would take back. Masked on their way, values go straight
        # from shared memory to the tensor cores.
        filled = (tl.load(k_pos + slot) >= 0) & below
        loaded = (dv < DV) if W == 1 else filled & (dv < DV)
        vv = tl.load(v + (slot.to(tl.int64) * v_step + dv), mask=loaded, other=0.0).to(q.dtype)
        if W == 1:
            vv = tl.where(filled, vv, 0.0)
        position = tl.load(k_pos + column)
        kept = position < sink_tokens
        j = tl.where(inside & (position >= 0), relative(position, base), NEVER)
        kk = tl.permute(kk, (0, 2, 1)).to(q.dtype)
        s = _product(q, kk, nothing) * factor
        if q_sink is not None:
            s = tl.where(kept, _product(q_sink, kk, nothing) * sink_factor, s)
        if k_scale is not None:
            s *= tl.load(k_scale + column)
        if slope is not None:
            s -= slope * tl.abs(p - j).to(tl.float32)
        if row is not None:
            s += row
        if key is not None:
            s += LOG2E * tl.load(key + column * key_step).to(tl.float32)
        if table is not None:
            entry = tl.minimum(tl.maximum(p - j + zero, 0), entries - 1)
            s += LOG2E * tl.load(table + entry).to(tl.float32)
        if dense is not None:
            s += LOG2E * tl.load(dense + column * dense_step).to(tl.float32)
        seen = sees_pairs(j, tl.where(kept, NEVER, j), since, until, WINDOWED)
        s = tl.where(seen, s, float("-inf"))
        if v_scale is None:
            higher = tl.maximum(top, tl.max(s, 2))
        else:
            # A value's scale enters its weight. Its exponent enters the weights' reference: they stay below 2 in fp16.
            v_factor = tl.where(position >= 0, tl.maximum(tl.load(v_scale + column), 1e-18), 1.0)
            exponent = ((v_factor.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)
            higher = tl.maximum(top, tl.max(s + exponent, 2))
        weights, shrink = weight_of(s, higher[:, :, None]), weight_of(top, higher)
        mass = mass * shrink + tl.sum(weights, 2)
        top = higher
        if v_scale is not None:
            weights *= v_factor
        acc = _product(weights.to(q.dtype), vv, acc * shrink[:, :, None])
    return acc, mass, top


@triton.jit
def merge_splits(
    partial,
    tops,
    masses,
    first,
    active,
    rows,  # of M that are there
    M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The state of all splits, in their order. What is loaded together does not wait for each other."""
    m, e = tl.arange(0, M)[None, :], tl.arange(0, M * BLOCK_DV)[None, :]
    acc = tl.zeros([M * BLOCK_DV], tl.float32)
    mass, top = tl.zeros([M], tl.float32), tl.full([M], float("-inf"), tl.float32)
    for start in range(0, active, TOGETHER):
        split = start + tl.arange(0, TOGETHER)[:, None]
        there = split < active
        values = tl.load(partial + (first + split) * (M * BLOCK_DV) + e, mask=there & (e < rows * BLOCK_DV), other=0.0)
        own_top = tl.load(tops + (first + split) * M + m, mask=there, other=float("-inf"))
        own_mass = tl.load(masses + (first + split) * M + m, mask=there, other=0.0)
        higher = tl.maximum(top, tl.max(own_top, 0))
        weight, shrink = weight_of(own_top, higher[None]), weight_of(top, higher)
        mass = mass * shrink + tl.sum(own_mass * weight, 0)
        top = higher
        weight = tl.reshape(tl.broadcast_to(weight[:, :, None], [TOGETHER, M, BLOCK_DV]), [TOGETHER, M * BLOCK_DV])
        shrink = tl.reshape(tl.broadcast_to(shrink[:, None], [M, BLOCK_DV]), [M * BLOCK_DV])
        acc = acc * shrink + tl.sum(values * weight, 0)
    return tl.reshape(acc, [M, BLOCK_DV]), mass, top


@triton.jit
def store_rows(acc, mass, top, out, lse, sinks, b, h, t, real, H, T, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """The finished rows: acc [M, DV], mass and top [M], with the learned sink as one more weight."""
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2E
        higher = tl.maximum(top, sink)
        shrink = weight_of(top, higher)
        acc *= shrink[:, None]
        mass = mass * shrink + weight_of(sink, higher)
        top = higher
    dv = tl.arange(0, BLOCK_DV)[None, :]
    mass = tl.where(mass == 0, 1.0, mass)  # a row that sees nothing: 0 and -inf
    acc /= mass[:, None]
    at = (b.to(tl.int64) * T + t) * H + h
    tl.store(out + at[:, None] * DV + dv, acc.to(out.dtype.element_ty), mask=real[:, None] & (dv < DV))
    tl.store(lse + (b.to(tl.int64) * H + h) * T + t, (top + tl.log2(mass)) * LN_2, mask=real)
