"""Normalisation layers."""

import torch
from torch import Tensor, nn

from longburn.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in fp32 (arXiv 1910.07467).

    `round_last`: multiply by the weight before rounding to the type of x (GPT-OSS), not after (Llama).
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        round_last: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.round_last = eps, round_last
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`."""
        return rms_norm(x, self.weight, self.eps, round_last=self.round_last)
