"""The kernel of `hopper`, in Gluon.

A block of threads takes tiles of queries until none is left, those that see most first. One warp loads tiles of keys
and values; two groups of four warps, each with 64 queries of its own, multiply and take the softmax. While a group
takes the softmax of one tile, the tensor cores multiply the weights of its last tile with their values, or do what the
other group has asked for.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longburn.kernels.triton.hopper_tiles import GROUPS, ROWS, TILE, Law, new_ring

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-3e38)  # below every score, and finite: differences with it stay numbers
REGISTERS = gl.constexpr(240)  # of a thread that multiplies
FEW_REGISTERS = gl.constexpr(24)  # of a thread that only loads


@gluon.constexpr_function
def _products(columns):
    """How one group of warps holds ROWS x columns products."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def _load(q, k, v, before_k, before_v, queries, keys, values, law: Law):
    """The warp that loads: everything that the others will ask for, in that order."""
    i = 0
    for turn in range(law.rounds()):
        tile, b, h = law.work(turn)
        if tile >= 0:
            for group in gl.static_range(GROUPS):
                queries.load(q, [b, h, (tile * GROUPS + group) * ROWS, 0], turn * GROUPS + group)
            near, top, kept = law.visits(tile)
            for n in range(near + kept):
                slot = law.slot(n, near, top, kept)
                if law.SPLIT and slot < law.border:
                    keys.load(before_k, [b, h // law.G, slot, 0], i)
                    values.load(before_v, [b, h // law.G, slot, 0], i)
                else:
                    keys.load(k, [b, h // law.G, slot - law.border, 0], i)
                    values.load(v, [b, h // law.G, slot - law.border, 0], i)
                i += 1


@gluon.jit
def _multiply(
    out, lse, sinks, slopes, factor, queries, keys, values, staged, law: Law, group: gl.constexpr, D: gl.constexpr
):
    """One of the groups that multiply: 64 queries of every tile. `factor` brings scores to units of log 2."""
    PER_ROW: gl.constexpr = gl.SliceLayout(1, _products(TILE))
    OUTPUT: gl.constexpr = _products(D)
    i = 0
    for turn in range(law.rounds()):
        tile, b, h = law.work(turn)
        if tile >= 0:
            start = (tile * GROUPS + group) * ROWS
            t = start + gl.arange(0, ROWS, PER_ROW)
            near, top, kept = law.visits(tile)
            count = near + kept
            # Tiles 0 .. edge - 1 hold slots too late for some of the queries, those from `cut` on slots too early.
            edge = top + 1 - law.tiles_within(law.last(start) + 1)
            cut = top + 1 - law.tiles_below(law.begin(start + ROWS - 1))

            # A learned sink is a first key with the value 0.
            most = gl.full([ROWS], LOWEST, gl.float32, PER_ROW)
            total = gl.full([ROWS], 0.0, gl.float32, PER_ROW)
            if sinks is not None:
                sink = gl.load(sinks + h).to(gl.float32)
                most = gl.maximum(most, sink * LOG2E)
                total += gl.where(sink == float("-inf"), 0.0, 1.0)
            slope = None
            if slopes is not None:
                slope = gl.load(slopes + h).to(gl.float32) * LOG2E
            acc = gl.full([ROWS, D], 0.0, gl.float32, OUTPUT)

            place = turn * GROUPS + group
            queries.wait(place, True)
            q = queries.matrix(place)
            keys.wait(i, True)
            s = _scores(q, keys.matrix(i))
            s = warpgroup_mma_wait(0, deps=[s])
            keys.give_back(i)
            s = _seen(s, 0, edge, cut, t, law.slot(0, near, top, kept), law)
            p, most, total, _ = _softmax(s, most, total, factor, t, law.slot(0, near, top, kept), slope, law)
            keys.wait(i + 1, count > 1)
            for n in range(1, count):
                # The softmax of the n-th tile while the weights of the one before are multiplied with its values.
                s = _scores(q, keys.matrix(i + 1))
                acc = _weighted(p, values, i, acc)
                s = warpgroup_mma_wait(1, deps=[s])
                keys.give_back(i + 1)
                s = _seen(s, n, edge, cut, t, law.slot(n, near, top, kept), law)
                p, most, total, rescale = _softmax(s, most, total, factor, t, law.slot(n, near, top, kept), slope, law)
                # Waiting for the next keys here keeps the softmax before the wait for the products: the assembler
                # moves arithmetic across the latter, but not across a branch.
                keys.wait(i + 2, n + 1 < count)
                acc = warpgroup_mma_wait(0, deps=[acc])
                values.give_back(i)
                acc *= gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT)), 1)
                i += 1
            queries.give_back(place)
            acc = _weighted(p, values, i, acc)
            acc = warpgroup_mma_wait(0, deps=[acc])
            values.give_back(i)
            i += 1

            gl.store(lse + (b * law.H + h).to(gl.int64) * law.T + t, most * LN2 + gl.log2(total) * LN2, mask=t < law.T)
            inverse = 1.0 / gl.where(total == 0.0, 1.0, total)
            acc *= gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, OUTPUT)), 1)
            tma.store_wait(0)
            staged.index(group).reshape([ROWS, D]).store(acc.to(out.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [b, h, start, 0], staged.index(group))
    tma.store_wait(0)


@gluon.jit
def _scores(q, k):
    """The products of queries and keys, under way."""
    zero = gl.full([q.shape[0], k.shape[0]], 0.0, gl.float32, _products(k.shape[0]))
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _weighted(p, values, i, acc):
    """The sum with the values of the i-th tile, weighted by p, under way."""
    values.wait(i, True)
    p = gl.convert_layout(p.to(values.tiles.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    return warpgroup_mma(p, values.matrix(i), acc, is_async=True)


@gluon.jit
def _seen(s, n, edge, cut, t, slot, law: Law):
    """The scores of the n-th tile, minus infinity where the query does not see the slot."""
    slots = gl.expand_dims(slot + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout)), 0)
    if n < edge:
        s = gl.where(slots <= gl.expand_dims(law.last(t), 1), s, float("-inf"))
    if (law.WINDOWED or law.SPLIT) and n >= cut:
        kept = slots.to(gl.uint32) < law.kept.to(gl.uint32)  # not those before the first slot
        s = gl.where((slots >= gl.expand_dims(law.begin(t), 1)) | kept, s, float("-inf"))
    return s


@gluon.jit
def _softmax(s, most, total, factor, t, slot, slope, law: Law):
    """The weights of one tile of scores, the running maximum and total with it, and what rescales the sums so far."""
    slots = slot + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    if slope is not None:
        distance = gl.expand_dims(t + law.first, 1) - gl.expand_dims(slots, 0)
        s = s * factor - slope * gl.maximum(distance, -distance).to(gl.float32)
        factor = 1.0
    new = gl.maximum(most, gl.max(s, 1) * factor)
    p = gl.exp2(s * factor - gl.expand_dims(new, 1))
    rescale = gl.exp2(most - new)
    return p, new, total * rescale + gl.sum(p, 1), rescale


@gluon.jit(do_not_specialize=["T", "keys", "first", "rest", "lookahead", "window", "kept", "border", "H", "G", "pairs"])
def forward(
    q,
    k,
    v,
    before_k,
    before_v,
    out,
    lse,
    sinks,
    slopes,
    factor,
    T,
    keys,
    first,
    rest,
    lookahead,
    window,
    kept,
    border,
    H,
    G,
    pairs,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK: gl.constexpr,
    BOUNDED: gl.constexpr,
    WINDOWED: gl.constexpr,
):
    """q `[B, H, T, D]`, k and v `[B, K, S, D]`, out like q, as descriptors of tiles; lse `[B, H, T]`.

    The first `border` keys and values may lie in `before_k` and `before_v`; `keys` counts all.
    """
    law = Law(
        T,
        keys,
        first,
        rest,
        lookahead,
        window,
        kept,
        border,
        H,
        G,
        pairs,
        BLOCK,
        BOUNDED,
        WINDOWED,
        before_k is not None,
    )
    queries = new_ring(q, GROUPS, 1)
    keys_ring = new_ring(k, STAGES, GROUPS)
    values_ring = new_ring(v, STAGES, GROUPS)
    staged = gl.allocate_shared_memory(out.dtype, queries.tiles.shape, out.layout)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (out, lse, sinks, slopes, factor, queries, keys_ring, values_ring, staged, law, 0, D)),
            (_multiply, (out, lse, sinks, slopes, factor, queries, keys_ring, values_ring, staged, law, 1, D)),
            (_load, (q, k, v, before_k, before_v, queries, keys_ring, values_ring, law)),
        ],
        [4, 1],
        [REGISTERS, FEW_REGISTERS],
    )
