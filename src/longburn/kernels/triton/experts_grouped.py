"""Experts over many tokens: choices sorted by expert, then two products of tiles of one expert and its tokens.

Tiles are transposed, `[rows of the weight, tokens]`: packed weights then go through registers to the tensor cores,
whose other operand alone must lie in shared memory, and few tokens leave no row of a tile empty. The host knows how
many tiles there are at most; which expert a tile belongs to, and whether there is one, it leaves to the device.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longburn.kernels.mxfp4 import Mxfp4, dequantize
from longburn.kernels.triton.combine import combine, swiglu
from longburn.kernels.triton.mxfp4 import BYTES, is_fast, operand_type, unpack
from longburn.kernels.triton.sort import sort

if TYPE_CHECKING:
    from longburn.kernels.experts import ExpertsCall

SPLIT = 256  # pairs of columns of a program
UNPACK_FROM = 256  # choices for each expert there is, from which on weights are unpacked before and not in the products


@triton.jit
def _split(x, y, size, BLOCK: tl.constexpr):
    """A row with its even columns first, then the odd ones."""
    row, half = tl.program_id(0).to(tl.int64) * size, size // 2
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    both = tl.arange(0, 2)
    values = tl.load(x + row + 2 * pair[:, None] + both[None], mask=(pair < half)[:, None], other=0)
    even, odd = tl.split(values)
    tl.store(y + row + pair, even, mask=pair < half)
    tl.store(y + row + half + pair, odd, mask=pair < half)


@triton.jit
def _rows(x, row, column, stride, size, EVEN: tl.constexpr):
    """`[rows, columns]`, of rows that are `stride` apart and have `size` columns. EVEN: none ends within a tile."""
    at = x + row[:, None] * stride + column[None]
    return tl.load(at) if EVEN else tl.load(at, mask=(column < size)[None], other=0)


@triton.jit
def _scales(scales, row, first, size, BLOCKS: tl.constexpr):
    """The scale bytes of BLOCKS blocks from byte `first` of rows of `size` bytes on; a 0 if there are none."""
    if scales is None:
        found = 0
    else:
        block = first // BYTES + tl.arange(0, BLOCKS)
        inside = (block < size // BYTES)[None]
        found = tl.load(scales + row[:, None] * (size // BYTES) + block[None], mask=inside, other=0)
    return found


@triton.jit
def _add(acc, values, scales, scale, even, odd, TYPE: tl.constexpr, FAST: tl.constexpr):
    """acc + values x, of TYPE. Of packed values the even ones multiply `even` and the odd ones `odd`."""
    PRECISION: tl.constexpr = "ieee" if tl.float32 == TYPE else None
    if scales is None:
        acc = tl.dot(values.to(TYPE), even.to(TYPE).T, acc, input_precision=PRECISION)
    else:
        first, second = unpack(values, scale, TYPE, FAST)
        acc = tl.dot(first, even.to(TYPE).T, acc, input_precision=PRECISION)
        acc = tl.dot(second, odd.to(TYPE).T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _up(
    x, order, table, weight, scales, bias, hidden, k, size, units, alpha, limit,
    UNITS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    SPLIT: tl.constexpr, TYPE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The activations of a tile of choices: two products, with the even rows (gate) and the odd ones (up).

    size: of a row of the weight, in values or, packed, in bytes; x then has its even columns first. SPLIT: so will
    `hidden`, whose rows are in the order of experts.
    """
    tile = table + 3 * tl.program_id(1)
    expert = tl.load(tile)
    if expert >= 0:
        place, end = tl.load(tile + 1) + tl.arange(0, TOKENS), tl.load(tile + 2)
        token = (tl.load(order + place, mask=place < end, other=0) // k).to(tl.int64)
        unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
        gate_row = (expert * units + tl.minimum(unit, units - 1)).to(tl.int64) * 2
        up_row = gate_row + 1
        BLOCKS: tl.constexpr = COLUMNS // BYTES
        stride = size if scales is None else 2 * size
        gate = tl.zeros((UNITS, TOKENS), tl.float32)
        up = tl.zeros((UNITS, TOKENS), tl.float32)
        # Scales are too few to be read ahead by the compiler: they are loaded one step before they are used.
        gate_scale = _scales(scales, gate_row, 0, size, BLOCKS)
        up_scale = _scales(scales, up_row, 0, size, BLOCKS)
        for first in range(0, size, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            even = _rows(x, token, column, stride, size, EVEN)
            odd = even if scales is None else _rows(x + size, token, column, stride, size, EVEN)
            gate_next = _scales(scales, gate_row, first + COLUMNS, size, BLOCKS)
            up_next = _scales(scales, up_row, first + COLUMNS, size, BLOCKS)
            values = _rows(weight, gate_row, column, size, size, EVEN)
            gate = _add(gate, values, scales, gate_scale, even, odd, TYPE, FAST)
            values = _rows(weight, up_row, column, size, size, EVEN)
            up = _add(up, values, scales, up_scale, even, odd, TYPE, FAST)
            gate_scale = gate_next
            up_scale = up_next
        exists = unit < units
        gate += tl.load(bias + gate_row, mask=exists, other=0).to(tl.float32)[:, None]
        up += tl.load(bias + up_row, mask=exists, other=0).to(tl.float32)[:, None]
        act = swiglu(gate, up, alpha, limit).to(hidden.dtype.element_ty).T
        to = hidden + place.to(tl.int64)[:, None] * units
        there = (place < end)[:, None]
        if SPLIT:
            both = tl.reshape(act, TOKENS, UNITS // 2, 2)
            first_half, second_half = tl.split(both)
            pair = tl.program_id(0) * (UNITS // 2) + tl.arange(0, UNITS // 2)
            mask = there & (pair < units // 2)[None]
            tl.store(to + pair[None], first_half, mask=mask)
            tl.store(to + units // 2 + pair[None], second_half, mask=mask)
        else:
            tl.store(to + unit[None], act, mask=there & exists[None])


@triton.jit
def _down(
    hidden, order, table, weight, scales, bias, parts, size, out,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    TYPE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What a tile of choices gives, with its bias; to rows in the order of tokens and their choices."""
    tile = table + 3 * tl.program_id(1)
    expert = tl.load(tile)
    if expert >= 0:
        place, end = tl.load(tile + 1) + tl.arange(0, TOKENS), tl.load(tile + 2)
        there = place < end
        choice = tl.load(order + place, mask=there, other=0)
        from_row = tl.minimum(place, end - 1).to(tl.int64)
        column_out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row = (expert * out + tl.minimum(column_out, out - 1)).to(tl.int64)
        BLOCKS: tl.constexpr = COLUMNS // BYTES
        stride = size if scales is None else 2 * size
        acc = tl.zeros((ROWS, TOKENS), tl.float32)
        scale = _scales(scales, row, 0, size, BLOCKS)
        for first in range(0, size, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            even = _rows(hidden, from_row, column, stride, size, EVEN)
            odd = even if scales is None else _rows(hidden + size, from_row, column, stride, size, EVEN)
            following = _scales(scales, row, first + COLUMNS, size, BLOCKS)
            values = _rows(weight, row, column, size, size, EVEN)
            acc = _add(acc, values, scales, scale, even, odd, TYPE, FAST)
            scale = following
        exists = column_out < out
        acc += tl.load(bias + row, mask=exists, other=0).to(tl.float32)[:, None]
        to = parts + choice.to(tl.int64)[:, None] * out + column_out[None]
        tl.store(to, acc.to(parts.dtype.element_ty).T, mask=there[:, None] & exists[None])


class Tiles(NamedTuple):
    """Shapes of tiles: rows of a weight, tokens, and columns in a step (values, or bytes of packed weights)."""

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int


def _tiles(choices: int, experts: int, packed: bool, wide: bool) -> Tiles:
    """Tiles for so many choices. wide: of four bytes a value."""
    tokens = min(max(triton.next_power_of_2(triton.cdiv(choices, experts)), 16), 128)
    if wide:
        return Tiles(64, min(tokens, 32), 32, 4, 2)
    if packed:
        return Tiles(128, tokens, 64, 4 if tokens < 128 else 8, 3)
    return Tiles(256, tokens, 64, 8, 3) if tokens == 128 else Tiles(128, tokens, 64, 4, 4)


def _unpacked(weight: Tensor | Mxfp4, dtype: torch.dtype) -> Tensor | Mxfp4:
    return dequantize(weight, dtype) if isinstance(weight, Mxfp4) else weight


def experts_grouped(call: "ExpertsCall", tiles: Tiles | None = None) -> Tensor:
    """All choices, sorted by expert. tiles: other than those that the sizes ask for."""
    x, chosen, weights = call.x.contiguous(), call.chosen.contiguous(), call.weights.contiguous()
    residual = None if call.residual is None else call.residual.contiguous()
    (n, size), (experts, both), total = x.shape, call.gate_up_bias.shape, chosen.numel()
    gate_up, down = call.gate_up, call.down
    if total >= UNPACK_FROM * experts:
        gate_up, down = _unpacked(gate_up, x.dtype), _unpacked(down, x.dtype)
    packed = isinstance(gate_up, Mxfp4) or isinstance(down, Mxfp4)
    tiles = tiles or _tiles(total, experts, packed, x.dtype == torch.float32)
    order, _, _, table = sort(chosen, experts, tiles.tokens)
    fixed = {
        "TOKENS": tiles.tokens, "COLUMNS": tiles.columns, "FAST": is_fast(x.dtype),
        "TYPE": operand_type(x.dtype),
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    wide = isinstance(gate_up, Mxfp4)
    if wide:
        flat, x = x, torch.empty_like(x)
        _split[n, triton.cdiv(size // 2, SPLIT)](flat, x, size, BLOCK=SPLIT, num_warps=4)
    hidden, width = x.new_empty(total, both // 2), size // 2 if wide else size
    _up[triton.cdiv(both, tiles.rows), len(table)](
        *(x, order, table, *_parts(gate_up), call.gate_up_bias, hidden),
        *(chosen.shape[1], width, both // 2, call.alpha, call.limit),
        UNITS=tiles.rows // 2, EVEN=width % tiles.columns == 0, SPLIT=isinstance(down, Mxfp4), **fixed,
    )  # fmt: skip
    parts, width = x.new_empty(total, size), both // 4 if isinstance(down, Mxfp4) else both // 2
    _down[triton.cdiv(size, tiles.rows), len(table)](
        *(hidden, order, table, *_parts(down), call.down_bias, parts, width, size),
        ROWS=tiles.rows, EVEN=width % tiles.columns == 0, **fixed,
    )  # fmt: skip
    y = torch.empty_like(x)
    combine(parts, weights, residual, y)
    return y


def _parts(weight: Tensor | Mxfp4) -> tuple[Tensor, Tensor | None]:
    return (weight.blocks, weight.scales) if isinstance(weight, Mxfp4) else (weight, None)
