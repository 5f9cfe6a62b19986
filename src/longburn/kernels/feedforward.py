"""The gated feed-forward block `down(silu(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels import native
from longburn.kernels.linear import is_one_row, linear
from longburn.kernels.registry import Impl, Operation


class SwiGLUCall(NamedTuple):
    """x `[..., dim]`, gate_up `[2 * hidden, dim]` (gate first), down `[out, hidden]`, and their biases or None."""

    x: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def _reference(call: SwiGLUCall) -> Tensor:
    gate, up = linear(call.x, call.gate_up, call.gate_up_bias).chunk(2, -1)
    return linear(F.silu(gate) * up, call.down, call.down_bias)


def _native(call: SwiGLUCall) -> Tensor:
    x, gate_up, gate_up_bias, down, down_bias = call
    y = torch.empty(*x.shape[:-1], down.shape[0], dtype=x.dtype)
    native.swiglu(gate_up, gate_up_bias, down, down_bias, x.contiguous(), y)
    return y


def _native_why_not(call: SwiGLUCall) -> str | None:
    reason = is_one_row(call.x, *call) or native.why_not(*call)
    if reason is None and not (call.gate_up.is_contiguous() and call.down.is_contiguous()):
        return "a weight has gaps"
    return reason


OPERATION: Operation[SwiGLUCall, Tensor] = Operation(
    "swiglu", (Impl("native", _native, _native_why_not), Impl("reference", _reference, lambda call: None))
)


def swiglu(
    x: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None
) -> Tensor:
    """`down(silu(gate(x)) * up(x))` for x `[..., dim]`; gate and up are the halves of `gate_up` `[2 * hidden, dim]`."""
    return OPERATION(SwiGLUCall(x, gate_up, gate_up_bias, down, down_bias))
