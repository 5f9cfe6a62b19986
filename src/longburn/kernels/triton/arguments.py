"""An attention call as the arguments of a kernel: pointers, strides, numbers and compile-time flags."""

from typing import Any

import torch
from torch import Tensor

from longburn.kernels.attend.call import AttendCall, Known

FARTHEST = (1 << 30) - 1  # distances beyond this are all the same to 32-bit kernels (`tiles.FAR`)


def ordered(call: AttendCall) -> Known | None:
    """What the host knows, if it says where every query and every key stands, for all rows alike."""
    if call.known is None or len(call.known) != 1:
        return None
    known = call.known[0]
    return known if known.ordered and known.q_offset == 0 and known.q_count == call.q.shape[2] else None


def law(call: AttendCall) -> dict[str, Any]:
    """The law's numbers and flags."""
    return {
        "window": 0 if call.window is None else min(call.window, FARTHEST),
        "sink_tokens": call.sink_tokens,
        "lookahead": 0 if call.lookahead is None else min(call.lookahead, FARTHEST),
        "BLOCK": call.block,
        "WINDOWED": call.window is not None,
        "BOUNDED": call.lookahead is not None,
    }


def sizes(call: AttendCall) -> dict[str, int]:
    """T queries; S0 keys that lie elsewhere and S others."""
    return {"T": call.q.shape[2], "S0": first_slots(call), "S": call.k.shape[2]}


def known(call: AttendCall, ordered: Known | None) -> dict[str, Any]:
    """Where queries and keys stand, if the host knows; positions relative to the first query's."""
    columns = first_slots(call) + call.k.shape[2]
    if ordered is None:
        return {"KNOWN": False, "columns": columns, "q_base": 0, "q_rest": 0, "head": 0, "k_shift": 0}
    shift = ordered.k_start - ordered.head - ordered.q_start
    return {
        "KNOWN": True,
        "columns": min(ordered.keys, columns),
        "q_base": min(ordered.q_start, FARTHEST),
        "q_rest": ordered.q_start % call.block,
        "head": ordered.head,
        "k_shift": min(max(shift, -FARTHEST), FARTHEST),
    }


def first_slots(call: AttendCall) -> int:
    return 0 if call.before is None else call.before[0].shape[2]


def heads(call: AttendCall) -> dict[str, Any]:
    """Queries, keys and values with their strides; what is not there is None."""
    q, q_sink, k, v = (None if x is None else _dense_heads(x) for x in (call.q, call.q_sink, call.k, call.v))
    before_k, before_v = (None, None) if call.before is None else map(_dense_heads, call.before)
    return {
        **{"q": q, "q_sink": q_sink, "k": k, "v": v, "before_k": before_k, "before_v": before_v},
        **{"q_strides": _strides(q), "q_sink_strides": _strides(q_sink), "k_strides": _strides(k)},
        **{"v_strides": _strides(v), "before_k_strides": _strides(before_k), "before_v_strides": _strides(before_v)},
    }


def bias(call: AttendCall) -> dict[str, Any]:
    """The terms of the bias: those with one number a query apart from those with one a pair."""
    B, H, T, _ = call.q.shape
    columns = call.k_pos.shape[1]
    terms = call.bias
    slope, key, row, table, dense = (None,) * 5
    if terms is not None:
        slope = None if terms.slope is None else terms.slope.contiguous()
        key = None if terms.key is None else _dense_heads(terms.key).expand(B, -1, columns)
        row = None if terms.row is None else _dense_heads(terms.row).expand(B, H, T)
        table = None if terms.table is None else _dense_heads(terms.table).expand(H, -1)
        dense = None if terms.dense is None else _dense_heads(terms.dense).expand(B, H, T, columns)
    key_strides = None if key is None else (key.stride(0), None if key.shape[1] == 1 else key.stride(1))
    return {
        "slope": slope,
        "row": row,
        "row_strides": _strides(row),
        "bias": (key, table, dense),
        "bias_strides": (key_strides, _strides(table), _strides(dense)),
        "zero": 0 if terms is None else terms.zero,
        "entries": 0 if table is None else table.shape[1],
    }


def _dense_heads(x: Tensor) -> Tensor:
    """The tensor, its last dimension without gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else x.stride()[:-1]


def empty_like_heads(q: Tensor) -> Tensor:
    """An output `[B, H, T, D]` that lies token after token, as the projection after attention wants it."""
    B, H, T, D = q.shape
    return torch.empty(B, T, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
