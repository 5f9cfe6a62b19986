"""Feed-forward blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.kernels.linear import linear


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

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`."""
        gate, up = linear(x, self.gate_up.weight, self.gate_up.bias).chunk(2, -1)
        return linear(F.silu(gate) * up, self.down.weight, self.down.bias)
