"""Experts as two grouped products over tokens sorted by expert: no loop, no read of the device by the host.

For training and large batches on CUDA. What differs from the reference is the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels.feedforward import clamped_swiglu
from longburn.kernels.mxfp4 import Mxfp4

if TYPE_CHECKING:
    from longburn.kernels.experts import ExpertsCall

ALIGNMENT = 16  # bytes, of every row: PyTorch's grouped product asks for it
MIN_ROWS = 512  # chosen experts in all; below it a product of one expert is a few rows, and launches are the cost


def why_not(call: ExpertsCall) -> str | None:
    """Why the grouped product cannot, or should not, compute this call."""
    if call.x.device.type != "cuda":
        return f"needs CUDA, got {call.x.device.type}"
    if not hasattr(F, "grouped_mm"):
        return f"needs torch.nn.functional.grouped_mm, which PyTorch {torch.__version__} lacks"
    if isinstance(call.gate_up, Mxfp4) or isinstance(call.down, Mxfp4):
        return "needs dense weights"
    if {call.x.dtype, call.gate_up.dtype, call.down.dtype} != {torch.bfloat16}:
        return f"needs bf16, got x {call.x.dtype} and weights {call.gate_up.dtype}"
    if call.chosen.numel() < MIN_ROWS:
        return f"needs at least {MIN_ROWS} chosen experts in all, got {call.chosen.numel()}"
    for size in (call.gate_up.shape[2], call.down.shape[2]):
        if size * call.x.element_size() % ALIGNMENT:
            return f"needs rows of a multiple of {ALIGNMENT} bytes, got {size} values"
    return None


def experts_grouped(call: ExpertsCall) -> Tensor:
    """Rows `[N k]` sorted by expert, up, activation, down, back in order, weighted and summed. k choices a token."""
    assert isinstance(call.gate_up, Tensor)
    assert isinstance(call.down, Tensor)
    N, k = call.chosen.shape
    expert, order = call.chosen.flatten().sort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(N * k, device=order.device))
    count = call.gate_up_bias.shape[0]
    ends = torch.searchsorted(expert, torch.arange(count, device=expert.device), right=True).int()
    rows = _permute(call.x[:, None].expand(N, k, -1).reshape(N * k, -1), order, back)
    up = F.grouped_mm(rows, call.gate_up.transpose(1, 2), offs=ends)
    hidden = _activation(call.x.device.type)(up, _bias(call.gate_up_bias, expert), call.alpha, call.limit)
    out = F.grouped_mm(hidden, call.down.transpose(1, 2), offs=ends)
    out = _permute(out, back, order).view(N, k, -1)
    wide = torch.promote_types(out.dtype, torch.float32)
    weights = call.weights.to(wide)
    # The biases of a token's experts, weighted: one small product instead of a row for each choice.
    share = torch.zeros(N, count, dtype=wide, device=out.device).scatter_add(1, call.chosen, weights)
    y = (out * weights[..., None]).sum(1) + share @ call.down_bias.to(wide)
    return (y if call.residual is None else y + call.residual.to(wide)).to(call.x.dtype)


class _Permute(torch.autograd.Function):
    """Rows in another order. The gradient takes the inverse order, where indexing would add with atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _, back = ctx.saved_tensors
        return grads[0].index_select(0, back), None, None


class _Rows(torch.autograd.Function):
    """Row `index[n]` of a small table for each n. The gradient is a matrix product, for the same reason."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = table.shape[0]
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        chosen = index[None] == torch.arange(ctx.rows, device=index.device)[:, None]
        return chosen.to(grads[0].dtype) @ grads[0], None


def _permute(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    rows: Tensor = _Permute.apply(x, order, back)  # type: ignore[no-untyped-call]
    return rows


def _bias(table: Tensor, expert: Tensor) -> Tensor:
    rows: Tensor = _Rows.apply(table, expert)  # type: ignore[no-untyped-call]
    return rows


@cache
def _activation(device: str) -> Callable[[Tensor, Tensor, float, float], Tensor]:
    """The biased and clamped SwiGLU; one kernel each way on CUDA, where it is bound by memory."""

    def activation(up: Tensor, bias: Tensor, alpha: float, limit: float) -> Tensor:
        wide = torch.promote_types(up.dtype, torch.float32)
        return clamped_swiglu(up.to(wide) + bias, alpha=alpha, limit=limit).to(up.dtype)

    return torch.compile(activation, dynamic=True) if device == "cuda" else activation
