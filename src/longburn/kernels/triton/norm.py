"""Root-mean-square normalisation and the gated activation: one pass over rows."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longburn.kernels.triton import overlaps

if TYPE_CHECKING:
    from longburn.kernels.norm import NormCall

GATED_BLOCK = 1024
FEW_ROWS = 1024
ELEMENTS = 2048  # of the rows that one program takes together


@triton.jit
def _rms_norm(
    x,
    weight,
    y,
    rows,
    size,
    stride,  # from row to row of x
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (cols < size)
    w = tl.load(weight + cols, mask=cols < size, other=0.0)
    if PDL:
        gdc_wait()
    wide = tl.load(x + row * stride + cols, mask=inside, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 1) / size + EPS)[:, None]
    if ROUND_LAST:
        normed = normed * w.to(tl.float32)
    else:
        normed = normed.to(y.dtype.element_ty).to(tl.float32) * w.to(tl.float32)
    tl.store(y + row * size + cols, normed.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated(x, y, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < hidden
    gate = tl.load(x + 2 * row * hidden + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + (2 * row + 1) * hidden + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * hidden + cols, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)


def rms_norm(call: "NormCall") -> Tensor:
    """The Impl `triton` of the operation `rms_norm`."""
    size = call.x.shape[-1]
    y = torch.empty(call.x.shape, dtype=call.x.dtype, device=call.x.device)
    if y.numel():
        x = call.x.reshape(-1, size)  # a view, where all rows stand at one distance
        rows, block = x.shape[0], triton.next_power_of_2(size)
        together = rows_of_a_program(rows, block)
        pdl = overlaps(x.device)
        flags = {"EPS": float(call.eps), "ROWS": together, "BLOCK": block, "ROUND_LAST": call.round_last}
        warps = min(max(together * block // 512, 1), 16)
        grid = (triton.cdiv(rows, together),)
        _rms_norm[grid](x, call.weight, y, rows, size, x.stride(0), **flags, PDL=pdl, launch_pdl=pdl, num_warps=warps)
    return y


def rows_of_a_program(rows: int, block: int) -> int:
    """How many rows of up to `block` channels one program normalises: few rows are spread over all multiprocessors."""
    return 1 if rows <= FEW_ROWS else max(1, ELEMENTS // block)


def gated(gate_up: Tensor) -> Tensor:
    """The Impl `triton` of the operation `gated`; gate_up is contiguous."""
    *rows, both = gate_up.shape
    y = torch.empty(*rows, both // 2, dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        grid = (gate_up.numel() // both, triton.cdiv(both // 2, GATED_BLOCK))
        _gated[grid](gate_up, y, both // 2, BLOCK=GATED_BLOCK)
    return y
