"""Rotary angles of positions, and the rotation of channel pairs by them (Su et al., arXiv 2104.09864)."""

from typing import NamedTuple

import torch
from torch import Tensor

from longburn.kernels import native, triton
from longburn.kernels.norm import rms_norm
from longburn.kernels.registry import Impl, Operation

FEW_POSITIONS = 16  # beyond, PyTorch's vectorised cosine is faster than the C library's


class AnglesCall(NamedTuple):
    """Positions `[B|1, T]` int64; frequencies `[R]` fp64, radians a token, with the sign of the channel's partner."""

    positions: Tensor
    frequencies: Tensor
    factor: float
    dtype: torch.dtype


class RotateCall(NamedTuple):
    """x `[B, H, T, D]`, cos and sin `[B|1, 1, T, R]`; the first R channels rotate, in half-split or interleaved
    pairs. With a weight `[D]`, x is RMS-normalised over D before.
    """

    x: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool
    weight: Tensor | None = None
    eps: float = 0.0


def _angles_reference(call: AnglesCall) -> tuple[Tensor, Tensor]:
    phase = call.positions[:, None, :, None] * call.frequencies
    cos, sin = phase.cos(), phase.sin()
    if call.factor != 1.0:
        cos, sin = cos * call.factor, sin * call.factor
    return cos.to(call.dtype), sin.to(call.dtype)


def _angles_native(call: AnglesCall) -> tuple[Tensor, Tensor]:
    (rows, T), R = call.positions.shape, call.frequencies.shape[0]
    cos, sin = torch.empty(2, rows, 1, T, R).unbind()
    positions = call.positions.contiguous()
    words = map(native.address, (positions, call.frequencies, cos, sin))
    native.launch("angles", *words, rows * T, R, float(call.factor))
    return cos, sin


def _angles_native_why_not(call: AnglesCall) -> str | None:
    if not call.positions.is_cpu:
        return f"runs on the CPU, got {call.positions.device.type}"
    if call.positions.numel() > FEW_POSITIONS:
        return f"computes up to {FEW_POSITIONS} positions, got {call.positions.numel()}"
    if call.dtype != torch.float32:
        return f"gives fp32, wanted {call.dtype}"
    return native.unavailable()


@triton.on_its_device
def _angles_triton(call: AnglesCall) -> tuple[Tensor, Tensor]:
    from longburn.kernels.triton.rotate import angles

    return angles(call)


def _angles_triton_why_not(call: AnglesCall) -> str | None:
    if reason := triton.why_not(call.positions, call.frequencies):
        return reason
    if call.positions.stride(1) != 1 or not call.frequencies.is_contiguous():
        return "positions or frequencies have gaps"
    return None if call.dtype == torch.float32 else f"gives fp32, wanted {call.dtype}"


ANGLES: Operation[AnglesCall, tuple[Tensor, Tensor]] = Operation(
    "angles",
    (
        Impl("native", _angles_native, _angles_native_why_not),
        Impl("triton", _angles_triton, _angles_triton_why_not),
        Impl("reference", _angles_reference, lambda call: None),
    ),
)


def _normed(call: RotateCall) -> Tensor:
    return call.x if call.weight is None else rms_norm(call.x, call.weight, call.eps, round_last=True)


def _rotate_reference(call: RotateCall) -> Tensor:
    """In the wider type of x and the angles."""
    (_, cos, sin, interleaved, *_), x = call, _normed(call)
    R = cos.shape[-1]
    if x.shape[-1] > R:
        return torch.cat((_rotate_reference(RotateCall(x[..., :R], cos, sin, interleaved)), x[..., R:]), -1)
    partner = x.reshape(*x.shape[:-1], -1, 2).roll(1, -1).flatten(-2) if interleaved else x.roll(R // 2, -1)
    # Where x is narrower than the angles, both products are formed in the angles' type.
    return torch.addcmul(x * cos, partner, sin).to(x.dtype)


def _rotate_native(call: RotateCall) -> Tensor:
    (_, cos, sin, interleaved, *_), x = call, _normed(call)
    B, H, T, D = x.shape
    y = torch.empty(B, H, T, D, dtype=x.dtype)
    sizes = (B, H, T, D, cos.shape[-1], *x.stride()[:3], native.row_stride(cos))
    native.launch("rotate", *map(native.address, (x, cos, sin, y)), *sizes, int(interleaved), native.TYPES[x.dtype])
    return y


def _rotate_native_why_not(call: RotateCall) -> str | None:
    x, cos, sin, _, weight, _ = call
    if not x.is_cpu:
        return f"runs on the CPU, got {x.device.type}"
    if not (cos.dtype == sin.dtype == torch.float32):
        return f"takes fp32 angles, got {cos.dtype}"
    if x.stride(3) != 1 or not (cos.is_contiguous() and sin.is_contiguous()):
        return "x has gaps within a head, or the angles have any"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, cos, weight)):
        return "has no gradients"
    return native.why_not(x)


@triton.on_its_device
def _rotate_triton(call: RotateCall) -> Tensor:
    from longburn.kernels.triton.rotate import rotate

    return rotate(call)


def _rotate_triton_why_not(call: RotateCall) -> str | None:
    x, cos, sin, _, weight, _ = call
    if reason := triton.why_not(x, cos, sin, weight):
        return reason
    if x.dtype not in triton.TYPES or not (cos.dtype == sin.dtype == torch.float32):
        return f"takes fp32, bf16 or fp16 and fp32 angles, got {x.dtype} and {cos.dtype}"
    if x.stride(3) != 1 or not (cos.is_contiguous() and sin.is_contiguous()):
        return "x has gaps within a head, or the angles have any"
    return None if weight is None or weight.is_contiguous() else "weight has gaps"


ROTATE: Operation[RotateCall, Tensor] = Operation(
    "rotate",
    (
        Impl("native", _rotate_native, _rotate_native_why_not),
        Impl("triton", _rotate_triton, _rotate_triton_why_not),
        Impl("reference", _rotate_reference, lambda call: None),
    ),
)


def angles(positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, `[B|1, 1, T, R]` each and times `factor`, of position times frequency; computed in fp64."""
    return ANGLES(AnglesCall(positions, frequencies, factor, dtype))


def check_angles(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError unless these are angles `[B|1, 1, T, R]` for x `[B, H, T, D]`: kernels do not look."""
    (B, _, T, D), (rows, heads, tokens, R) = x.shape, cos.shape
    if rows not in (1, B) or heads != 1 or tokens != T or R > D or R % 2 or sin.shape != cos.shape:
        raise ValueError(
            f"{name}: angles {tuple(cos.shape)} and {tuple(sin.shape)} for {tuple(x.shape)}; wanted [{B} or 1, 1, {T}, "
            f"R] each, R even and at most {D}"
        )


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, weight: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """Rotate the first R channels of x `[B, H, T, D]`; returned in x's type.

    With a weight `[D]`, x is first divided by `sqrt(mean(x^2) + eps)` over D and multiplied by it.

    Raises:
        ValueError: angles or a weight of another shape.
    """
    check_angles("rotate", x, cos, sin)
    if weight is not None and weight.shape != x.shape[3:]:
        raise ValueError(f"rotate: weight {tuple(weight.shape)} for {tuple(x.shape)}; wanted ({x.shape[3]},)")
    return ROTATE(RotateCall(x, cos, sin, interleaved, weight, eps))
