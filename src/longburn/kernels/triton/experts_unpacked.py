"""Experts over very many tokens: weights are unpacked once, for two grouped products of PyTorch's.

Unpacking writes four bytes for each that it reads, which hundreds of tokens of each expert make up for: the grouped
product of plain bf16 runs near the device's peak.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from longburn.kernels.mxfp4 import Mxfp4, dequantize
from longburn.kernels.triton import interprets
from longburn.kernels.triton.combine import combine, swiglu
from longburn.kernels.triton.experts_grouped import UNPACK_FROM
from longburn.kernels.triton.sort import sort

if TYPE_CHECKING:
    from longburn.kernels.experts import ExpertsCall

ALIGNMENT = 16  # bytes, of every row: PyTorch's grouped product asks for it
BLOCK = 1024  # columns of a program


@triton.jit
def _gather(x, order, rows, k, size, BLOCK: tl.constexpr):
    """The token of each row."""
    row = tl.program_id(0).to(tl.int64)
    token = (tl.load(order + row) // k).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + token * size + column, mask=column < size)
    tl.store(rows + row * size + column, values, mask=column < size)


@triton.jit
def _activate(up, order, chosen, bias, hidden, units, experts, alpha, limit, BLOCK: tl.constexpr):
    """The activation of each row `[2 I]` (gates at even columns), with its expert's bias."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.minimum(tl.maximum(tl.load(chosen + tl.load(order + row)), 0), experts - 1)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < units
    both = 2 * unit[:, None] + tl.arange(0, 2)[None]
    values = tl.load(up + row * 2 * units + both, mask=inside[:, None], other=0).to(tl.float32)
    values += tl.load(bias + expert * 2 * units + both, mask=inside[:, None], other=0).to(tl.float32)
    gate, linear = tl.split(values)
    act = swiglu(gate, linear, alpha, limit)
    tl.store(hidden + row * units + unit, act.to(hidden.dtype.element_ty), mask=inside)


def why_not(call: "ExpertsCall") -> str | None:
    """Why this does not, or should not, compute this call."""
    if interprets():
        return "cannot be interpreted"
    if not hasattr(F, "grouped_mm"):
        return f"needs torch.nn.functional.grouped_mm, which PyTorch {torch.__version__} lacks"
    weights = (call.gate_up, call.down)
    if {call.x.dtype, *(w.dtype for w in weights if isinstance(w, Tensor))} != {torch.bfloat16}:
        return "needs bf16"
    if call.chosen.numel() < UNPACK_FROM * len(call.gate_up_bias):
        return f"needs {UNPACK_FROM} choices for each expert, got {call.chosen.numel()} for {len(call.gate_up_bias)}"
    for size in (call.x.shape[1], call.gate_up_bias.shape[1] // 2):
        if size * call.x.element_size() % ALIGNMENT:
            return f"needs rows of a multiple of {ALIGNMENT} bytes, got {size} values"
    return None


def experts_unpacked(call: "ExpertsCall") -> Tensor:
    """Choices sorted by expert, up, activation, down, weighted sum."""
    x, chosen, weights = call.x.contiguous(), call.chosen.contiguous(), call.weights.contiguous()
    residual = None if call.residual is None else call.residual.contiguous()
    (experts, both), size, total = call.gate_up_bias.shape, x.shape[1], chosen.numel()
    order, back, ends, _ = sort(chosen, experts, 128)
    rows, hidden, y = x.new_empty(total, size), x.new_empty(total, both // 2), torch.empty_like(x)
    _gather[total, triton.cdiv(size, BLOCK)](x, order, rows, chosen.shape[1], size, BLOCK=BLOCK, num_warps=4)
    up = F.grouped_mm(rows, _columns(call.gate_up, x.dtype), offs=ends)
    _activate[total, triton.cdiv(both // 2, BLOCK)](
        *(up, order, chosen, call.gate_up_bias, hidden, both // 2, experts, call.alpha, call.limit),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    del up
    parts = F.grouped_mm(hidden, _columns(call.down, x.dtype), offs=ends)
    combine(parts, weights, residual, y, back, chosen, call.down_bias)
    return y


def _columns(weight: Tensor | Mxfp4, dtype: torch.dtype) -> Tensor:
    return (dequantize(weight, dtype) if isinstance(weight, Mxfp4) else weight).transpose(1, 2)
