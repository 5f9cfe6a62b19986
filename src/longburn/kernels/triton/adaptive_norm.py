"""A gated update, its sum's norm, and a shift and scale, in one pass over rows."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longburn.kernels.triton import overlaps

if TYPE_CHECKING:
    from longburn.kernels.adaptive_norm import AdaptiveNormCall


@triton.jit
def _given(part, strides, b, token, T, cols, inside):
    """The row of a token's stretch; `strides` are of batch rows and stretches, and how many of the latter."""
    at = part + b * strides[0] + token * strides[2] // T * strides[1]
    return tl.load(at + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _adaptive_norm(
    x,
    update,
    weight,
    bias,
    shift,
    scale,
    gate,
    shift_strides,
    scale_strides,
    gate_strides,
    total,
    y,
    T,
    M,
    EPS: tl.constexpr,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    b, token = (row // T).to(tl.int64), (row % T).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside, at = cols < M, row.to(tl.int64) * M + cols
    here = tl.load(x + at, mask=inside, other=0.0)
    if update is not None:
        more = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            more *= _given(gate, gate_strides, b, token, T, cols, inside)
        here = (here.to(tl.float32) + more).to(total.dtype.element_ty)
        tl.store(total + at, here, mask=inside)
    wide = here.to(tl.float32)
    if CENTERED:
        wide = tl.where(inside, wide - tl.sum(wide, 0) / M, 0.0)
    out = wide * tl.rsqrt(tl.sum(wide * wide, 0) / M + EPS)
    if weight is not None:
        out *= tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        out *= _given(scale, scale_strides, b, token, T, cols, inside)
        out += _given(shift, shift_strides, b, token, T, cols, inside)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


def adaptive_norm(call: "AdaptiveNormCall") -> tuple[Tensor, Tensor]:
    """The Impl `triton` of the operation `adaptive_norm`."""
    x, update = call.x.contiguous(), None if call.update is None else call.update.contiguous()
    y, total = torch.empty_like(x), call.x if update is None else torch.empty_like(x)
    if x.numel():
        B, T, M = x.shape
        block = triton.next_power_of_2(M)
        parts = (call.shift, call.scale, call.gate)
        pdl = overlaps(x.device)
        _adaptive_norm[(B * T,)](
            *(x, update, call.weight, call.bias, *parts, *map(_strides, parts), total, y, T, M),
            EPS=float(call.eps),
            CENTERED=call.centered,
            BLOCK=block,
            PDL=pdl,
            launch_pdl=pdl,
            num_warps=min(max(block // 512, 1), 16),
        )
    return y, total


def _strides(part: Tensor | None) -> tuple[int, int, int]:
    if part is None:
        return 0, 0, 1
    return 0 if part.shape[0] == 1 else part.stride(0), part.stride(1), part.shape[1]
