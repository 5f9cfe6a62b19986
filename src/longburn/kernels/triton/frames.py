"""Frames for a causal convolution: norm, activation, and the frames before each, in one pass over memory."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from longburn.kernels.frames import AddCall, FramesCall

TILE = 4096  # numbers that a program holds of a frame


@triton.jit
def _norm_frames(
    x, weight, bias, past, y, pixels, channels,
    EPS: tl.constexpr, T: tl.constexpr, HAS_BIAS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program takes a few pixels through all frames, so nobody else reads what it forgets."""
    row = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    column = tl.arange(0, CHANNELS)
    at = pixel[:, None] * channels + column[None, :]
    inside = (pixel[:, None] < pixels) & (column[None, :] < channels)
    frame = tl.cast(pixels, tl.int64) * channels  # `pixels` of 1 is a constant
    x += row * T * frame
    y += row * 3 * T * frame + pixel[:, None] * (3 * channels) + column[None, :]
    past += row * 2 * frame
    w = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    older = tl.load(past + at, mask=inside, other=0.0)
    newer = tl.load(past + frame + at, mask=inside, other=0.0)
    for t in tl.static_range(T):
        wide = tl.load(x + t * frame + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            wide += b[None, :]
        normed = wide * tl.rsqrt(tl.sum(wide * wide, 1) / channels + EPS)[:, None] * w[None, :]
        current = (normed * tl.sigmoid(normed)).to(past.dtype.element_ty)
        beside = y + t * 3 * frame
        tl.store(beside, older, mask=inside)
        tl.store(beside + channels, newer, mask=inside)
        tl.store(beside + 2 * channels, current, mask=inside)
        older, newer = newer, current
    tl.debug_barrier()  # other threads of this program may not have read the old ones yet
    tl.store(past + at, older, mask=inside)
    tl.store(past + frame + at, newer, mask=inside)


@triton.jit
def _add_frames(x, y, bias, size, channels, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < size
    total = tl.load(x + at, mask=inside).to(tl.float32) + tl.load(y + at, mask=inside).to(tl.float32)
    total += tl.load(bias + at % channels, mask=inside).to(tl.float32)
    tl.store(x + at, total.to(x.dtype.element_ty), mask=inside)


def add_frames(call: "AddCall") -> Tensor:
    """The Impl `triton` of the operation `add_frames`; all tensors are contiguous."""
    x, y, bias = call
    _add_frames[(triton.cdiv(x.numel(), TILE),)](x, y, bias, x.numel(), bias.numel(), TILE=TILE, num_warps=8)
    return x


def norm_frames(call: "FramesCall") -> Tensor:
    """The Impl `triton` of the operation `norm_frames`; all tensors are contiguous."""
    from longburn.kernels.frames import norm_eps

    x, weight, past, bias = call
    B, T, H, W, C = x.shape
    y = torch.empty(B, T, H, W, 3 * C, dtype=x.dtype, device=x.device)
    if y.numel():
        columns = triton.next_power_of_2(C)
        rows = max(TILE // columns, 1)
        flags = {"EPS": norm_eps(C), "T": T, "HAS_BIAS": bias is not None, "PIXELS": rows, "CHANNELS": columns}
        grid = (triton.cdiv(H * W, rows), B)
        _norm_frames[grid](x, weight, weight if bias is None else bias, past, y, H * W, C, **flags, num_warps=8)
    return y
