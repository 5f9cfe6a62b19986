"""DAPE (Zheng et al., arXiv 2405.14722): a bias adapted to the scores, by a small network across the heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.bias.policy import BiasContext, BiasPolicy, Policy
from longburn.bias.scores import scores
from longburn.kernels.attend import BiasTerms
from longburn.kernels.attend.call import AttendCall, bias_matrix


class Dape(Policy):
    """The bias `B + mlp([A; B])` of every query and key, where A are the scores of all heads and B another bias.

    All heads of a pair are needed together, so the scores are computed once more and the bias is written out in rows;
    no state.

    Args:
        base: B, a policy without numbers of its own for every token (in the paper ALiBi, KERPLE or FIRE).
        heads: query heads H.
        width: of the hidden layer (leaky ReLU) of `mlp`, from 2 H to H numbers.

    Raises:
        ValueError: a size below 1, or a base that keeps numbers for every token or changes queries.
    """

    rows = True
    keys = True

    def __init__(
        self,
        base: BiasPolicy,
        heads: int,
        *,
        width: int = 32,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or width < 1:
            raise ValueError(f"Dape: heads {heads}, width {width}: wanted at least 1 of each")
        if isinstance(base, Policy) and (base.channels or base.changes_queries):
            more = f"keeps {base.channels} numbers for every token" if base.channels else "changes queries"
            raise ValueError(
                f"Dape: {type(base).__name__} {more}; wanted a base that depends on positions and scores only"
            )
        self.heads = heads
        self.base = base
        self.mlp = nn.Sequential(
            nn.Linear(2 * heads, width, dtype=dtype, device=device),
            nn.LeakyReLU(),
            nn.Linear(width, heads, dtype=dtype, device=device),
        )

    def terms(self, context: BiasContext) -> BiasTerms:
        H = self.heads
        if context.q.shape[1] != H:
            raise ValueError(f"Dape: built for {H} heads, the call has {context.q.shape[1]} query heads")
        score = scores(context)
        base = self._base(context, score)
        first, first_bias, second, second_bias = (x.to(score.dtype) for x in self.mlp.parameters())
        hidden = _across_heads(first[:, :H], score) + _across_heads(first[:, H:], base) + first_bias[:, None, None]
        adapted = _across_heads(second, F.leaky_relu(hidden)) + second_bias[:, None, None]
        return BiasTerms(dense=base + adapted)

    def _base(self, context: BiasContext, score: Tensor) -> Tensor:
        """The base written out, `[B|1, H, T, S]`."""
        q, terms = context.q, self.base.terms(context)
        call = AttendCall(*(q, q, q, context.q_pos, context.k_pos, context.scale), bias=terms)
        bias = bias_matrix(call)
        if bias is None:
            return torch.zeros_like(score[:1])
        return bias.to(score.dtype).expand(-1, self.heads, *score.shape[2:])


def _across_heads(weight: Tensor, x: Tensor) -> Tensor:
    """`[n, H]` times `[B, H, T, S]` in every place: `[B, n, T, S]`."""
    return torch.einsum("nh,bhts->bnts", weight, x)
