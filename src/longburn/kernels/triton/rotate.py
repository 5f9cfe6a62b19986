"""Rotary angles, and the rotation of channel pairs by them."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from longburn.kernels.rotate import AnglesCall, RotateCall

FEW_ROWS = 4096  # heads times tokens; up to here a program takes few of them, so that all start at once


@triton.jit
def _angles(positions, frequencies, cos, sin, size, stride, T, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < size
    position = tl.load(positions + token // T * stride + token % T).to(tl.float64)
    phase = position * tl.load(frequencies + channel, mask=inside, other=0.0)
    at = token * size + channel
    tl.store(cos + at, (tl.cos(phase) * FACTOR).to(cos.dtype.element_ty), mask=inside)
    tl.store(sin + at, (tl.sin(phase) * FACTOR).to(sin.dtype.element_ty), mask=inside)


@triton.jit
def channels(row, valid, R, D, weight, PAD: tl.constexpr, INTERLEAVED: tl.constexpr, EPS: tl.constexpr):
    """Values of the rows that the pointers `row` `[n]` begin, `[n, PAD]` in fp32, and those of every channel's partner.

    `valid` rows and channels below D are loaded; channels from R on have no partner. With a weight, rows are
    normalised.
    """
    d = tl.arange(0, PAD)[None, :]
    x = tl.load(row[:, None] + d, mask=valid[:, None] & (d < D), other=0.0).to(tl.float32)
    factor = None
    if weight is not None:
        factor = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
        x *= factor * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    if INTERLEAVED:  # partners lie side by side, in one thread
        even, odd = tl.split(tl.reshape(x, [x.shape[0], PAD // 2, 2]))
        return x, tl.reshape(tl.join(odd, even), [x.shape[0], PAD])
    else:
        partner = tl.where(d < R // 2, d + R // 2, d - R // 2)
        other = tl.load(row[:, None] + partner, mask=valid[:, None] & (d < R), other=0.0).to(tl.float32)
        if weight is not None:
            other *= factor * tl.load(weight + partner, mask=d < R, other=0.0).to(tl.float32)
        return x, other


@triton.jit
def turned(x, other, cos, sin, token, valid, R, PAD: tl.constexpr):
    """The rotation of `channels` by row `token` `[n]` of the angles; channels from R on stay as they are."""
    d = tl.arange(0, PAD)[None, :]
    at, inside = token.to(tl.int64)[:, None] * R + d, valid[:, None] & (d < R)
    c = tl.load(cos + at, mask=inside, other=0.0)
    s = tl.load(sin + at, mask=inside, other=0.0)
    return tl.where(d < R, x * c + other * s, x)


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    y,
    T,
    H,
    R,
    D,
    x_batch,
    x_head,
    x_token,
    angle_batch,  # tokens from one row of angles to the next
    weight,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EPS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = n < T * H
    t, h = n // H, n % H
    row = x + b * x_batch + h * x_head + t.to(tl.int64) * x_token
    mine, other = channels(row, valid, R, D, weight, PAD, INTERLEAVED, EPS)
    out = turned(mine, other, cos, sin, b * angle_batch + t, valid, R, PAD)
    d = tl.arange(0, PAD)[None, :]
    at = ((b * H + h) * T + t)[:, None] * D + d
    tl.store(y + at, out.to(y.dtype.element_ty), mask=valid[:, None] & (d < D))


def angles(call: "AnglesCall") -> tuple[Tensor, Tensor]:
    """The Impl `triton` of the operation `angles`."""
    positions, (R,) = call.positions, call.frequencies.shape
    rows, T = positions.shape
    cos, sin = torch.empty(2, rows, 1, T, R, dtype=call.dtype, device=positions.device).unbind()
    if rows * T:
        flags = {"FACTOR": float(call.factor), "BLOCK": triton.next_power_of_2(R)}
        _angles[(rows * T,)](positions, call.frequencies, cos, sin, R, positions.stride(0), T, **flags, num_warps=1)
    return cos, sin


def rotate(call: "RotateCall") -> Tensor:
    """The Impl `triton` of the operation `rotate`."""
    x, cos, sin, interleaved, weight, eps = call
    B, H, T, D = x.shape
    y = torch.empty(B, H, T, D, dtype=x.dtype, device=x.device)
    if y.numel():
        block = rows_of_a_program(B * T * H)
        sizes = (T, H, cos.shape[-1], D, *x.stride()[:3], 0 if cos.shape[0] == 1 else T)
        _rotate[(triton.cdiv(T * H, block), B)](
            *(x, cos, sin, y, *sizes, weight),
            BLOCK=block,
            PAD=triton.next_power_of_2(D),
            INTERLEAVED=interleaved,
            EPS=float(eps),
        )
    return y


def rows_of_a_program(rows: int) -> int:
    """How many heads of tokens one program takes."""
    return 8 if rows <= FEW_ROWS else 32
