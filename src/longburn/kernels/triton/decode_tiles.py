"""What a block of the decode kernel does with its tiles of keys, and how the states of several blocks become one.

The state of a softmax is the weighted sum of the values seen so far, the sum of the weights (mass), and the largest
score (top, in units of log 2), by which all weights are scaled.
"""

import triton
import triton.language as tl

from longburn.kernels.triton.law import sees

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def weight_of(part, whole):
    """2^(part - whole); nothing (-inf) weighs 0 even within nothing."""
    return tl.exp2(part - tl.where(whole == float("-inf"), 0.0, whole))


@triton.jit
def attend_tiles(
    acc,  # [W, M, DV] weighted values
    mass,  # [W, M] weights
    top,  # [W, M] largest score, in log2
    q,  # [W, M, D]
    q_sink,
    p,  # [1, M, 1]
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
    law,  # window, sink_tokens, lookahead
    first,  # tiles [first, first + head) and [low, high) of this part
    head,
    low,
    high,
    slots,
    factor,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """The softmax's state after these tiles of one part of the keys."""
    window, sink_tokens, lookahead = law
    PRECISION: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    way = tl.arange(0, W)[:, None, None] * N
    across, down = way + tl.arange(0, N)[None, None, :], way + tl.arange(0, N)[None, :, None]
    d, dv = tl.arange(0, BLOCK_D)[None, None, :], tl.arange(0, BLOCK_DV)[None, None, :]
    for i in range(0, head + high - low):
        start = tl.where(i < head, first + i, low + i - head) * (W * N)
        inside, below = start + across < slots, start + down < slots
        kk = tl.load(k + start.to(tl.int64) * k_step + (down * k_step + d), mask=below & (d < D), other=0.0)
        vv = tl.load(v + start.to(tl.int64) * v_step + (down * v_step + dv), mask=below & (dv < DV), other=0.0)
        j = tl.load(k_pos + start + across, mask=inside, other=-1)
        filled = tl.load(k_pos + start + down, mask=below, other=-1) >= 0
        kk = tl.permute(kk, (0, 2, 1)).to(q.dtype)
        s = tl.dot(q, kk, input_precision=PRECISION)
        if q_sink is not None:
            s = tl.where(j < sink_tokens, tl.dot(q_sink, kk, input_precision=PRECISION), s)
        if k_scale is None:
            s *= factor
        else:
            s *= factor * tl.load(k_scale + start + across, mask=inside, other=0.0)
        if slope is not None:
            s -= slope * tl.abs(p - j).to(tl.float32)
        if row is not None:
            s += row
        if key is not None:
            s += LOG2_E * tl.load(key + (start + across) * key_step, mask=inside, other=0.0).to(tl.float32)
        if table is not None:
            entry = tl.minimum(tl.maximum(p - j + zero, 0), entries - 1)
            s += LOG2_E * tl.load(table + entry).to(tl.float32)
        if dense is not None:
            s += LOG2_E * tl.load(dense + (start + across) * dense_step, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(sees(p, j, window, sink_tokens, lookahead, BLOCK, WINDOWED, BOUNDED), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 2))
        weights, shrink = weight_of(s, higher[:, :, None]), weight_of(top, higher)
        mass = mass * shrink + tl.sum(weights, 2)
        top = higher
        if v_scale is None:
            vv = tl.where(filled, vv, 0.0)
        elif q.dtype == tl.bfloat16:  # its range holds weights times scales, and fp8 is exact in it
            weights *= tl.load(v_scale + start + across, mask=inside & (j >= 0), other=0.0)
            vv = tl.where(filled, vv.to(tl.bfloat16), 0.0)
        else:
            vv = vv.to(tl.float32) * tl.load(v_scale + start + down, mask=below, other=0.0)
            vv = tl.where(filled, vv.to(q.dtype), 0.0)
        acc = tl.dot(weights.to(vv.dtype), vv, acc * shrink[:, :, None], input_precision=PRECISION)
    return acc, mass, top


@triton.jit
def merge_splits(
    partial,
    stats,
    first,
    active,
    real,
    M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The state of all splits, in their order."""
    m, dv = tl.arange(0, M), tl.arange(0, BLOCK_DV)[None, :]
    stat = stats + ((first + tl.arange(0, SPLITS)[:, None]) * M + m[None, :]) * 2
    there = tl.arange(0, SPLITS)[:, None] < active
    tops = tl.load(stat, mask=there, other=float("-inf"))
    top = tl.max(tops, 0)
    mass = tl.sum(tl.load(stat + 1, mask=there, other=0.0) * weight_of(tops, top[None]), 0)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    for start in range(0, active, TOGETHER):
        for i in tl.static_range(TOGETHER):  # their loads do not wait for each other
            at = (first + start + i) * M + m
            own = tl.load(stats + at * 2, mask=real & (start + i < active), other=float("-inf"))
            accs = tl.load(partial + at[:, None] * BLOCK_DV + dv, mask=(own > float("-inf"))[:, None], other=0.0)
            acc += accs * weight_of(own, top)[:, None]
    return acc, mass, top


@triton.jit
def store_rows(acc, mass, top, out, lse, sinks, b, h, t, real, H, T, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """The finished rows: acc [M, DV], mass and top [M], with the learned sink as one more weight."""
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2_E
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
