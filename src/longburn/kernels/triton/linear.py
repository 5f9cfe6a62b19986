"""A linear map of few rows: the weight is read once, at the memory's speed."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longburn.kernels.triton import overlaps

if TYPE_CHECKING:
    from longburn.kernels.linear import LinearCall


FEW_OUTPUTS = 1024  # up to here every one has a program of its own


@triton.jit
def _one_row(
    x,
    weight,
    bias,
    residual,
    y,
    out,
    size,
    stride,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`BLOCK_OUT` rows of the weight: the next tile is on its way while one is multiplied.

    EARLY: the weight may be read before the kernel before this one has ended.
    """
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    rows, cols = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    inside = rows < out
    at = weight + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tile = tl.load(at, mask=inside[:, None] & (cols < size)[None, :], other=0.0, eviction_policy="evict_first")
    added = tl.zeros([BLOCK_OUT], tl.float32)
    if bias is not None:
        added += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    if PDL and EARLY:
        gdc_wait()
    if residual is not None:
        added += tl.load(residual + rows, mask=inside, other=0.0).to(tl.float32)
    VECTOR: tl.constexpr = 8  # summed within a thread
    total = tl.zeros([BLOCK_OUT, BLOCK_IN // VECTOR], tl.float32)
    for start in range(0, size, BLOCK_IN):
        ahead = (start + BLOCK_IN + cols < size)[None, :] & inside[:, None]
        following = tl.load(at + start + BLOCK_IN, mask=ahead, other=0.0, eviction_policy="evict_first")
        a = tl.load(x + start + cols, mask=start + cols < size, other=0.0, eviction_policy="evict_last")
        product = tile.to(tl.float32) * a.to(tl.float32)[None, :]
        total += tl.sum(tl.reshape(product, [BLOCK_OUT, BLOCK_IN // VECTOR, VECTOR]), axis=2)
        tile = following
    tl.store(y + rows, (tl.sum(total, axis=1) + added).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _few_rows(
    x,
    weight,
    bias,
    residual,
    y,
    count,
    out,
    size,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """The same for up to `BLOCK_ROWS` rows of x, on the tensor cores."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    rows, items = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_IN)
    inside, given = (rows < out)[None, :], (items < count)[:, None]
    at, from_x = weight + rows.to(tl.int64)[:, None] * stride + cols[None, :], x + items[:, None] * size + cols[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    for start in tl.range(0, size, BLOCK_IN, num_stages=STAGES):
        here = (start + cols < size)[None, :]
        tile = tl.load(at + start, mask=(rows < out)[:, None] & here, other=0.0)
        a = tl.load(from_x + start, mask=given & here, other=0.0)
        total = tl.dot(a, tl.trans(tile), total)
    place, mine = items[:, None] * out + rows[None, :], given & inside
    if bias is not None:
        total += tl.load(bias + rows, mask=rows < out, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        total += tl.load(residual + place, mask=mine, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=mine)


def linear(call: "LinearCall") -> Tensor:
    """The Impl `triton` of the operation `linear`."""
    x, weight, bias = call.x.contiguous(), call.weight, call.bias
    residual = None if call.residual is None else call.residual.contiguous()
    out, size = weight.shape
    count = x.numel() // size
    y = torch.empty(*x.shape[:-1], out, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    pdl = overlaps(x.device)
    if count == 1:
        # A parameter is not what the kernel before this one wrote.
        early = isinstance(weight, nn.Parameter) and (bias is None or isinstance(bias, nn.Parameter))
        rows, cols, warps = (1, 2048, 8) if out <= FEW_OUTPUTS else (4, 1024, 4)
        _one_row[(triton.cdiv(out, rows),)](
            *(x, weight, bias, residual, y, out, size, weight.stride(0)),
            **{"BLOCK_OUT": rows, "BLOCK_IN": cols, "EARLY": early, "PDL": pdl},
            num_warps=warps,
            launch_pdl=pdl,
        )
    else:
        items = max(16, triton.next_power_of_2(count))
        _few_rows[(triton.cdiv(out, 16),)](
            *(x, weight, bias, residual, y, count, out, size, weight.stride(0)),
            **{"BLOCK_ROWS": items, "BLOCK_OUT": 16, "BLOCK_IN": 256, "STAGES": 4, "PDL": pdl},
            num_warps=2,
            launch_pdl=pdl,
        )
    return y
