"""Forgetting attention (FoX; Lin et al., arXiv 2503.02130): a learned gate says how much each token lets fade."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.bias.policy import BiasContext, Policy
from longburn.bias.scores import check_causal
from longburn.kernels.attend import BiasTerms


class ForgetBias(Policy):
    """The bias `log f[j + 1] + ... + log f[i]` of query i and key j, with `f[t] = sigmoid(gate(x[t]))` for every head.

    So every token that comes weakens all before it, by as much as it decides. What is kept for a token is one number a
    query head, the sum `-log f` up to it; the bias is the key's less the query's.

    Without a cache the sums start with the call: in fp32, differences are then exact to about 1e-7 of the largest sum.

    Args:
        dim: model size M.
        heads: query heads H.

    Raises:
        ValueError: (when used) a window with later keys.
    """

    sums = True
    causal = True

    def __init__(
        self, dim: int, heads: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.channels = self.heads = heads
        self.gate = nn.Linear(dim, heads, dtype=dtype, device=device)

    def of_tokens(self, x: Tensor, q: Tensor, k: Tensor, positions: Tensor, previous: Tensor) -> Tensor:
        forgotten = F.softplus(-self.gate(x).to(previous.dtype)).transpose(1, 2)  # -log f, [B, H, T]
        forgotten = torch.where(positions[:, None] >= 0, forgotten, 0)
        return forgotten.cumsum(2) + previous.unsqueeze(2)

    def terms(self, context: BiasContext) -> BiasTerms:
        if context.extra is None or context.own is None:
            raise ValueError("ForgetBias: the sums of its gates are kept by the layer; give it to Attention(bias=...)")
        check_causal("ForgetBias", context.lookahead, context.block)
        return BiasTerms(key=context.extra, row=-context.own)
