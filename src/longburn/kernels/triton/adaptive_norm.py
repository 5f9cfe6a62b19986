"""A gated update, its sum's norm, and a shift and scale, in one pass over rows."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from longburn.kernels.adaptive_norm import AdaptiveNormCall


@triton.jit
def _of_group(part, group, stride, cols, inside):
    return tl.load(part + group * stride + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _adaptive_norm(
    x,
    update,
    weight,
    bias,
    shift,
    scale,
    gate,
    strides,  # of shift, scale and gate
    shares,  # rows to one of shift and scale, and of gate
    total,
    y,
    size,
    EPS: tl.constexpr,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside, at = cols < size, row * size + cols
    here = tl.load(x + at, mask=inside, other=0.0)
    if update is not None:
        more = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            more *= _of_group(gate, row // shares[1], strides[2], cols, inside)
        here = (here.to(tl.float32) + more).to(total.dtype.element_ty)
        tl.store(total + at, here, mask=inside)
    wide = here.to(tl.float32)
    if CENTERED:
        wide = tl.where(inside, wide - tl.sum(wide, 0) / size, 0.0)
    out = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + EPS)
    if weight is not None:
        out *= tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        group = row // shares[0]
        out = out * _of_group(scale, group, strides[1], cols, inside) + _of_group(
            shift, group, strides[0], cols, inside
        )
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


def adaptive_norm(call: "AdaptiveNormCall") -> tuple[Tensor, Tensor]:
    """The Impl `triton` of the operation `adaptive_norm`."""
    x, update = call.x.contiguous(), None if call.update is None else call.update.contiguous()
    y, total = torch.empty_like(x), x if update is None else torch.empty_like(x)
    if x.numel():
        size = x.shape[-1]
        rows, block = x.numel() // size, triton.next_power_of_2(size)
        parts = (call.shift, call.scale, call.gate)
        strides = tuple(0 if part is None else part.stride(0) for part in parts)
        shares = tuple(rows if part is None else rows // part.shape[0] for part in (call.scale, call.gate))
        _adaptive_norm[(rows,)](
            *(x, update, call.weight, call.bias, *parts, strides, shares, total, y, size),
            EPS=float(call.eps),
            CENTERED=call.centered,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
        )
    return y, total if update is not None else call.x
