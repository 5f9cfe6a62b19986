"""Root-mean-square normalisation (Zhang & Sennrich, arXiv 1910.07467)."""

from typing import NamedTuple

import torch
from torch import Tensor

from longburn.kernels import native, triton
from longburn.kernels.registry import Impl, Operation

LARGEST_ROW = 16384  # channels that one program of the Triton kernel holds


class HeadNorms(NamedTuple):
    """An RMSNorm over every head's channels: weights `[D]` of queries and of keys, and the epsilon of both.

    Multiplied by the weight before the one rounding, which comes after a rotation that is computed with it.
    """

    q: Tensor
    k: Tensor
    eps: float


class NormCall(NamedTuple):
    """x `[..., n]`, weight `[n]`; `round_last` as in `rms_norm`."""

    x: Tensor
    weight: Tensor
    eps: float
    round_last: bool = False


def _reference(call: NormCall) -> Tensor:
    wide = call.x.to(torch.promote_types(call.x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + call.eps)
    if call.round_last:
        return (normed * call.weight).to(call.x.dtype)
    return normed.to(call.x.dtype) * call.weight


def _native(call: NormCall) -> Tensor:
    x, n = call.x.contiguous(), call.x.shape[-1]
    y = torch.empty_like(x)
    words = (native.address(x), native.address(call.weight), native.address(y), x.numel() // n, n, float(call.eps))
    native.launch("rms_norm", *words, int(call.round_last), native.TYPES[x.dtype])
    return y


def _native_why_not(call: NormCall) -> str | None:
    x, weight = call.x, call.weight
    if not x.is_cpu:
        return f"runs on the CPU, got {x.device.type}"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "has no gradients"
    return native.why_not(x, weight) if weight.is_contiguous() else "weight has gaps"


@triton.on_its_device
def _triton(call: NormCall) -> Tensor:
    from longburn.kernels.triton.norm import rms_norm

    return rms_norm(call)


def _triton_why_not(call: NormCall) -> str | None:
    x, weight = call.x, call.weight
    if reason := triton.why_not(x, weight):
        return reason
    if x.dtype not in triton.TYPES or weight.dtype != x.dtype:
        return f"takes fp32, bf16 or fp16, one type for all, got {x.dtype} and {weight.dtype}"
    if not weight.is_contiguous() or x.stride(-1) != 1:
        return "weight, or x within a row, has gaps"
    return None if x.shape[-1] <= LARGEST_ROW else f"takes {LARGEST_ROW} channels at most, got {x.shape[-1]}"


OPERATION: Operation[NormCall, Tensor] = Operation(
    "rms_norm",
    (
        Impl("native", _native, _native_why_not),
        Impl("triton", _triton, _triton_why_not),
        Impl("reference", _reference, lambda call: None),
    ),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, round_last: bool = False) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, normalised in fp32 at least.

    `round_last`: multiply by the weight before the one rounding to x's type, as GPT-OSS does. Otherwise round first and
    multiply in x's type, as Llama does. In fp32 they are the same.

    Raises:
        ValueError: the weight is not one number a channel.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} and weight {tuple(weight.shape)}, wanted ({x.shape[-1]},)")
    return OPERATION(NormCall(x, weight, eps, round_last))
