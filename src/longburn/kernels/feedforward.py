"""The gated feed-forward block `down(silu(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202), and GPT-OSS's activation."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels import native, triton
from longburn.kernels.linear import NATIVE_ROWS, check_map, few_rows, linear
from longburn.kernels.registry import Impl, Operation


class SwiGLUCall(NamedTuple):
    """x `[..., dim]`, gate_up `[2 * hidden, dim]` (gate first), down `[out, hidden]`, their biases and a residual."""

    x: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    residual: Tensor | None = None  # [..., out]


def _gated_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _gated_native(gate_up: Tensor) -> Tensor:
    hidden = gate_up.shape[-1] // 2
    y = torch.empty(*gate_up.shape[:-1], hidden, dtype=gate_up.dtype)
    native.launch("gated", gate_up.data_ptr(), y.data_ptr(), y.numel() // hidden, hidden, native.TYPES[y.dtype])
    return y


def _gated_native_why_not(gate_up: Tensor) -> str | None:
    if not gate_up.is_cpu:
        return f"runs on the CPU, got {gate_up.device.type}"
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return "has no gradients"
    if not gate_up.is_contiguous() or not gate_up.numel():
        return "gate and up have gaps, or there are none"
    return native.why_not(gate_up)


@triton.on_its_device
def _gated_triton(gate_up: Tensor) -> Tensor:
    from longburn.kernels.triton.norm import gated

    return gated(gate_up)


def _gated_triton_why_not(gate_up: Tensor) -> str | None:
    if reason := triton.why_not(gate_up):
        return reason
    if gate_up.dtype not in triton.TYPES:
        return f"takes fp32, bf16 or fp16, got {gate_up.dtype}"
    return None if gate_up.is_contiguous() else "gate and up have gaps"


# silu(gate) * up for `[..., 2 * hidden]`, gate first.
GATED: Operation[Tensor, Tensor] = Operation(
    "gated",
    (
        Impl("native", _gated_native, _gated_native_why_not),
        Impl("triton", _gated_triton, _gated_triton_why_not),
        Impl("reference", _gated_reference, lambda call: None),
    ),
)


def _reference(call: SwiGLUCall) -> Tensor:
    hidden = GATED(linear(call.x, call.gate_up, call.gate_up_bias))
    return linear(hidden, call.down, call.down_bias, residual=call.residual)


def _native(call: SwiGLUCall) -> Tensor:
    x, (out, hidden) = call.x.contiguous(), call.down.shape
    y = torch.empty(*x.shape[:-1], out, dtype=x.dtype)
    tensors = (call.gate_up, call.gate_up_bias, call.down, call.down_bias, x, y)
    sizes = (x.numel() // x.shape[-1], out, hidden, x.shape[-1], native.TYPES[x.dtype])
    native.launch("swiglu", *map(native.address, tensors), *sizes)
    return y if call.residual is None else call.residual + y


def _native_why_not(call: SwiGLUCall) -> str | None:
    if not (call.gate_up.is_contiguous() and call.down.is_contiguous()):
        return "a weight has gaps"
    return few_rows(NATIVE_ROWS, *call) or native.why_not(*call)


OPERATION: Operation[SwiGLUCall, Tensor] = Operation(
    "swiglu", (Impl("native", _native, _native_why_not), Impl("reference", _reference, lambda call: None))
)


def swiglu(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """`down(silu(gate(x)) * up(x)) + residual` for x `[..., dim]` and residual `[..., out]`, which is rounded as of
    `linear`; gate and up are the halves of `gate_up` `[2 * hidden, dim]`.

    Raises:
        ValueError: shapes that disagree.
    """
    check_map("swiglu", x, gate_up, gate_up_bias)
    out, hidden = down.shape
    given = None if residual is None else residual.shape
    if 2 * hidden != gate_up.shape[0] or (down_bias is not None and down_bias.shape != (out,)):
        raise ValueError(f"swiglu: gate_up {tuple(gate_up.shape)} and down {(out, hidden)}, wanted twice {hidden} rows")
    if given is not None and given != (*x.shape[:-1], out):
        raise ValueError(f"swiglu: residual {tuple(given)}, wanted {(*x.shape[:-1], out)} as the result")
    return OPERATION(SwiGLUCall(x, gate_up, gate_up_bias, down, down_bias, residual))


def clamped_swiglu(gate_up: Tensor, *, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """`g sigmoid(alpha g) (u + 1)`, `[..., 2 I]` to `[..., I]`: the activation of GPT-OSS's experts.

    g and u are the even and the odd entries; g is clamped to at most `limit`, u to within `-limit .. limit`.
    Computed in fp32 at least and rounded once.
    """
    wide = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    gate, up = wide[..., 0::2].clamp(max=limit), wide[..., 1::2].clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(gate_up.dtype)
