"""The scores of a call, for biases that are computed from them."""

import torch
from torch import Tensor

from longburn.bias.policy import BiasContext


def scores(context: BiasContext) -> Tensor:
    """`scale * q . k` of every query and key, `[B, H, T, S]` in at least fp32; 0 for slots without a token."""
    assert context.k is not None
    dtype = torch.promote_types(context.q.dtype, torch.float32)
    k = torch.where((context.k_pos >= 0)[:, None, :, None], context.k.to(dtype), 0)

    def of(q: Tensor) -> Tensor:
        grouped = q.to(dtype).reshape(q.shape[0], k.shape[1], -1, *q.shape[2:]) * context.scale
        return torch.einsum("bkgtd,bksd->bkgts", grouped, k).flatten(1, 2)

    if context.q_sink is None:
        return of(context.q)
    return torch.where((context.k_pos < context.sink_tokens)[:, None, None, :], of(context.q_sink), of(context.q))


def check_causal(name: str, lookahead: int | None, block: int) -> None:
    """Queries see no later keys."""
    if lookahead != 0 or block != 1:
        raise ValueError(
            f"{name}: lookahead {lookahead}, block {block}: it is about the keys up to the query; "
            "give the layer a causal window (lookahead 0, block 1)"
        )
