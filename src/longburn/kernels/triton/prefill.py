"""Attention of many queries, forward: every call that `attend` knows."""

from typing import Any

import torch
import triton

from longburn.kernels.attend.call import AttendCall, AttendResult
from longburn.kernels.triton import arguments, ranges
from longburn.kernels.triton.prefill_kernel import forward_kernel

NARROW = 256  # a window of so few keys has smaller tiles


def prefill(call: AttendCall) -> AttendResult:
    """Attention of any number of queries, and its log-sum-exp in fp32; keys and values are in the type of q."""
    q = call.q
    B, H, T, D = q.shape
    tile = _tile(call)
    BM, BN = tile["BM"], tile["BN"]
    out = arguments.empty_like_heads(q)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    known = arguments.ordered(call)
    visits = None if known is not None else ranges.of_queries(call, BM, BN, call.groups)
    forward_kernel[(triton.cdiv(T * call.groups, BM) * B * call.k.shape[1],)](
        **arguments.heads(call),
        **(ranges.NOWHERE if known is not None else ranges.places(call)),
        **arguments.sizes(call),
        **arguments.law(call),
        **arguments.bias(call),
        **arguments.known(call, known),
        ranges=visits,
        ranges_stride=ranges.stride(visits),
        sinks=call.sinks,
        out=out,
        out_strides=out.stride()[:3],
        lse=lse,
        scale=call.scale,
        K=call.k.shape[1],
        G=call.groups,
        D=D,
        BD=max(16, triton.next_power_of_2(D)),
        **tile,
    )
    return out, lse


def _tile(call: AttendCall) -> dict[str, Any]:
    """The size of a tile and how it is computed, as measured on an H100; more of a call's features take more memory."""
    D, bias = call.q.shape[3], call.bias
    by_pair = bias is not None and (
        bias.table is not None or bias.dense is not None or (bias.key is not None and bias.key.shape[1] > 1)
    )
    registers = None  # a thread's limit, where a lower one lets another program run beside it
    if call.q.dtype == torch.float32:
        BM, BN, warps, stages = (32, 32, 4, 2) if D <= 64 else (32, 16, 4 if D <= 128 else 8, 1)
    elif by_pair:
        BM, BN, warps, stages = (64, 32, 4, 2) if D <= 128 else (64, 32, 8, 1)
    elif call.q_sink is not None:
        BM, BN, warps, stages = (128 if D <= 128 else 64), 64, 8, 2
    elif D > 128:
        BM, BN, warps, stages = 128, 64, 8, 2
    elif call.window is not None and call.window <= NARROW:
        BM, BN, warps, stages, registers = 64, 32, 4, 2, 128 if D <= 64 else None
    else:
        BM, BN, warps, stages, registers = 64, 64, 4, 3, 168 if D <= 64 else None
    return {"BM": BM, "BN": BN, "num_warps": warps, "num_stages": stages, "maxnreg": registers}
