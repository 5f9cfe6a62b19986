"""Attention of a few queries on the CPU in plain C: decode at the memory's speed, for any positions."""

import torch
from torch import Tensor

from longburn.kernels import native
from longburn.kernels.attend.call import AttendCall, AttendResult

MAX_QUERIES = 16  # of one kv head: its group's heads times T
MAX_HEAD = 256
SPLIT_KEYS = 512  # at most so many keys in one part of the length


def why_not(call: AttendCall) -> str | None:
    """Why the compiled kernel cannot, or should not, compute this call."""
    T, D = call.q.shape[2:]
    if call.q.device.type != "cpu":
        return f"runs on the CPU, got {call.q.device.type}"
    if call.groups * T > MAX_QUERIES:
        return f"takes up to {MAX_QUERIES} queries of one kv head, got {call.groups * T}"
    if D % 16 or D > MAX_HEAD or call.v.shape[3] != D:
        return f"takes one head size, a multiple of 16 up to {MAX_HEAD}, got {D} and {call.v.shape[3]}"
    if call.k.stride(3) != 1 or call.v.stride(3) != 1:
        return "keys or values have gaps within a head"
    if call.lookahead != 0 or call.block != 1:
        return "is causal"
    if call.bias is not None and any(term is not None for term in (*call.bias[1:3], call.bias.table, call.bias.dense)):
        return "knows no bias but a slope by distance"
    if call.needs_grad:
        return "has no gradients"
    return native.why_not(call.q, call.q_sink, call.k, call.v)


def attend_native(call: AttendCall) -> AttendResult:
    """One pass over the keys and values that are filled; learned sinks and kept sink tokens inside."""
    B, H, T, D = call.q.shape
    S = call.k.shape[2]
    if call.known is not None:  # slots beyond what the host knows to be filled need not be looked at
        S = max((known.keys for known in call.known), default=S)
    q = call.q.contiguous()
    q_sink = None if call.q_sink is None else call.q_sink.contiguous()
    sinks, slopes = _fp32(call.sinks), _fp32(call.bias.slope if call.bias is not None else None)
    q_pos, k_pos = call.q_pos.contiguous(), call.k_pos
    k_pos = k_pos if k_pos.stride(1) == 1 else k_pos.contiguous()
    out, lse = torch.empty_like(q), torch.empty(B, H, T)
    native.attend(
        native.AttendArgs(
            q=q.data_ptr(),
            q_sink=None if q_sink is None else q_sink.data_ptr(),
            k=call.k.data_ptr(),
            v=call.v.data_ptr(),
            sinks=None if sinks is None else sinks.data_ptr(),
            slopes=None if slopes is None else slopes.data_ptr(),
            q_pos=q_pos.data_ptr(),
            k_pos=k_pos.data_ptr(),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            B=B,
            H=H,
            K=call.k.shape[1],
            T=T,
            S=S,
            D=D,
            k_row=call.k.stride(0),
            k_head=call.k.stride(1),
            k_slot=call.k.stride(2),
            v_row=call.v.stride(0),
            v_head=call.v.stride(1),
            v_slot=call.v.stride(2),
            q_pos_row=0 if q_pos.shape[0] == 1 else q_pos.stride(0),
            k_pos_row=0 if k_pos.shape[0] == 1 else k_pos.stride(0),
            window=-1 if call.window is None else call.window,
            sink_tokens=call.sink_tokens,
            scale=call.scale,
            type=native.TYPES[q.dtype],
            splits=max(1, -(-S // SPLIT_KEYS)),
        )
    )
    return out, lse


def _fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
