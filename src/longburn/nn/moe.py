"""A mixture of experts: a router sends every token through a few of many feed-forward blocks.

M model size, I hidden size of an expert, E experts, k chosen for each token.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from longburn.kernels.experts import experts
from longburn.kernels.linear import linear
from longburn.kernels.mxfp4 import BLOCK, Mxfp4
from longburn.kernels.route import route

ExpertStorage = Literal["dense", "mxfp4"]


class Mxfp4Weight(nn.Module):
    """A weight `[..., out, in]` of 4.25 bits a value, as the buffers `blocks` and `scales`. It is not trained.

    Args:
        shape: of the values; `in` is a multiple of 32.

    Raises:
        ValueError: rows that are no multiple of 32 values.
    """

    blocks: Tensor
    scales: Tensor

    def __init__(self, *shape: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        if shape[-1] % BLOCK:
            raise ValueError(f"Mxfp4Weight: rows of {shape[-1]} values, wanted a multiple of {BLOCK}; store it dense")
        scales = (*shape[:-1], shape[-1] // BLOCK)
        self.register_buffer("blocks", torch.zeros(*scales, BLOCK // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(scales, dtype=torch.uint8, device=device))

    @property
    def value(self) -> Mxfp4:
        """The weight, as the kernels take it."""
        return Mxfp4(self.blocks, self.scales)


class Experts(nn.Module):
    """E feed-forward blocks with biases and the clamped SwiGLU of GPT-OSS, of which every token names those it takes.

    Args:
        dim, hidden, count: M, I and E.
        alpha, limit: of the activation, see `clamped_swiglu`.
        storage: "dense": `gate_up` `[E, 2 I, M]` (even rows gate, odd rows up) and `down` `[E, M, I]` are parameters of
            `dtype`. "mxfp4": they are `Mxfp4Weight`, read as they are and not trained. Biases are parameters always.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        count: int,
        *,
        alpha: float = 1.702,
        limit: float = 7.0,
        storage: ExpertStorage = "dense",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit

        def weight(out: int, size: int) -> nn.Parameter | Mxfp4Weight:
            if storage == "mxfp4":
                return Mxfp4Weight(count, out, size, device=device)
            return nn.Parameter(torch.empty(count, out, size, dtype=dtype, device=device))

        self.gate_up = weight(2 * hidden, dim)
        self.gate_up_bias = nn.Parameter(torch.empty(count, 2 * hidden, dtype=dtype, device=device))
        self.down = weight(dim, hidden)
        self.down_bias = nn.Parameter(torch.empty(count, dim, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Dense weights uniform within `1 / sqrt(in)`, as of `nn.Linear`; biases 0."""
        for weight, bias in ((self.gate_up, self.gate_up_bias), (self.down, self.down_bias)):
            if isinstance(weight, nn.Parameter):
                bound = weight.shape[-1] ** -0.5
                nn.init.uniform_(weight, -bound, bound)
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor, residual: Tensor | None = None) -> Tensor:
        """The sum of each token's chosen experts: x `[N, M]`, chosen int64 `[N, k]`, weights `[N, k]`, to `[N, M]`.

        residual: `[N, M]`, added to it.
        """
        gate_up, down = self.gate_up, self.down
        return experts(
            x,
            chosen,
            weights,
            gate_up.value if isinstance(gate_up, Mxfp4Weight) else gate_up,
            self.gate_up_bias,
            down.value if isinstance(down, Mxfp4Weight) else down,
            self.down_bias,
            alpha=self.alpha,
            limit=self.limit,
            residual=residual,
        )


class MoE(nn.Module):
    """Router and experts: the k experts with the largest router logits, weighted by the softmax over those k.

    Args:
        dim, hidden, count, top_k: M, I, E and k.
        alpha, limit, storage: see `Experts`.

    Raises:
        ValueError: more experts chosen than there are, or none.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        count: int,
        top_k: int,
        *,
        alpha: float = 1.702,
        limit: float = 7.0,
        storage: ExpertStorage = "dense",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= count:
            raise ValueError(f"MoE: {top_k} of {count} experts, wanted at least 1 and at most all")
        self.top_k = top_k
        self.router = nn.Linear(dim, count, dtype=dtype, device=device)
        self.experts = Experts(
            dim, hidden, count, alpha=alpha, limit=limit, storage=storage, dtype=dtype, device=device
        )

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For x `[N, M]` the experts of each token, int64 `[N, k]`, and their weights `[N, k]`, which sum to 1."""
        return route(linear(x, self.router.weight, self.router.bias), self.top_k)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[..., M]` to `[..., M]`. residual: of x's shape, added to the result before it is rounded; see `experts`."""
        rows = x.reshape(-1, x.shape[-1])
        chosen, weights = self.route(rows)
        along = None if residual is None else residual.reshape(rows.shape)
        return self.experts.forward(rows, chosen, weights, along).view_as(x)
