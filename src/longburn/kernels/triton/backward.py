"""Gradients of attention of many queries: those of q, k, v, sinks and of every term of the bias.

Each gradient is summed by one program in one order, so the bits never depend on the order in which programs run. What a
row of scores must lose, `delta`, is the product of output and output gradient, less the gradient of the log-sum-exp.
"""

from collections.abc import Set
from typing import Any

import torch
import triton
from torch import Tensor

from longburn.kernels.attend.call import AttendCall, BiasTerms
from longburn.kernels.triton import arguments, bias_gradients, ranges
from longburn.kernels.triton.backward_kernels import of_keys, of_queries
from longburn.kernels.triton.pairs import products

NARROW = 256  # a window of so few keys has smaller tiles


def backward(
    call: AttendCall, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None, wanted: Set[str]
) -> dict[str, Tensor]:
    """The gradients that are wanted, by name: q, k, v, q_sink, sinks, and slope, key, row, table, dense of the bias.

    The call has all its keys in one piece, in the type of q; out and lse are what it gave, dout and dlse the gradients
    of these, None where nothing depends on one.
    """
    q, bias = call.q, call.bias or BiasTerms()
    B, H, T, D = q.shape
    BD = max(16, triton.next_power_of_2(D))
    dout = torch.zeros_like(q) if dout is None else dout if dout.stride(3) == 1 else dout.contiguous()
    base2, delta = torch.empty_like(lse), torch.empty_like(lse)
    grid = (triton.cdiv(T, 32), B * H)
    products[grid](out, dout, out.stride()[:3], dout.stride()[:3], lse, base2, delta, T, H, D=D, BT=32, BD=BD)
    if dlse is not None:
        delta -= dlse

    given = arguments.heads(call)
    shared = {
        "heads": (given["q"], given["q_sink"], dout),
        "head_strides": (given["q_strides"], given["q_sink_strides"], dout.stride()[:3]),
        "numbers": (base2, delta),
        "main": (given["k"], given["v"], given["k_strides"], given["v_strides"]),
        **ranges.places(call),
        **arguments.sizes(call),
        **arguments.law(call),
        **arguments.bias(call),
        **{"scale": call.scale, "H": H, "G": call.groups, "D": D, "BD": BD},
    }
    found: dict[str, Tensor] = {}
    if wanted & {"q", "q_sink", "slope", "row", "sinks"}:
        found, rows = _gradients_of_queries(call, shared, wanted)
        found |= {} if rows is None else _of_rows(call, lse, delta, dlse, rows, wanted)
    if wanted & {"k", "v", "key"}:
        found |= _gradients_of_keys(call, shared, wanted)
    if "table" in wanted and bias.table is not None:
        found["table"] = bias_gradients.of_table(call, bias.table, shared)
    if "dense" in wanted and bias.dense is not None:
        found["dense"] = bias_gradients.of_dense(call, bias.dense, shared)
    return found


def _of_rows(
    call: AttendCall, lse: Tensor, delta: Tensor, dlse: Tensor | None, rows: Tensor, wanted: Set[str]
) -> dict[str, Tensor]:
    """What follows from each row's sums alone: a learned sink's weight has the value 0, and the others' add up to 1.

    The output was rounded, and delta with it; the sums over each row's keys (`rows`) make up for that.
    """
    found = {}
    sinks, row = call.sinks, None if call.bias is None else call.bias.row
    weight = torch.zeros_like(lse) if sinks is None else torch.exp(sinks[:, None] - lse).nan_to_num()
    ours = torch.zeros_like(lse) if dlse is None else dlse
    product = rows + delta * (1 - weight)  # of output and output gradient, unrounded
    if "sinks" in wanted and sinks is not None:
        found["sinks"] = (weight * (ours - product)).sum((0, 2)).to(sinks.dtype)
    if "row" in wanted and row is not None:
        each = torch.where(lse == -torch.inf, 0, weight * product + (1 - weight) * ours)
        found["row"] = each.sum_to_size(row.shape).to(row.dtype)
    return found


def _gradients_of_queries(
    call: AttendCall, shared: dict[str, Any], wanted: Set[str]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Those of the queries and of slopes, and the sums of each row's gradients if they are needed."""
    B, H, T, _ = call.q.shape
    slope = None if call.bias is None else call.bias.slope
    tile = _tile_of_queries(call)
    visits = ranges.of_queries(call, tile["BT"], tile["BN"])
    dq = arguments.empty_like_heads(call.q)
    dq_sink = None if call.q_sink is None else arguments.empty_like_heads(call.q)
    rows = torch.empty(B, H, T, device=dq.device) if wanted & {"sinks", "row"} else None
    distances = torch.empty(B, H, T, device=dq.device) if "slope" in wanted else None
    of_queries[(triton.cdiv(T, tile["BT"]) * B * H,)](
        **shared,
        **tile,
        ranges=visits,
        ranges_stride=ranges.stride(visits),
        dq=dq,
        dq_sink=dq_sink,
        dq_strides=dq.stride()[:3],
        rows=rows,
        distances=distances,
    )
    found = {"q": dq}
    if dq_sink is not None:
        found["q_sink"] = dq_sink
    if distances is not None and slope is not None:
        found["slope"] = -distances.sum((0, 2)).to(slope.dtype)
    return found, rows


def _gradients_of_keys(call: AttendCall, shared: dict[str, Any], wanted: Set[str]) -> dict[str, Tensor]:
    B, K, S, _ = call.k.shape
    key = None if call.bias is None else call.bias.key
    tile = _tile_of_keys(call)
    visits = ranges.of_keys(call, tile["BT"], tile["BN"])
    dk, dv = arguments.empty_like_heads(call.k), arguments.empty_like_heads(call.k)
    dkey = torch.empty(B, call.q.shape[1], S, device=dk.device) if "key" in wanted else None
    of_keys[(triton.cdiv(S, tile["BN"]) * B * K,)](
        **shared,
        **tile,
        ranges=visits,
        ranges_stride=ranges.stride(visits),
        dk=dk,
        dv=dv,
        dk_strides=dk.stride()[:3],
        dkey=dkey,
    )
    found = {"k": dk, "v": dv}
    if dkey is not None and key is not None:
        found["key"] = dkey.sum_to_size(key.shape).to(key.dtype)
    return found


def _tile_of_queries(call: AttendCall) -> dict[str, int]:
    """BT queries and BN keys at a time; a bias needs registers of its own. As measured on an H100."""
    D = call.q.shape[3]
    if call.q.dtype == torch.float32:
        BT, BN, warps, stages = (32, 32, 4, 1) if D <= 64 else (32, 16, 4 if D <= 128 else 8, 1)
    elif D > 128:
        BT, BN, warps, stages = 32 if call.bias is not None else 64, 32, 8, 1
    elif call.bias is not None:
        BT, BN, warps, stages = 64, 32, 8, 1
    elif call.window is not None and call.window <= NARROW:
        BT, BN, warps, stages = 64, 32, 4, 2
    else:
        BT, BN, warps, stages = (64, 64, 4, 2) if D <= 64 else (128, 64, 8, 3)
    return {"BT": BT, "BN": BN, "num_warps": warps, "num_stages": stages}


def _tile_of_keys(call: AttendCall) -> dict[str, int]:
    """BT queries and BN keys at a time."""
    D = call.q.shape[3]
    if call.q.dtype == torch.float32:
        BT, BN, warps, stages = (32, 32, 4, 1) if D <= 64 else (16, 32, 4 if D <= 128 else 8, 1)
    elif D > 128:
        BT, BN, warps, stages = 32, 32 if call.bias is not None else 64, 8, 1
    elif call.bias is not None:
        BT, BN, warps, stages = 32, 64, 8, 1
    elif D > 64 or (call.window is not None and call.window <= NARROW):
        BT, BN, warps, stages = 32, 64, 4, 2
    else:
        BT, BN, warps, stages = 64, 64, 4, 2
    return {"BT": BT, "BN": BN, "num_warps": warps, "num_stages": stages}
