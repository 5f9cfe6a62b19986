"""Feed-forward blocks."""

import torch
from torch import Tensor, nn

from longburn.kernels.feedforward import clamped_swiglu, swiglu

__all__ = ["SwiGLU", "clamped_swiglu"]


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202).

    Gate and up are one weight, `[2 * hidden, dim]`, gate first.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=bias, dtype=dtype, device=device)
        self.down = nn.Linear(hidden, dim, bias=bias, dtype=dtype, device=device)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[..., dim]` to `[..., dim]`; the residual, of the same shape, is added to the result."""
        gate_up, down = self.gate_up, self.down
        return swiglu(x, gate_up.weight, down.weight, gate_up.bias, down.bias, residual=residual)
