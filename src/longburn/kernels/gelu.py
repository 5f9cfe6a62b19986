"""A linear map and the GELU's approximation by tanh (arXiv 1606.08415), in one pass where the library has one."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels.linear import check_map, linear
from longburn.kernels.registry import Impl, Operation
from longburn.kernels.triton import has_gradients


class LinearGeluCall(NamedTuple):
    """x `[..., in]`, weight `[out, in]`, bias `[out]`."""

    x: Tensor
    weight: Tensor
    bias: Tensor


def _reference(call: LinearGeluCall) -> Tensor:
    return F.gelu(linear(call.x, call.weight, call.bias), approximate="tanh")


def _cublas(call: LinearGeluCall) -> Tensor:
    x, weight, bias = call
    rows = x.reshape(-1, x.shape[-1])
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], -1)


def _cublas_why_not(call: LinearGeluCall) -> str | None:
    x, weight, bias = call
    if x.device.type != "cuda":
        return f"needs CUDA, got {x.device.type}"  # on the CPU the same function is another GELU
    if has_gradients(x, weight, bias):
        return "has no gradients"
    if not x.dtype == weight.dtype == bias.dtype or not bias.is_contiguous():
        return "takes one type for all, and a bias without gaps"
    return None


OPERATION: Operation[LinearGeluCall, Tensor] = Operation(
    "linear_gelu",
    (Impl("cublas", _cublas, _cublas_why_not), Impl("reference", _reference, lambda call: None)),
)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x @ weight.T + bias)` by tanh, for x `[..., in]`, weight `[out, in]` and bias `[out]`.

    On a GPU the GELU is part of the product's last step, before its one rounding; elsewhere the product is rounded
    first.

    Raises:
        ValueError: shapes that disagree.
    """
    check_map("linear_gelu", x, weight, bias)
    return OPERATION(LinearGeluCall(x, weight, bias))
