"""Attention of many queries on Hopper GPUs, forward: where the host knows the order of queries and keys."""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longburn.kernels.attend.call import AttendCall, AttendResult, Known
from longburn.kernels.triton import arguments
from longburn.kernels.triton.hopper_kernel import LOG2E, forward
from longburn.kernels.triton.hopper_tiles import GROUPS, ROWS, TILE

CAPABILITY = (9, 0)  # its wgmma instructions are those of Hopper alone
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
STAGES = {64: 4, 128: 2}  # tiles of keys, and as many of values, that fit beside each other; by head size
MIN_QUERIES = ROWS.value
ALIGNMENT = 16  # bytes, of everything that the copy engine reads


def hopper_why_not(call: AttendCall) -> str | None:
    """Why this kernel cannot, or should not, compute this call. It computes no gradients, and does not ask for any."""
    if reason := _law_why_not(call):
        return reason
    device = call.q.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != CAPABILITY:
        return f"needs a CUDA device of capability 9.0, got {device}"
    return next((reason for x in (call.q, call.k, call.v, *(call.before or ())) if (reason := _copy_why_not(x))), None)


def _law_why_not(call: AttendCall) -> str | None:
    q, D = call.q, call.q.shape[3]
    if q.dtype not in DTYPES or call.k.dtype != q.dtype or call.v.dtype != q.dtype:
        return f"takes q, k and v in bf16 or fp16, got {q.dtype}, {call.k.dtype} and {call.v.dtype}"
    if D not in STAGES or call.v.shape[3] != D:
        return f"takes head sizes {' and '.join(map(str, STAGES))}, got {D} and {call.v.shape[3]}"
    if q.shape[2] < MIN_QUERIES:
        return f"needs at least {MIN_QUERIES} queries, got {q.shape[2]}"
    if call.scales is not None or call.q_sink is not None:
        return "takes one query, and keys in the type of q"
    terms = call.bias
    if terms is not None and any(x is not None for x in (terms.key, terms.row, terms.table, terms.dense)):
        return "takes a bias by slope only"
    if call.scale <= 0:
        return f"takes a positive scale, got {call.scale}"
    known = arguments.ordered(call)
    if known is None or known.keys <= arguments.first_slots(call):
        return "needs queries and keys whose order the host knows, the same in all rows"
    if _slots(call, known) is None:
        return f"takes kept tokens apart from the other keys only where nothing else stands there, got {known}"
    return None


def attend_hopper(call: AttendCall) -> AttendResult:
    """The output in the type of q, token after token in memory, and the log-sum-exp in fp32."""
    q, k, v = call.q, call.k, call.v
    B, H, T, D = q.shape
    known = arguments.ordered(call)
    law = None if known is None else _slots(call, known)
    assert known is not None
    assert law is not None
    border = arguments.first_slots(call)
    out = arguments.empty_like_heads(q)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    tiles = triton.cdiv(T, GROUPS.value * ROWS.value) * B * H
    blocks = torch.cuda.get_device_properties(q.device).multi_processor_count
    with torch.cuda.device(q.device):
        forward[(min(tiles, blocks),)](
            _tiles(q, T, ROWS.value),
            _tiles(k, known.keys - border, TILE.value),
            _tiles(v, known.keys - border, TILE.value),
            *(
                None if x is None else _tiles(x, border, TILE.value)
                for x in (call.before if border and call.before else (None, None))
            ),
            _tiles(out, T, ROWS.value),
            lse,
            sinks=None if call.sinks is None else call.sinks.contiguous(),
            slopes=None if (slope := _slope(call)) is None else slope.contiguous(),
            factor=call.scale * LOG2E.value,
            **law,
            H=H,
            G=call.groups,
            pairs=B * H,
            border=border,
            D=D,
            STAGES=STAGES[D],
            num_warps=4,
        )
    return out, lse


def _slots(call: AttendCall, known: Known) -> dict[str, int] | None:
    """The law's numbers, in slots; None if it cannot be said in slots.

    Where positions are missing between the first slots and the others, distances between slots on both sides of the gap
    are not those of positions, so the first slots must be such that every query sees them, whatever the distance.
    """
    gap = known.k_start - known.head
    if gap and known.head:
        later = known.q_start >= known.k_start and (call.lookahead is None or call.lookahead >= 0)
        always = call.window is None or known.head <= call.sink_tokens
        if not later or not always or _slope(call) is not None:
            return None
    first = known.q_start - gap
    if first < 0 or first + known.q_count > arguments.FARTHEST:
        return None
    beyond = max(call.sink_tokens - known.k_start, 0)
    kept = known.head + beyond if beyond else min(known.head, call.sink_tokens)
    return {
        "T": known.q_count,
        "keys": known.keys,
        "first": first,
        "rest": known.q_start % call.block,
        "kept": kept,
        **{name: value for name, value in arguments.law(call).items() if name != "sink_tokens"},
    }


def _slope(call: AttendCall) -> Tensor | None:
    return None if call.bias is None else call.bias.slope


def _tiles(x: Tensor, slots: int, rows: int) -> TensorDescriptor:
    """How to copy `rows` of the first `slots` of `[B, H, S, D]` at a time; what is not there reads as zeros."""
    B, H, _, D = x.shape
    return TensorDescriptor(x, [B, H, slots, D], _strides(x), [1, 1, rows, D], _layout(rows, D, x.dtype))


@cache
def _layout(rows: int, D: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How such a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, D], DTYPES[dtype])


def _strides(x: Tensor) -> list[int]:
    """The strides, with a harmless one where there is nothing to stride over."""
    return [stride if size > 1 else x.shape[3] for size, stride in zip(x.shape[:3], x.stride(), strict=False)] + [
        x.stride(3)
    ]


def _copy_why_not(x: Tensor) -> str | None:
    *strides, last = _strides(x)
    size = x.element_size()
    if last == 1 and x.data_ptr() % ALIGNMENT == 0 and all(s and s * size % ALIGNMENT == 0 for s in strides):
        return None
    return f"needs heads without gaps, {ALIGNMENT} bytes aligned, got strides {x.stride()}"
