"""Attention of a few queries on the CPU in plain C: decode at the memory's speed, for any positions."""

import torch
from torch import Tensor

from longburn.kernels import native
from longburn.kernels.attend.call import AttendCall, AttendResult

MAX_QUERIES = 16  # of one kv head: its group's heads times T
MAX_HEAD = 256


def why_not(call: AttendCall) -> str | None:
    """Why the compiled kernel cannot, or should not, compute this call."""
    T, D = call.q.shape[2:]
    if not call.q.is_cpu:
        return f"runs on the CPU, got {call.q.device.type}"
    if call.groups * T > MAX_QUERIES:
        return f"takes up to {MAX_QUERIES} queries of one kv head, got {call.groups * T}"
    if D % 16 or D > MAX_HEAD or call.v.shape[3] != D:
        return f"takes one head size, a multiple of 16 up to {MAX_HEAD}, got {D} and {call.v.shape[3]}"
    if call.q.stride(3) != 1 or call.k.stride(3) != 1 or call.v.stride(3) != 1:
        return "queries, keys or values have gaps within a head"
    if call.lookahead != 0 or call.block != 1:
        return "is causal"
    if call.bias is not None and any(term is not None for term in (*call.bias[1:3], call.bias.table, call.bias.dense)):
        return "knows no bias but a slope by distance"
    if call.needs_grad:
        return "has no gradients"
    return native.why_not(call.q, call.q_sink, call.k, call.v)


def attend_native(call: AttendCall) -> AttendResult:
    """One pass over the keys and values that are filled; learned sinks and kept sink tokens inside."""
    q, q_sink, k, v = call.q, call.q_sink, call.k, call.v
    if q_sink is not None:
        q, q_sink = q.contiguous(), q_sink.contiguous()
    B, H, T, D = q.shape
    sinks, slopes = _fp32(call.sinks), _fp32(call.bias.slope if call.bias is not None else None)
    q_pos, k_pos = call.q_pos, call.k_pos
    q_pos = q_pos if q_pos.stride(1) == 1 else q_pos.contiguous()
    k_pos = k_pos if k_pos.stride(1) == 1 else k_pos.contiguous()
    out, lse = torch.empty(B, H, T, D, dtype=q.dtype), torch.empty(B, H, T)
    native.launch(
        "attend",
        *map(native.address, (q, q_sink, k, v, sinks, slopes, q_pos, k_pos, out, lse)),
        *(B, H, k.shape[1], T, k.shape[2], D),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], native.row_stride(q_pos), native.row_stride(k_pos)),
        *(-1 if call.window is None else call.window, call.sink_tokens, float(call.scale)),
        *(int(call.ascending), native.TYPES[q.dtype]),
    )
    return out, lse


def _fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
