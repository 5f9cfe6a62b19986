"""A linear map, read at the memory's speed also when there is one row."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels import native
from longburn.kernels.registry import Impl, Operation


class LinearCall(NamedTuple):
    """`x @ weight.T + bias` for x `[..., in]`, weight `[out, in]` and bias `[out]` or None."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


def is_one_row(x: Tensor, *tensors: Tensor | None) -> str | None:
    """Why x is not a single row on the CPU whose gradient (and that of the tensors) nobody wants."""
    if x.numel() != x.shape[-1]:
        return f"computes one row, got {x.numel() // x.shape[-1]}"
    if x.device.type != "cpu":
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
    out, size = call.weight.shape
    y = torch.empty(*call.x.shape[:-1], out, dtype=call.x.dtype)
    native.linear(call.weight, call.x.contiguous(), call.bias, y, out, size)
    return y


def _native_why_not(call: LinearCall) -> str | None:
    return is_one_row(*call) or native.why_not(*call) or (None if call.weight.is_contiguous() else "weight has gaps")


OPERATION: Operation[LinearCall, Tensor] = Operation(
    "linear",
    (
        Impl("native", _native, _native_why_not),
        Impl("matvec", _matvec, lambda call: is_one_row(*call)),
        Impl("reference", lambda call: F.linear(*call), lambda call: None),
    ),
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for x `[..., in]`, weight `[out, in]` and bias `[out]`."""
    return OPERATION(LinearCall(x, weight, bias))
