"""What forward and backward attention of many queries share on the device: positions, the law, the bias, the ranges.

Positions are counted from a row's newest query and clamped to +-FAR: 32 bits then hold all that matters of positions of
any size. The law is two comparisons a pair: a query knows the first and the last position that it sees, and a key that
must fail or pass a comparison in any case stands at NEVER.
"""

import triton
import triton.language as tl

FAR = tl.constexpr((1 << 30) - 1)
NEVER = tl.constexpr((1 << 31) - 1)  # later than every last position that is seen, and than every first
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def relative(position, base):
    """Positions (int64) as 32-bit distances from the base."""
    return tl.minimum(tl.maximum(position - base, -FAR), FAR).to(tl.int32)


@triton.jit
def last_seen(p, there, own, lookahead, BLOCK: tl.constexpr, BOUNDED: tl.constexpr):
    """The last position that queries at p see; `own` is a query's place within its block (read if BLOCK > 1)."""
    if BOUNDED:
        last = p + (tl.maximum(lookahead, BLOCK - 1 - own) if BLOCK > 1 else lookahead)
    else:
        last = tl.zeros_like(p) + FAR
    return tl.where(there, last, -NEVER)


@triton.jit
def sees_pairs(j, since, first, last, WINDOWED: tl.constexpr):
    """The law (`kernels.attend.call.visible`): keys at j, and queries that see `first .. last`; both broadcast.

    `since` is a key's position as far as a window is concerned: NEVER if a window keeps the key for ever.
    """
    seen = j <= last
    if WINDOWED:
        seen = seen & (since >= first)
    return seen


@triton.jit
def tile_start(tile, S0, BN: tl.constexpr):
    """The first column of a tile of keys. No tile holds keys of two parts: the last one of `before` may be short."""
    tiles0 = tl.cdiv(S0, BN)
    return tl.where(tile < tiles0, tile * BN, S0 + (tile - tiles0) * BN)


@triton.jit
def tiles_within(column, S0, BN: tl.constexpr):
    """How many tiles end at or before this column; also the tile that holds it."""
    return tl.where(column < S0, column // BN, tl.cdiv(S0, BN) + (column - S0) // BN)


@triton.jit
def tiles_over(column, S0, BN: tl.constexpr):
    """How many tiles hold the columns before this one."""
    return tl.where(column <= S0, tl.cdiv(column, BN), tl.cdiv(S0, BN) + tl.cdiv(column - S0, BN))


@triton.jit
def biased(s, p, j, h, t, column, there, filled, b, slope, row, bias, strides, zero, entries):
    """Scores in units of log 2, with every term of the bias that is given.

    p, t, h and there (position, index and head of the queries, and whether they exist), slope and row (their own terms,
    already in these units), and j, column and filled (the same of the keys) broadcast to the shape of s, in either
    orientation. A key's term without a stride over heads is the same for all of them.
    """
    key, table, dense = bias
    if slope is not None:
        s -= slope * tl.abs(p - j).to(tl.float32)
    if row is not None:
        s += row
    if key is not None:
        if strides[0][1] is None:
            s += LOG2E * tl.load(key + b * strides[0][0] + column, mask=filled, other=0).to(tl.float32)
        else:
            at = b * strides[0][0] + h * strides[0][1] + column
            s += LOG2E * tl.load(key + at, mask=there & filled, other=0).to(tl.float32)
    if table is not None:
        entry = tl.minimum(tl.maximum(p - j + zero, 0), entries - 1)
        s += LOG2E * tl.load(table + h * strides[1][0] + entry, mask=there & filled, other=0).to(tl.float32)
    if dense is not None:
        at = b * strides[2][0] + h * strides[2][1] + t.to(tl.int64) * strides[2][2] + column
        s += LOG2E * tl.load(dense + at, mask=there & filled, other=0).to(tl.float32)
    return s
