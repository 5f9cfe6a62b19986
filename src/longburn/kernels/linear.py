"""A linear map, read at the memory's speed also when there is one row or a few."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels import native
from longburn.kernels.registry import Impl, Operation

NATIVE_ROWS = 4  # beyond, the general matrix kernels are as fast


class LinearCall(NamedTuple):
    """`x @ weight.T + bias` for x `[..., in]`, weight `[out, in]` and bias `[out]` or None."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


def few_rows(limit: int, x: Tensor, *tensors: Tensor | None) -> str | None:
    """Why x is not up to so many rows on the CPU whose gradients (and those of the tensors) nobody wants."""
    if x.numel() > limit * x.shape[-1]:
        return f"computes {limit} rows at most, got {x.numel() // x.shape[-1]}"
    if not x.is_cpu:
        return f"runs on the CPU, got {x.device.type}"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        return "has no gradients"
    return None


def _matvec(call: LinearCall) -> Tensor:
    # The general matrix kernels behind F.linear read a bf16 weight at half the speed of the matrix-vector kernel.
    x, row = call.x, call.x.reshape(-1)
    y = torch.mv(call.weight, row) if call.bias is None else torch.addmv(call.bias, call.weight, row)
    return y.view(*x.shape[:-1], -1)


def _native(call: LinearCall) -> Tensor:
    x, weight = call.x.contiguous(), call.weight
    out, size = weight.shape
    y = torch.empty(*x.shape[:-1], out, dtype=x.dtype)
    words = (native.address(weight), native.address(x), native.address(call.bias), native.address(y))
    native.launch("linear", *words, x.numel() // size, out, size, native.TYPES[x.dtype])
    return y


def _native_why_not(call: LinearCall) -> str | None:
    if not call.weight.is_contiguous():
        return "weight has gaps"
    return few_rows(NATIVE_ROWS, *call) or native.why_not(*call)


OPERATION: Operation[LinearCall, Tensor] = Operation(
    "linear",
    (
        Impl("native", _native, _native_why_not),
        Impl("matvec", _matvec, lambda call: few_rows(1, *call)),
        Impl("reference", lambda call: F.linear(*call), lambda call: None),
    ),
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for x `[..., in]`, weight `[out, in]` and bias `[out]`."""
    return OPERATION(LinearCall(x, weight, bias))
