"""Distance curves that each query mixes for itself."""

import torch
from torch import nn

from longburn.bias.policy import BiasContext, Policy
from longburn.kernels.attend import BiasTerms


class DistanceCurves(Policy):
    """The bias `sum over r of w[i, h, r] * bank[r, i - j]` of query i and key j; 0 beyond the curves' n distances.

    The weights `w[i] = mix(x[i])` come from the query's own token, so every token says for every head how distance
    counts; the curves are shared by all heads. Nothing is kept for a token.

    Args:
        dim: model size M.
        heads: query heads H.
        curves: how many there are, R.
        distances: n, the length of a curve. Farther keys have no bias, nor have later ones.

    Raises:
        ValueError: no curves, or curves without a length.
    """

    rows = True

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        curves: int,
        distances: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if curves < 1 or distances < 1:
            raise ValueError(f"DistanceCurves: {curves} curves of {distances} distances, wanted at least one of each")
        self.heads = heads
        self.mix = nn.Linear(dim, heads * curves, bias=False, dtype=dtype, device=device)
        self.bank = nn.Parameter(torch.randn(curves, distances, dtype=dtype, device=device))

    def terms(self, context: BiasContext) -> BiasTerms:
        if context.x is None:
            raise ValueError("DistanceCurves: they depend on the layer's input; give them to Attention(bias=...)")
        B, T, _ = context.x.shape
        wide = torch.promote_types(context.q.dtype, torch.float32)
        weights = self.mix(context.x).to(wide).view(B, T, self.heads, -1).transpose(1, 2)
        by_distance = weights @ self.bank.to(wide)  # [B, H, T, n]
        distance = (context.q_pos[:, :, None] - context.k_pos[:, None])[:, None]  # [B|1, 1, T, S]
        n = by_distance.shape[3]
        dense = by_distance.gather(3, distance.clamp(0, n - 1).expand(B, self.heads, T, -1))
        return BiasTerms(dense=torch.where((distance >= 0) & (distance < n), dense, 0))
