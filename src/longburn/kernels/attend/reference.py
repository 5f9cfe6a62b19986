"""Attention as it is meant: the readable specification that every other implementation is tested against."""

import torch
from torch import Tensor

from longburn.kernels.attend.call import AttendCall, AttendResult, add_sinks, bias_matrix, by_query_blocks, visible


def _attend(call: AttendCall) -> AttendResult:
    dtype = torch.promote_types(call.q.dtype, torch.float32)

    # Empty slots may hold anything, NaN included, and 0 * NaN is NaN: clear them, in the values and for the gradient.
    filled = (call.k_pos >= 0)[:, None, :, None]
    k = torch.where(filled, call.k.to(dtype), 0)
    v = torch.where(filled, call.v.to(dtype), 0)

    def grouped_heads(x: Tensor) -> Tensor:  # [B, H, ...] to [B, K, H / K, ...]
        return x.reshape(x.shape[0], call.k.shape[1], call.groups, *x.shape[2:])

    def scores_of(q: Tensor) -> Tensor:
        grouped = grouped_heads(q.to(dtype)) * call.scale
        return torch.einsum("bkgtd,bksd->bkgts", grouped, k).flatten(1, 2)

    scores = scores_of(call.q)
    if call.q_sink is not None:
        is_sink = (call.k_pos < call.sink_tokens)[:, None, None, :]
        scores = torch.where(is_sink, scores_of(call.q_sink), scores)
    bias = bias_matrix(call)
    if bias is not None:
        scores = scores + bias.to(dtype)

    # A row that sees nothing keeps finite scores on the way (so its gradient is 0, not NaN) and gives 0 and -inf.
    seen = visible(call)
    sees = seen.any(-1, keepdim=True)
    scores = torch.where(sees, scores.masked_fill(~seen, float("-inf")), 0)
    weights = torch.softmax(scores, -1) * sees
    out = torch.einsum("bkgts,bksd->bkgtd", grouped_heads(weights), v).flatten(1, 2)
    lse = torch.logsumexp(scores, -1).masked_fill(~sees[..., 0], float("-inf"))
    out, lse = add_sinks((out, lse), call.sinks)
    return out.to(call.q.dtype), lse


def attend_reference(call: AttendCall) -> AttendResult:
    """Dense attention in at least fp32, in blocks of queries when the score matrix would be large."""
    return by_query_blocks(call, _attend)


def why_not(call: AttendCall) -> str | None:
    """The reference computes everything."""
    return None
