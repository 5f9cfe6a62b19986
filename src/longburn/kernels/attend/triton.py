"""Attention by the kernels in Triton: decode, prefill, and its gradients.

Where gradients are wanted or PyTorch's compiler looks on, a call goes through one opaque operator,
`torch.ops.longburn.attend`, as tensors and numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longburn.kernels import triton
from longburn.kernels.attend.call import AttendCall, AttendResult, BiasTerms, Known, joined

MAX_HEAD = 256


def why_not(call: AttendCall) -> str | None:
    """Why Triton's kernels cannot, or should not, compute this call."""
    q, D, Dv = call.q, call.q.shape[3], call.v.shape[3]
    if reason := triton.unavailable(q, call.k, call.v):
        return reason
    if q.dtype not in triton.TYPES:
        return f"computes bf16, fp16 and fp32, got {q.dtype}"
    if Dv != D or D > MAX_HEAD:
        return f"takes one head size of at most {MAX_HEAD}, got {D} and {Dv}"
    if call.scale <= 0:
        return f"takes a positive scale, got {call.scale}"
    if call.scales is not None and call.needs_grad:
        return "has no gradients of keys and values in fp8"
    return None


def attend_triton(call: AttendCall) -> AttendResult:
    """The output in the type of q and the log-sum-exp in fp32, both with gradients."""
    if not call.needs_grad and not torch.compiler.is_compiling():
        return _compute(call)
    result: AttendResult = torch.ops.longburn.attend(*_flat(joined(call) if call.needs_grad else call))
    return result


@triton.on_its_device
def _compute(call: AttendCall) -> AttendResult:
    """The first kernel that takes the call."""
    from longburn.kernels.triton.decode import decode, decode_why_not
    from longburn.kernels.triton.hopper import attend_hopper, hopper_why_not
    from longburn.kernels.triton.prefill import prefill

    if decode_why_not(call) is None:
        return decode(call)
    if hopper_why_not(call) is None:
        return attend_hopper(call)
    return prefill(call if call.scales is None else joined(call))


# --- the operator ----------------------------------------------------------------------------------------------------

HEADS = ("q", "k", "v", "q_sink")
WITH_GRADIENTS = (*HEADS, "sinks", "slope", "key", "row", "table", "dense")
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_sink, Tensor? sinks, "
    "Tensor? slope, Tensor? key, Tensor? row, Tensor? table, Tensor? dense, Tensor q_pos, Tensor k_pos, "
    "Tensor? before_k, Tensor? before_v, Tensor? k_scale, Tensor? v_scale, float scale, SymInt? window, "
    "SymInt sink_tokens, SymInt? lookahead, SymInt block, SymInt zero, SymInt[]? known, bool ascending"
)


def _flat(call: AttendCall) -> tuple[Any, ...]:
    """The arguments of the operator; those with gradients first."""
    bias = call.bias or BiasTerms()
    known = None if call.known is None else [int(number) for one in call.known for number in one]
    return (
        *(call.q, call.k, call.v, call.q_sink, call.sinks, bias.slope, bias.key, bias.row, bias.table, bias.dense),
        *(call.q_pos, call.k_pos, *(call.before or (None, None)), *(call.scales or (None, None))),
        *(call.scale, call.window, call.sink_tokens, call.lookahead, call.block, bias.zero, known, call.ascending),
    )


def _call(flat: Sequence[Any]) -> AttendCall:
    q, k, v, q_sink, sinks, slope, key, row, table, dense = flat[:10]
    q_pos, k_pos, before_k, before_v, k_scale, v_scale = flat[10:16]
    scale, window, sink_tokens, lookahead, block, zero, known, ascending = flat[16:]
    terms = (slope, key, row, table, dense)
    fields = len(Known._fields)
    return AttendCall(
        *(q, k, v, q_pos, k_pos, scale, window, sink_tokens, lookahead, block),
        bias=None if all(term is None for term in terms) else BiasTerms(slope, key, row, table, zero, dense),
        sinks=sinks,
        q_sink=q_sink,
        known=known and tuple(Known(*known[at : at + fields]) for at in range(0, len(known), fields)),
        ascending=ascending,
        before=None if before_k is None else (before_k, before_v),
        scales=None if k_scale is None else (k_scale, v_scale),
        wants_lse=True,
    )


def _attend(*flat: Any) -> AttendResult:
    out, lse = _compute(_call(flat))
    # What the compiler was told of their layout holds whichever kernel ran.
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def _attend_fake(*flat: Any) -> AttendResult:
    q = flat[0]
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2), q.new_empty(B, H, T, dtype=torch.float32)


def _gradients(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, wanted: Sequence[bool], *flat: Any
) -> list[Tensor]:
    from longburn.kernels.triton.backward import backward

    found = backward(
        _call(flat), out, lse, dout, dlse, {name for name, w in zip(WITH_GRADIENTS, wanted, strict=True) if w}
    )
    return [found[name] if w else out.new_empty(0) for name, w in zip(WITH_GRADIENTS, wanted, strict=True)]


def _gradients_fake(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, wanted: Sequence[bool], *flat: Any
) -> list[Tensor]:
    def like(name: str, x: Tensor) -> Tensor:
        if name not in HEADS:
            return x.new_empty(x.shape)
        B, H, T, D = x.shape
        return x.new_empty(B, T, H, D).transpose(1, 2)

    return [like(name, x) if w else out.new_empty(0) for name, x, w in zip(WITH_GRADIENTS, flat, wanted, strict=False)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: AttendResult) -> None:
    ctx.save_for_backward(*output, *(x for x in inputs if isinstance(x, Tensor)))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    flat = [tensors.pop(0) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)]
    wanted = list(ctx.needs_input_grad[: len(WITH_GRADIENTS)])
    found = torch.ops.longburn.attend_gradients(dout, dlse, out, lse, wanted, *flat)
    grads = [grad if w else None for grad, w in zip(found, wanted, strict=True)]
    return (*grads, *(None,) * (len(flat) - len(grads)))


torch.library.define("longburn::attend", f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.impl("longburn::attend", ("cpu", "cuda"), _attend)
torch.library.register_fake("longburn::attend", _attend_fake)
torch.library.register_autograd("longburn::attend", _backward, setup_context=_setup)
torch.library.define(
    "longburn::attend_gradients",
    f"(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, bool[] wanted, {_ARGUMENTS}) -> Tensor[]",
)
torch.library.impl("longburn::attend_gradients", ("cpu", "cuda"), _gradients)
torch.library.register_fake("longburn::attend_gradients", _gradients_fake)
