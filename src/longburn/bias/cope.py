"""CoPE (Golovneva et al., arXiv 2405.18719): positions that count what a query cares for."""

import torch
from torch import Tensor, nn

from longburn.bias.policy import BiasContext, Policy
from longburn.bias.scores import check_causal, scores
from longburn.kernels.attend import BiasTerms


class Cope(Policy):
    """Contextual positions: the key at position j is as far from the query as the sum of `sigmoid(score)` over the keys
    it sees from j up to itself, at most `positions - 1`. The bias is the query's product with the embedding there,
    between two whole numbers in proportion.

    With a window, only what the query sees is counted, kept sink tokens as the farthest. It needs all scores of a
    query, which are computed once more and written out in rows; no state. Meant for layers without rotary encoding, as
    a turned query's product with the embedding would depend on where it stands.

    Args:
        head_dim: D.
        positions: how many there are; the parameter `pos_emb` is `[D, positions]`, shared by the heads, 0 at the start.

    Raises:
        ValueError: a size below 1; when used, a window with later keys.
    """

    rows = True
    keys = True
    causal = True
    reads_queries = True

    def __init__(
        self,
        head_dim: int,
        positions: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if head_dim < 1 or positions < 1:
            raise ValueError(f"Cope: head_dim {head_dim}, positions {positions}: wanted at least 1 of each")
        self.head_dim = head_dim
        self.pos_emb = nn.Parameter(torch.zeros(head_dim, positions, dtype=dtype, device=device))

    def terms(self, context: BiasContext) -> BiasTerms:
        check_causal("Cope", context.lookahead, context.block)
        D, positions = self.pos_emb.shape
        if context.q.shape[3] != D:
            raise ValueError(f"Cope: built for heads of size {D}, the call has {context.q.shape[3]}")
        gates = torch.where(context.visible(), scores(context).sigmoid(), 0)
        place = _sum_from_each(gates, context).clamp(max=positions - 1)
        below = place.detach().floor()
        share = place - below
        at = below.long()
        products = context.q.to(gates.dtype) @ self.pos_emb.to(gates.dtype)
        lower = products.gather(3, at)
        upper = products.gather(3, (at + 1).clamp(max=positions - 1))
        return BiasTerms(dense=(1 - share) * lower + share * upper)


def _sum_from_each(gates: Tensor, context: BiasContext) -> Tensor:
    """The sum of `[B, H, T, S]` over each key and those at later positions."""
    if context.known is not None and len(context.known) == 1 and context.known[0].ordered:
        return _suffix_sums(gates)
    order = context.k_pos.argsort(1)
    back = order.argsort(1)
    in_order = gates.gather(3, order[:, None, None].expand_as(gates))
    return _suffix_sums(in_order).gather(3, back[:, None, None].expand_as(gates))


def _suffix_sums(x: Tensor) -> Tensor:
    return x.flip(3).cumsum(3).flip(3)
