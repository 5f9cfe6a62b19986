"""Choosing experts: the k largest logits of a router, and the softmax over those k alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from longburn.kernels import native, triton
from longburn.kernels.registry import Impl, Operation

FEW = 16  # tokens; beyond, PyTorch's selection is the faster one on the CPU
MOST = 1024  # experts, of which a GPU holds a token's logits in registers


class RouteCall(NamedTuple):
    """Router logits `[N, E]`, and how many experts each token takes."""

    logits: Tensor
    k: int


Routed = tuple[Tensor, Tensor]  # chosen int64 [N, k], weights [N, k] in fp32 at least


def _reference(call: RouteCall) -> Routed:
    top, chosen = call.logits.topk(call.k, dim=-1)
    return chosen, top.softmax(-1, dtype=torch.promote_types(top.dtype, torch.float32))


def _native(call: RouteCall) -> Routed:
    logits, (n, count) = call.logits, call.logits.shape
    chosen, weights = torch.empty(n, call.k, dtype=torch.int64), torch.empty(n, call.k)
    words = map(native.address, (logits, chosen, weights))
    native.launch("route", *words, n, count, call.k, native.TYPES[logits.dtype])
    return chosen, weights


def _native_why_not(call: RouteCall) -> str | None:
    logits = call.logits
    if not logits.is_cpu:
        return f"runs on the CPU, got {logits.device.type}"
    if logits.shape[0] > FEW:
        return f"routes {FEW} tokens at most, got {logits.shape[0]}"
    if torch.is_grad_enabled() and logits.requires_grad:
        return "has no gradients"
    if not logits.is_contiguous():
        return "logits have gaps"
    return native.why_not(logits)


@triton.on_its_device
def _triton(call: RouteCall) -> Routed:
    from longburn.kernels.triton.route import route

    return route(call)


def _triton_why_not(call: RouteCall) -> str | None:
    logits = call.logits
    if reason := triton.unavailable(logits):
        return reason
    if triton.has_gradients(logits):
        return "has no gradients"
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes fp32, bf16 or fp16, got {logits.dtype}"
    if logits.shape[1] > MOST:
        return f"takes {MOST} experts at most, got {logits.shape[1]}"
    return None if logits.stride(1) == 1 else "logits have gaps"


OPERATION: Operation[RouteCall, Routed] = Operation(
    "route",
    (
        Impl("native", _native, _native_why_not),
        Impl("triton", _triton, _triton_why_not),
        Impl("reference", _reference, lambda call: None),
    ),
)


def route(logits: Tensor, k: int) -> Routed:
    """For logits `[N, E]` each token's k experts, largest first, int64 `[N, k]`, and weights `[N, k]` that sum to 1.

    Which of equal logits is taken is not said.
    """
    return OPERATION(RouteCall(logits, k))
