"""Layer normalisation with a scale and shift from outside, and the gated sum before it: one pass over rows."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longburn.kernels.triton import overlaps

if TYPE_CHECKING:
    from longburn.kernels.adaptive import AdaptiveNormCall


@triton.jit
def _given(row, strides, b, token, T, cols, inside):
    """The row of a token's stretch; `strides` are of batch rows and stretches, and how many of the latter."""
    at = row + b * strides[0] + token * strides[2] // T * strides[1]
    return tl.load(at + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _adaptive_norm(
    x,
    branch,
    gate,
    scale,
    shift,
    total,
    y,
    gate_strides,
    scale_strides,
    shift_strides,
    T,
    M,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    b, token = (row // T).to(tl.int64), (row % T).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < M
    at = row.to(tl.int64) * M + cols
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            added *= _given(gate, gate_strides, b, token, T, cols, inside)
        rounded = (wide + added).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    wide = tl.where(inside, wide - tl.sum(wide, 0) / M, 0.0)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / M + EPS)
    normed = normed * _given(scale, scale_strides, b, token, T, cols, inside)
    normed += _given(shift, shift_strides, b, token, T, cols, inside)
    tl.store(y + at, normed.to(y.dtype.element_ty), mask=inside)


def adaptive_norm(call: "AdaptiveNormCall") -> tuple[Tensor, Tensor]:
    """The Impl `triton` of the operation `adaptive_norm`."""
    x, (B, T, M) = call.x, call.x.shape
    y, total = torch.empty_like(x), x if call.branch is None else torch.empty_like(x)
    if x.numel():
        block = triton.next_power_of_2(M)
        pdl = overlaps(x.device)
        _adaptive_norm[(B * T,)](
            *(x, call.branch, call.gate, call.scale, call.shift, total, y),
            *(_strides(row) for row in (call.gate, call.scale, call.shift)),
            T,
            M,
            EPS=float(call.eps),
            BLOCK=block,
            PDL=pdl,
            launch_pdl=pdl,
            num_warps=min(max(block // 512, 1), 16),
        )
    return total, y


def _strides(row: Tensor | None) -> tuple[int, int, int]:
    if row is None:
        return 0, 0, 1
    return 0 if row.shape[0] == 1 else row.stride(0), row.stride(1), row.shape[1]
