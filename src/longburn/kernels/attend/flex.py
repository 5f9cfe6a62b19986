"""Attention through FlexAttention: CUDA, compiled, visiting only the tiles that the mask leaves."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longburn.kernels.attend.call import AttendCall, AttendResult, add_sinks

MAX_KINDS = 256  # different masks and biases that are compiled before it raises; PyTorch's own limit is 8
MIN_QUERIES = 128  # one tile; below it a compiled FlexAttention call is slower than a masked fused call


def why_not(call: AttendCall) -> str | None:
    """Why FlexAttention cannot, or should not, compute this call."""
    if call.q.device.type != "cuda":
        return f"needs CUDA, got {call.q.device.type}"
    if call.q.dtype == torch.float64:
        return "has no fp64"
    if call.q_sink is not None:
        return "has one query for all keys; relative sinks need two"
    if call.q.shape[2] < MIN_QUERIES:
        return f"needs at least {MIN_QUERIES} queries, got {call.q.shape[2]}"
    D = call.q.shape[3]
    if D & (D - 1) or D < 16:
        return f"head size {D} is not a power of two of at least 16"
    if (
        call.window is None
        and call.bias is None
        and call.sinks is None
        and not call.wants_lse
        and call.known is not None
    ):
        return "plain causal attention, for which sdpa's kernel is faster"
    return None


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # fullgraph: past the limit of recompilations PyTorch would fall back to a dense, unfused version without a word.
    return (
        torch.compile(flex_attention, dynamic=True, fullgraph=True),
        torch.compile(create_block_mask, dynamic=True, fullgraph=True),
    )


def attend_flex(call: AttendCall) -> AttendResult:
    """FlexAttention with the law as its mask and the bias's cheapest form as its score; sinks from the log-sum-exp."""
    flex_attention, create_block_mask = _compiled()
    B, _, T, _ = call.q.shape
    S = call.k.shape[2]
    q_pos, k_pos = call.q_pos.expand(B, T), call.k_pos.expand(B, S)
    filled = (call.k_pos >= 0)[:, None, :, None]
    k, v = torch.where(filled, call.k, 0), torch.where(filled, call.v, 0)
    window, sink_tokens, lookahead, block = call.window, call.sink_tokens, call.lookahead, call.block

    def mask(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        p, j = q_pos[b, t], k_pos[b, s]
        seen = (p >= 0) & (j >= 0)
        if lookahead is not None:
            near = j <= p + lookahead
            seen = seen & (near | (j // block == p // block) if block > 1 else near)
        if window is not None:
            seen = seen & ((p - j < window) | (j < sink_tokens))
        return seen

    with torch._dynamo.config.patch(recompile_limit=MAX_KINDS):
        tiles = create_block_mask(mask, B, None, T, S, device=call.q.device)
        out, lse = flex_attention(
            call.q,
            k,
            v,
            score_mod=_score(call),
            block_mask=tiles,
            scale=call.scale,
            enable_gqa=call.groups > 1,
            return_lse=True,
            kernel_options=_options(call),
        )
    return add_sinks((out, lse), call.sinks)


def _options(call: AttendCall) -> dict[str, Any] | None:
    """Tiles of a dense bias do not fit into shared memory beside the default number of stages of keys and values."""
    return {"num_stages": 1} if call.bias is not None and call.bias.dense is not None else None


def _score(call: AttendCall) -> Callable[..., Tensor] | None:
    terms = call.bias
    if terms is None:
        return None
    B, H, T, _ = call.q.shape
    S = call.k.shape[2]
    q_pos, k_pos = call.q_pos.expand(B, T), call.k_pos.expand(B, S)
    key = None if terms.key is None else terms.key.expand(B, H, S)
    row = None if terms.row is None else terms.row.expand(B, H, T)
    table = None if terms.table is None else terms.table.expand(H, -1)
    dense = None if terms.dense is None else terms.dense.expand(B, H, T, S)
    zero, slope = terms.zero, terms.slope

    def score(s: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        if slope is not None:
            s = s - slope[h] * torch.abs(q_pos[b, t] - k_pos[b, j])
        if key is not None:
            s = s + key[b, h, j]
        if row is not None:
            s = s + row[b, h, t]
        if table is not None:
            s = s + table[h, torch.clamp(q_pos[b, t] - k_pos[b, j] + zero, 0, table.shape[1] - 1)]
        if dense is not None:
            s = s + dense[b, h, t, j]
        return s

    return score
