"""A linear map, read at the memory's speed also when there is one row or a few."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels import native, triton
from longburn.kernels.registry import Impl, Operation

NATIVE_ROWS = 4  # beyond, the general matrix kernels are as fast
TRITON_ROWS = {torch.float32: 1, torch.bfloat16: 32, torch.float16: 32}  # likewise, on a GPU


class LinearCall(NamedTuple):
    """`x @ weight.T + bias + residual` for x `[..., in]`, weight `[out, in]`, bias `[out]`, residual `[..., out]`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None


def few_rows(limit: int, x: Tensor, *tensors: Tensor | None) -> str | None:
    """Why x is not up to so many rows on the CPU whose gradients (and those of the tensors) nobody wants."""
    if x.numel() > limit * x.shape[-1]:
        return f"computes {limit} rows at most, got {x.numel() // x.shape[-1]}"
    if not x.is_cpu:
        return f"runs on the CPU, got {x.device.type}"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        return "has no gradients"
    return None


def _plus(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else residual + y


def _reference(call: LinearCall) -> Tensor:
    return _plus(F.linear(call.x, call.weight, call.bias), call.residual)


def _matvec(call: LinearCall) -> Tensor:
    # The general matrix kernels behind F.linear read a bf16 weight at half the speed of the matrix-vector kernel.
    x, row = call.x, call.x.reshape(-1)
    y = torch.mv(call.weight, row) if call.bias is None else torch.addmv(call.bias, call.weight, row)
    return _plus(y.view(*x.shape[:-1], -1), call.residual)


def _native(call: LinearCall) -> Tensor:
    x, weight = call.x.contiguous(), call.weight
    out, size = weight.shape
    y = torch.empty(*x.shape[:-1], out, dtype=x.dtype)
    words = (native.address(weight), native.address(x), native.address(call.bias), native.address(y))
    native.launch("linear", *words, x.numel() // size, out, size, native.TYPES[x.dtype])
    return _plus(y, call.residual)


def _native_why_not(call: LinearCall) -> str | None:
    if not call.weight.is_contiguous():
        return "weight has gaps"
    return few_rows(NATIVE_ROWS, *call) or native.why_not(*call)


@triton.on_its_device
def _triton(call: LinearCall) -> Tensor:
    from longburn.kernels.triton.linear import linear

    return linear(call)


def _triton_why_not(call: LinearCall) -> str | None:
    x, weight = call.x, call.weight
    if reason := triton.why_not(*call):
        return reason
    if x.dtype not in TRITON_ROWS or any(t is not None and t.dtype != x.dtype for t in call):
        return f"takes fp32, bf16 or fp16, one type for all, got {x.dtype} and {weight.dtype}"
    if x.numel() > TRITON_ROWS[x.dtype] * x.shape[-1]:
        return f"computes {TRITON_ROWS[x.dtype]} rows of {x.dtype} at most, got {x.numel() // x.shape[-1]}"
    if weight.stride(1) != 1 or (call.bias is not None and call.bias.stride(0) != 1):
        return "rows of the weight, or the bias, have gaps"
    return None


OPERATION: Operation[LinearCall, Tensor] = Operation(
    "linear",
    (
        Impl("native", _native, _native_why_not),
        Impl("triton", _triton, _triton_why_not),
        Impl("matvec", _matvec, lambda call: few_rows(1, *call)),
        Impl("reference", _reference, lambda call: None),
    ),
)


def check_map(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless the weight and bias go with x: kernels do not look."""
    out, size = weight.shape
    if x.shape[-1] != size or (bias is not None and bias.shape != (out,)):
        raise ValueError(
            f"{name}: x {tuple(x.shape)}, weight {(out, size)}, bias {None if bias is None else tuple(bias.shape)}; "
            f"wanted x [..., {size}] and a bias of {out} or none"
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias + residual` for x `[..., in]`, weight `[out, in]`, bias `[out]` and residual `[..., out]`.

    Few rows on a GPU add the residual to the fp32 sum and round once; elsewhere it is added to the rounded product.

    Raises:
        ValueError: shapes that disagree.
    """
    check_map("linear", x, weight, bias)
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise ValueError(
            f"linear: residual {tuple(residual.shape)}, wanted {(*x.shape[:-1], weight.shape[0])} as the result"
        )
    return OPERATION(LinearCall(x, weight, bias, residual))
