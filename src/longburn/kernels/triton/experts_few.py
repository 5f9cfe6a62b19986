"""Experts over few tokens, in Gluon: every weight that is needed is read once. How, `packed_rows` says."""

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longburn.kernels.mxfp4 import Mxfp4
from longburn.kernels.triton import interprets, overlaps
from longburn.kernels.triton.combine import combine
from longburn.kernels.triton.packed_rows import GROWN, ROWS, append, columns, sums, zeros
from longburn.kernels.triton.sort import sort

if TYPE_CHECKING:
    from longburn.kernels.experts import ExpertsCall

WARPS = 4  # that share the blocks of a row
AHEAD = 3  # pairs of loads of a thread that are under way
GROUPS = 1  # of sixteen rows, of a program; they share the tokens
WIDE, WIDER = 128, 2  # from so many choices on: groups
FEW = 256  # choices in all, up to which this is faster than tiles of more than eight
MOST_CHOICES = 8  # of a token: columns of an `mma`


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
    PDL: gl.constexpr,
):  # fmt: skip
    """GROUPS times sixteen rows of an expert times one of its choices, or (with a table) up to eight of them.

    GATED: the rows are gates and ups, y their activations in the order of pairs, and x has a row for each token; else x
    is such a y. rows: of the weight of an expert.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 4, 1], [1, WARPS, 1], [2, 1, 0])
    X: gl.constexpr = gl.BlockedLayout([1, 1, 16], [8, 4, 1], [1, WARPS, 1], [2, 1, 0])
    Y: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [WARPS, 1], [1, 0])
    # Once the first product has waited for the routing, the second may read that, and weights, beside it.
    if PDL and GATED:
        gdc_wait()
    if PDL:
        gdc_launch_dependents()
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
            lines = append(append(lines, expert * rows + upper), expert * rows + lower)
        parts = sums(x, source, words, scales, lines, L, GROUPS, not GATED, BLOCKS, AHEAD, WARPS, PDL and not GATED)
        for group in gl.static_range(GROUPS):
            row, other = _rows(first + 16 * group, rows, gl.SliceLayout(1, Y), GATED)
            above, below = columns(parts[group], Y, WARPS)
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
    K: gl.constexpr, BLOCKS: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Eight rows of one token's result. The upper and lower rows of group p are those of choices 2 p and 2 p + 1.

    Columns are choices: column 2 p counts of the upper rows of that group, column 2 p + 1 of its lower ones.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 4, 1], [1, WARPS, 1], [2, 1, 0])
    X: gl.constexpr = gl.BlockedLayout([1, 1, 16], [8, 4, 1], [1, WARPS, 1], [2, 1, 0])
    GROUPS: gl.constexpr = (K + 1) // 2
    if PDL:
        gdc_launch_dependents()
    token = gl.program_id(1)
    chosen += token * K
    weights += token * K
    g = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, X)))
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    row = gl.minimum(row, out - 1)
    lines = ()
    for i in gl.static_range(K):
        lines = append(lines, _experts(chosen + i, experts) * out + row)
    if K % 2:
        lines = append(lines, lines[K - 1])
    R: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    at = gl.program_id(0) * ROWS + gl.arange(0, ROWS, R)
    inside = at < out
    total = gl.zeros([ROWS], gl.float32, R)
    for i in gl.static_range(K):
        own_bias = gl.load(bias + _experts(chosen + i, experts) * out + at, mask=inside, other=0).to(gl.float32)
        total += gl.load(weights + i).to(gl.float32) * own_bias
    if residual is not None:
        total += gl.load(residual + token * out + at, mask=inside, other=0).to(gl.float32)
    source = token * K + gl.minimum(g, K - 1)
    parts = sums(hidden, source, words, scales, lines, L, GROUPS, True, BLOCKS, AHEAD, WARPS, PDL)
    lane = gl.arange(0, 4 * WARPS, gl.SliceLayout(1, gl.SliceLayout(0, L)))[:, None][None, :, :] % 4
    acc = zeros(L, WARPS)
    for group in gl.static_range(GROUPS):
        own = gl.load(weights + 2 * group).to(gl.float32) * parts[group][0]
        if 2 * group + 1 < K:
            own += gl.load(weights + 2 * group + 1).to(gl.float32) * parts[group][3]
        acc = gl.where(lane == group, own, acc)
    total += gl.convert_layout(gl.sum(gl.sum(acc, 2), 1), R) * GROWN
    gl.store(y + token * out + at, total.to(y.dtype.element_ty), mask=inside)


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
    x = x.clone() if x.data_ptr() % 16 else x  # it is read in words
    residual = None if call.residual is None else call.residual.contiguous()
    (n, size), (count, both), k = x.shape, call.gate_up_bias.shape, chosen.shape[1]
    units = both // 2
    hidden, y = x.new_empty(n * k, units), torch.empty_like(x)
    pdl = overlaps(x.device)
    fixed = {"AHEAD": AHEAD, "WARPS": WARPS, "PDL": pdl, "num_warps": WARPS, "launch_pdl": pdl}
    up, down = _words(call.gate_up), _words(call.down)
    groups = WIDER if n * k >= WIDE else GROUPS
    order, table, tiles = None, None, n * k
    if n > 1:
        order, _, _, table = sort(chosen, count, 8)
        tiles = len(table)
    _product[triton.cdiv(both, 16 * groups), tiles](
        *(x.view(torch.int32), chosen, order, table, *up, call.gate_up_bias, hidden),
        *(k, both, count, call.alpha, call.limit),
        GATED=True, GROUPS=groups, BLOCKS=size // 32, **fixed,
    )  # fmt: skip
    if n > 1:
        parts = x.new_empty(n * k, size)
        _product[triton.cdiv(size, 16 * groups), tiles](
            *(hidden.view(torch.int32), chosen, order, table, *down, call.down_bias, parts),
            *(k, size, count, 0.0, 0.0),
            GATED=False, GROUPS=groups, BLOCKS=units // 32, **fixed,
        )  # fmt: skip
        combine(parts, weights, residual, y)
    else:
        _down[triton.cdiv(size, 8), n](
            *(hidden.view(torch.int32), chosen, weights, *down),
            *(call.down_bias, residual, y, size, count),
            K=k, BLOCKS=units // 32, **fixed,
        )  # fmt: skip
    return y


def _words(weight: Mxfp4) -> tuple[Tensor, Tensor]:
    return weight.blocks.view(torch.int32), weight.scales
