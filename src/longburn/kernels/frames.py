"""What a causal convolution over frames reads: every frame, normed and activated, beside the two before it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels import triton
from longburn.kernels.registry import Impl, Operation

REMEMBERED = 2  # frames before the current one that a convolution of three reads
LARGEST_ROW = 1024  # channels of a pixel that one program of the Triton kernel holds


class FramesCall(NamedTuple):
    """x `[B, T, H, W, C]`, weight `[C]`, past `[B, 2, H, W, C]`, which is written to, bias `[C]` of x."""

    x: Tensor
    weight: Tensor
    past: Tensor
    bias: Tensor | None


class AddCall(NamedTuple):
    """x and y `[..., C]`, bias `[C]`; x is written to."""

    x: Tensor
    y: Tensor
    bias: Tensor


def side_by_side(x: Tensor) -> Tensor:
    """`[B, 2 + T, H, W, C]` to `[B, T, H, W, 3 C]`: every frame from the third on beside the two before it.

    A convolution over three frames is then one over pictures, for which cuDNN has twice as fast kernels at 96 channels.
    """
    frames = x.shape[1] - REMEMBERED
    return torch.cat([x[:, i : i + frames] for i in range(REMEMBERED + 1)], -1)


def norm_eps(channels: int) -> float:
    """The epsilon with which an RMSNorm of so many channels divides by the length of the vector, at least 1e-12."""
    return 1e-24 / channels


def _reference(call: FramesCall) -> Tensor:
    wide = call.x.to(torch.promote_types(call.x.dtype, torch.float32))
    if call.bias is not None:
        wide = wide + call.bias
    eps = norm_eps(wide.shape[-1])
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * call.weight
    y = torch.cat([call.past, F.silu(normed).to(call.x.dtype)], 1)
    call.past.copy_(y[:, -REMEMBERED:])
    return side_by_side(y)


@triton.on_its_device
def _triton(call: FramesCall) -> Tensor:
    from longburn.kernels.triton.frames import norm_frames

    return norm_frames(call)


def _triton_why_not(call: FramesCall) -> str | None:
    x, weight, past, bias = call
    if reason := triton.why_not(x, weight, past, bias):
        return reason
    dtypes = {tensor.dtype for tensor in call if tensor is not None}
    if len(dtypes) > 1 or x.dtype not in triton.TYPES:
        return f"takes fp32, bf16 or fp16, one type for all, got {', '.join(sorted(map(str, dtypes)))}"
    if not all(tensor.is_contiguous() for tensor in call if tensor is not None):
        return "a tensor has gaps"
    return None if x.shape[-1] <= LARGEST_ROW else f"takes {LARGEST_ROW} channels at most, got {x.shape[-1]}"


def _add_reference(call: AddCall) -> Tensor:
    wide = call.x.to(torch.promote_types(call.x.dtype, torch.float32))
    return call.x.copy_(wide + call.y + call.bias)


@triton.on_its_device
def _add_triton(call: AddCall) -> Tensor:
    from longburn.kernels.triton.frames import add_frames

    return add_frames(call)


def _add_why_not(call: AddCall) -> str | None:
    if reason := triton.why_not(*call):
        return reason
    if len({tensor.dtype for tensor in call}) > 1 or call.x.dtype not in triton.TYPES:
        return f"takes fp32, bf16 or fp16, one type for all, got {', '.join(str(tensor.dtype) for tensor in call)}"
    return None if all(tensor.is_contiguous() for tensor in call) else "a tensor has gaps"


ADD: Operation[AddCall, Tensor] = Operation(
    "add_frames",
    (Impl("triton", _add_triton, _add_why_not), Impl("reference", _add_reference, lambda call: None)),
)
OPERATION: Operation[FramesCall, Tensor] = Operation(
    "norm_frames",
    (Impl("triton", _triton, _triton_why_not), Impl("reference", _reference, lambda call: None)),
)


def norm_frames(x: Tensor, weight: Tensor, past: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`silu(norm(x + bias) * weight)`, each frame beside the two before it: `side_by_side`, `[B, T, H, W, 3 C]`.

    The norm divides every pixel by the root of the mean of its squared channels. It, the activation and the sum are
    computed in fp32 at least and rounded once. The last two frames become the remembered ones.

    Args:
        x: `[B, T, H, W, C]`, T >= 1 new frames.
        weight: `[C]`.
        past: `[B, 2, H, W, C]`, in place; zeros before the first frame.
        bias: `[C]`, of the layer that made x, where it has not added it itself.

    Raises:
        ValueError: shapes that do not belong together. `past` is then as it was.
    """
    B, T, *size = x.shape
    rows = [weight] if bias is None else [weight, bias]
    if T < 1 or past.shape != (B, REMEMBERED, *size) or any(row.shape != x.shape[-1:] for row in rows):
        raise ValueError(
            f"norm_frames: x {tuple(x.shape)}, past {tuple(past.shape)}, weight and bias "
            f"{[tuple(row.shape) for row in rows]}, wanted [B, T, H, W, C], [B, {REMEMBERED}, H, W, C] and [C]"
        )
    return OPERATION(FramesCall(x, weight, past, bias))


def add_frames(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """`x + y + bias`, in place of x, in one pass.

    Args:
        x, y: `[..., C]`, of one shape.
        bias: `[C]`, of the layer that made x.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if x.shape != y.shape or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"add_frames: {tuple(x.shape)}, {tuple(y.shape)} and a bias {tuple(bias.shape)}, wanted one shape"
        )
    return ADD(AddCall(x, y, bias))
