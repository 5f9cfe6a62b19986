"""Experts over few tokens, in Gluon: every weight that is needed is read once, straight to the tensor cores' registers.

One `mma` multiplies 16 rows of weights with 8 columns of tokens. Which 16 of a row's values it sums is free as long as
both sides agree, so each thread takes what 16 bytes hold: one block of 32 values in each of two rows, with the scale
of each. Lane 4 g + t thus loads block t of rows g and holds, of the sums, columns 2 t and 2 t + 1 of rows g: `c0` and
`c1` of the first eight rows (upper), `c2` and `c3` of the last (lower). Warps share the blocks of a row.

What these kernels wait for, beside memory, is the unpacking. A number of four bits becomes a bf16 by two masks and a
multiplication; the bf16 is the number times 2^-126, so one more product, with the block's scale and 2^62, leaves it
times 2^-64, and the sums are multiplied by 2^64. This holds scale bytes to 192 (weights to 2^67), and weights below
2^-62 lose digits.
"""

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from longburn.kernels.mxfp4 import Mxfp4
from longburn.kernels.triton import interprets
from longburn.kernels.triton.combine import combine
from longburn.kernels.triton.sort import sort

if TYPE_CHECKING:
    from longburn.kernels.experts import ExpertsCall

ROWS = gl.constexpr(8)  # of weights, of each of the two halves of an `mma`
ONCE = gl.constexpr(".cg")  # weights are used once: they must not push tokens out of the first cache
WORDS = gl.constexpr(4)  # of eight values, in a block
WARPS = 4  # that share the blocks of a row
AHEAD = 6  # pairs of loads of a thread that are under way
GROUPS = 2  # of sixteen rows, of a program: they share the tokens
FEW = 128  # choices in all, up to which a tile of eight holds most of what one expert gets
MOST_CHOICES = 8  # of a token: columns of an `mma`


def _unpack(word: str, scale: str, to: str) -> str:
    """PTX: eight numbers of four bits to the pairs (0, 4), (1, 5), (2, 6) and (3, 7) of bf16; see `mxfp4.UNPACK`."""
    lines = [f"shr.u32 u, {word}, 8;"]
    for pair, (source, mask, factor) in enumerate(
        [(word, "0x000F000F", 4160), (word, "0x00F000F0", 260), ("u", "0x000F000F", 4160), ("u", "0x00F000F0", 260)]
    ):
        name = f"{to}{pair}"
        lines += [
            f"and.b32 {name}, {source}, {mask};",
            f"mul.lo.u32 {name}, {name}, {factor};",
            f"and.b32 {name}, {name}, 0x81C081C0;",
            f"fma.rn.bf16x2 {name}, {name}, {scale}, none;",
        ]
    return "\n".join(lines)


def _mma(c: list[str], a: list[str], b: list[str]) -> str:
    return (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {s0, s1, s2, s3}, "
        f"{{{', '.join(a)}}}, {{{', '.join(b)}}}, {{{', '.join(c)}}};"
    )


# $0 .. $3: the sums after; $4, $5: a word of the upper and of the lower rows; $6, $7: their scales, twice in 32 bits;
# $8 .. $11: tokens, in pairs as of the weights; $12 .. $15: the sums before.
MULTIPLY = gl.constexpr(
    "\n".join(
        [
            "{",
            ".reg .b32 u, none, p0, p1, p2, p3, q0, q1, q2, q3;",
            ".reg .f32 s0, s1, s2, s3;",
            "mov.b32 none, 0x80008000;",
            _unpack("$4", "$6", "p"),
            _unpack("$5", "$7", "q"),
            _mma(["$12", "$13", "$14", "$15"], ["p0", "q0", "p1", "q1"], ["$8", "$9"]),
            _mma(["s0", "s1", "s2", "s3"], ["p2", "q2", "p3", "q3"], ["$10", "$11"]),
            *(f"mov.f32 ${i}, s{i};" for i in range(4)),
            "}",
        ]
    )
)


@gluon.jit
def _pairs(first, second, SELECT: gl.constexpr):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, " + SELECT + ";", "=r,r,r", [first, second], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _load(at, shift, block, first: gl.constexpr, BLOCKS: gl.constexpr, CACHE: gl.constexpr):
    """What lies `shift` behind `at`; nothing where the blocks, `first` behind `block`, are beyond those of a row."""
    if first + block.shape[1] <= BLOCKS:
        values = gl.load(at + shift, cache_modifier=CACHE)
    else:
        values = gl.load(at + shift, mask=block < BLOCKS - first, other=0, cache_modifier=CACHE)
    return values


@gluon.jit
def _tokens(
    x,
    row,
    first: gl.constexpr,
    BLOCKS: gl.constexpr,
    L: gl.constexpr,
    X: gl.constexpr,
    WARPS: gl.constexpr,
    PAIRED: gl.constexpr,
):
    """Blocks of 32 values of rows of bf16 (given as words of 32 bits): the four pairs of each eight values.

    PAIRED: the values lie in the order of pairs already.
    """
    block = gl.arange(0, 4 * WARPS, gl.SliceLayout(1, gl.SliceLayout(0, X)))[:, None][None, :, :]
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(0, X)))[None, :][None, :, :]
    at = x + (row[:, None][:, :, None] * (16 * BLOCKS) + block * 16 + column)
    values = _load(at, first * 16, block, first, BLOCKS, "")
    even, odd = gl.split(gl.reshape(values, [ROWS, 4 * WARPS, WORDS, 2, 2]))
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    w0, w1 = gl.convert_layout(w0, L, assert_trivial=True), gl.convert_layout(w1, L, assert_trivial=True)
    w2, w3 = gl.convert_layout(w2, L, assert_trivial=True), gl.convert_layout(w3, L, assert_trivial=True)
    if PAIRED:
        pairs = (w0, w1, w2, w3)
    else:
        pairs = (
            _pairs(w0, w2, "0x5410"),
            _pairs(w0, w2, "0x7632"),
            _pairs(w1, w3, "0x5410"),
            _pairs(w1, w3, "0x7632"),
        )
    return pairs


@gluon.jit
def _weights(words, scales, row, first: gl.constexpr, BLOCKS: gl.constexpr, L: gl.constexpr, WARPS: gl.constexpr):
    """Blocks of rows: their words and their scale bytes."""
    block = gl.arange(0, 4 * WARPS, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :]
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(0, L)))[None, :][None, :, :]
    at = row[:, None] * BLOCKS + block
    values = _load(words + (at[:, :, None] * WORDS + word), first * WORDS, block[:, :, None], first, BLOCKS, ONCE)
    return values, _load(scales + at, first, block, first, BLOCKS, "")


@gluon.jit
def _factor(scale, like):
    """2^62 times what scale bytes stand for, as two bf16 in 32 bits, for each word of their blocks."""
    bits = (gl.minimum(scale.to(gl.int32), 192) + 62) << 7
    bits = gl.where(scale == 255, 0x7FC0, bits)
    return gl.broadcast((bits * 0x10001)[:, :, None], like)[0]


@gluon.jit
def _multiply(sums, first, second, tokens):
    """The sums of two groups of rows, after this step."""
    w, w_scale = first
    v, v_scale = second
    x0, x1, x2, x3 = tokens
    c0, c1, c2, c3 = sums
    return gl.inline_asm_elementwise(
        MULTIPLY,
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f",
        [w, v, _factor(w_scale, w), _factor(v_scale, v), x0, x1, x2, x3, c0, c1, c2, c3],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _append(values, value):
    return values + (value,)  # noqa: RUF005 (the compiler knows no other way)


@gluon.jit
def _zeros(L: gl.constexpr, WARPS: gl.constexpr):
    return gl.zeros([ROWS, 4 * WARPS, WORDS], gl.float32, L)


@gluon.jit
def _sums(
    x, source, words, scales, rows, L: gl.constexpr, GROUPS: gl.constexpr, PAIRED: gl.constexpr,
    BLOCKS: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Each thread's part of the sums of GROUPS times sixteen rows of weights with the eight rows `source` of x.

    rows: the upper and the lower eight rows of each group. AHEAD: loads that are under way before the first is used.
    """
    X: gl.constexpr = gl.BlockedLayout([1, 1, 16], [8, 4, 1], [1, WARPS, 1], [2, 1, 0])
    STEPS: gl.constexpr = (BLOCKS + 4 * WARPS - 1) // (4 * WARPS)
    sums, ahead = (), ()
    for _ in gl.static_range(GROUPS):
        sums = _append(sums, (_zeros(L, WARPS), _zeros(L, WARPS), _zeros(L, WARPS), _zeros(L, WARPS)))
    for i in gl.static_range(min(AHEAD, STEPS * GROUPS)):
        for half in gl.static_range(2):
            line = rows[i % GROUPS * 2 + half]
            ahead = _append(ahead, _weights(words, scales, line, i // GROUPS * 4 * WARPS, BLOCKS, L, WARPS))
    gl.thread_barrier()  # which loads are not moved across: all these are under way before one is waited for
    for i in gl.static_range(STEPS * GROUPS):
        if i % GROUPS == 0:
            tokens = _tokens(x, source, i // GROUPS * 4 * WARPS, BLOCKS, L, X, WARPS, PAIRED)
        sums = _append(sums, _multiply(sums[i], ahead[2 * i], ahead[2 * i + 1], tokens))
        if i + AHEAD < STEPS * GROUPS:
            for half in gl.static_range(2):
                line = rows[(i + AHEAD) % GROUPS * 2 + half]
                ahead = _append(
                    ahead, _weights(words, scales, line, (i + AHEAD) // GROUPS * 4 * WARPS, BLOCKS, L, WARPS)
                )
    last = ()
    for i in gl.static_range(GROUPS):
        last = _append(last, sums[STEPS * GROUPS + i])
    return last


@gluon.jit
def _columns(sums, Y: gl.constexpr, WARPS: gl.constexpr):
    """`[rows, columns]` of the upper and of the lower rows: sums over words, and over the warps that share a row."""
    upper = gl.join(gl.sum(sums[0], 2), gl.sum(sums[1], 2))
    lower = gl.join(gl.sum(sums[2], 2), gl.sum(sums[3], 2))
    parts = gl.reshape(gl.join(upper, lower), [ROWS, WARPS, 4, 2, 2])
    upper, lower = gl.split(gl.sum(parts, 1))  # each [rows, t, 2]
    upper = gl.convert_layout(gl.reshape(upper, [ROWS, ROWS]), Y)
    lower = gl.convert_layout(gl.reshape(lower, [ROWS, ROWS]), Y)
    return upper * 18446744073709551616.0, lower * 18446744073709551616.0  # 2^64, as above


@gluon.jit
def _experts(chosen, count):
    """The numbers of experts, held to those there are."""
    return gl.minimum(gl.maximum(gl.load(chosen), 0), count - 1).to(gl.int32)


@gluon.jit
def _rows(first, rows, S: gl.constexpr, GATED: gl.constexpr):
    """The upper and the lower rows of sixteen from `first` on: those of even and odd number, or the first and last."""
    if GATED:
        upper = first + 2 * gl.arange(0, ROWS, S)
        lower = upper + 1
    else:
        upper = first + gl.arange(0, ROWS, S)
        lower = upper + ROWS
    return gl.minimum(upper, rows - 1), gl.minimum(lower, rows - 1)


@gluon.jit
def _place(unit):
    """Where a value lies in a row whose values are paired as `_tokens` pairs them."""
    return unit // 8 * 8 + unit % 4 * 2 + unit % 8 // 4


@gluon.jit
def _product(
    x, chosen, order, table, words, scales, bias, y, k, rows, experts, alpha, limit,
    GATED: gl.constexpr, GROUPS: gl.constexpr, BLOCKS: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """GROUPS times sixteen rows of an expert times one of its choices, or (with a table) up to eight of them.

    GATED: the rows are gates and ups, y their activations in the order of pairs, and x has a row for each token; else x
    is such a y. rows: of the weight of an expert.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 4, 1], [1, WARPS, 1], [2, 1, 0])
    X: gl.constexpr = gl.BlockedLayout([1, 1, 16], [8, 4, 1], [1, WARPS, 1], [2, 1, 0])
    Y: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [WARPS, 1], [1, 0])
    first, at = gl.program_id(0) * (2 * ROWS * GROUPS), gl.program_id(1)
    g = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, X)))
    column = gl.arange(0, ROWS, gl.SliceLayout(0, Y))
    if table is None:
        expert = _experts(chosen + at, experts)
        source = g * 0 + at
        there, choice = column == 0, column * 0 + at
    else:
        expert, start, end = gl.load(table + 3 * at), gl.load(table + 3 * at + 1), gl.load(table + 3 * at + 2)
        source = gl.load(order + gl.maximum(gl.minimum(start + g, end - 1), 0))
        there = start + column < end
        choice = gl.load(order + start + column, mask=there, other=0)
    if expert >= 0:
        if GATED:
            source = source // k
        lines = ()
        for group in gl.static_range(GROUPS):
            upper, lower = _rows(first + 16 * group, rows, gl.SliceLayout(1, gl.SliceLayout(2, L)), GATED)
            lines = _append(_append(lines, expert * rows + upper), expert * rows + lower)
        sums = _sums(x, source, words, scales, lines, L, GROUPS, not GATED, BLOCKS, AHEAD, WARPS)
        for group in gl.static_range(GROUPS):
            row, other = _rows(first + 16 * group, rows, gl.SliceLayout(1, Y), GATED)
            above, below = _columns(sums[group], Y, WARPS)
            above += gl.load(bias + expert * rows + row).to(gl.float32)[:, None]
            below += gl.load(bias + expert * rows + other).to(gl.float32)[:, None]
            to = first + 16 * group + gl.arange(0, ROWS, gl.SliceLayout(1, Y))
            if GATED:
                # Comparing leaves a NaN what it is.
                gate = gl.where(above > limit, limit, above)
                up = gl.where(below > limit, limit, gl.where(below < -limit, -limit, below))
                act = gate / (1 + gl.exp(-alpha * gate)) * (up + 1)
                unit = first // 2 + 8 * group + gl.arange(0, ROWS, gl.SliceLayout(1, Y))
                line = y + choice[None, :] * (rows // 2) + _place(unit)[:, None]
                gl.store(line, act.to(y.dtype.element_ty), mask=(unit < rows // 2)[:, None] & there[None, :])
            else:
                line = y + choice[None, :] * rows + to[:, None]
                gl.store(line, above.to(y.dtype.element_ty), mask=(to < rows)[:, None] & there[None, :])
                mask = (to + ROWS < rows)[:, None] & there[None, :]
                gl.store(line + ROWS, below.to(y.dtype.element_ty), mask=mask)


@gluon.jit
def _down(
    hidden, chosen, weights, words, scales, bias, residual, y, out, experts,
    K: gl.constexpr, BLOCKS: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Eight rows of one token's result. The upper and lower rows of group p are those of choices 2 p and 2 p + 1.

    Columns are choices: column 2 p counts of the upper rows of that group, column 2 p + 1 of its lower ones.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 4, 1], [1, WARPS, 1], [2, 1, 0])
    X: gl.constexpr = gl.BlockedLayout([1, 1, 16], [8, 4, 1], [1, WARPS, 1], [2, 1, 0])
    GROUPS: gl.constexpr = (K + 1) // 2
    token = gl.program_id(1)
    chosen += token * K
    weights += token * K
    g = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, X)))
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    row = gl.minimum(row, out - 1)
    lines = ()
    for i in gl.static_range(K):
        lines = _append(lines, _experts(chosen + i, experts) * out + row)
    if K % 2:
        lines = _append(lines, lines[K - 1])
    source = token * K + gl.minimum(g, K - 1)
    sums = _sums(hidden, source, words, scales, lines, L, GROUPS, True, BLOCKS, AHEAD, WARPS)
    lane = gl.arange(0, 4 * WARPS, gl.SliceLayout(1, gl.SliceLayout(0, L)))[:, None][None, :, :] % 4
    acc = _zeros(L, WARPS)
    for group in gl.static_range(GROUPS):
        own = gl.load(weights + 2 * group).to(gl.float32) * sums[group][0]
        if 2 * group + 1 < K:
            own += gl.load(weights + 2 * group + 1).to(gl.float32) * sums[group][3]
        acc = gl.where(lane == group, own, acc)
    R: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, R)
    inside = row < out
    total = gl.convert_layout(gl.sum(gl.sum(acc, 2), 1), R) * 18446744073709551616.0
    for i in gl.static_range(K):
        own_bias = gl.load(bias + _experts(chosen + i, experts) * out + row, mask=inside, other=0).to(gl.float32)
        total += gl.load(weights + i).to(gl.float32) * own_bias
    if residual is not None:
        total += gl.load(residual + token * out + row, mask=inside, other=0).to(gl.float32)
    gl.store(y + token * out + row, total.to(y.dtype.element_ty), mask=inside)


def why_not(call: "ExpertsCall") -> str | None:
    """Why these kernels do not compute this call."""
    if not isinstance(call.gate_up, Mxfp4) or not isinstance(call.down, Mxfp4):
        return "needs packed weights"
    if call.x.dtype != torch.bfloat16:
        return f"needs bf16, got {call.x.dtype}"
    if interprets():
        return "cannot be interpreted"
    if call.chosen.numel() > FEW:
        return f"takes {FEW} choices at most, got {call.chosen.numel()}"
    if call.chosen.shape[1] > MOST_CHOICES:
        return f"takes {MOST_CHOICES} choices of a token at most, got {call.chosen.shape[1]}"
    if any(weight.blocks.data_ptr() % 16 for weight in (call.gate_up, call.down)):
        return "a weight does not begin at a multiple of 16 bytes"
    return None


def experts_few(call: "ExpertsCall") -> Tensor:
    """Every choice by itself."""
    assert isinstance(call.gate_up, Mxfp4)
    assert isinstance(call.down, Mxfp4)
    x, chosen, weights = call.x.contiguous(), call.chosen.contiguous(), call.weights.contiguous()
    residual = None if call.residual is None else call.residual.contiguous()
    (n, size), (count, both), k = x.shape, call.gate_up_bias.shape, chosen.shape[1]
    units = both // 2
    hidden, y = x.new_empty(n * k, units), torch.empty_like(x)
    up, down = _words(call.gate_up), _words(call.down)
    order, table, tiles = None, None, n * k
    if n > 1:
        order, _, _, table = sort(chosen, count, 8)
        tiles = len(table)
    _product[triton.cdiv(both, 16 * GROUPS), tiles](
        *(x.view(torch.int32), chosen, order, table, *up, call.gate_up_bias, hidden),
        *(k, both, count, call.alpha, call.limit),
        GATED=True, GROUPS=GROUPS, BLOCKS=size // 32, AHEAD=AHEAD, WARPS=WARPS, num_warps=WARPS,
    )  # fmt: skip
    if n > 1:
        parts = x.new_empty(n * k, size)
        _product[triton.cdiv(size, 16 * GROUPS), tiles](
            *(hidden.view(torch.int32), chosen, order, table, *down, call.down_bias, parts),
            *(k, size, count, 0.0, 0.0),
            GATED=False, GROUPS=GROUPS, BLOCKS=units // 32, AHEAD=AHEAD, WARPS=WARPS, num_warps=WARPS,
        )  # fmt: skip
        combine(parts, weights, residual, y)
    else:
        _down[triton.cdiv(size, 8), n](
            *(hidden.view(torch.int32), chosen, weights, *down),
            *(call.down_bias, residual, y, size, count),
            K=k, BLOCKS=units // 32, AHEAD=AHEAD, WARPS=WARPS, num_warps=WARPS,
        )  # fmt: skip
    return y


def _words(weight: Mxfp4) -> tuple[Tensor, Tensor]:
    return weight.blocks.view(torch.int32), weight.scales
