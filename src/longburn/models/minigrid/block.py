"""The layer that policy and world model share, and what is around it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longburn.attention import Attention
from longburn.cache import AttnWindow, CacheManager, RollingKVCache, Step
from longburn.nn import RMSNorm, SwiGLU
from longburn.rope import Rope3dEncoding, RotaryEncoding


class Block(nn.Module):
    """Attention and feed-forward, each behind an RMSNorm and added to the stream."""

    def __init__(
        self, dim: int, heads: int, hidden: int, rope: RotaryEncoding | Rope3dEncoding, window: AttnWindow
    ) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNorm(dim), RMSNorm(dim)
        self.attention = Attention(dim, heads, rope=rope, window=window)
        self.mlp = SwiGLU(dim, hidden)

    def forward(self, x: Tensor, step: Step | Tensor, cache: RollingKVCache | None) -> Tensor:
        x = self.attention.forward(self.attention_norm.forward(x), step, cache=cache, residual=x)
        return self.mlp.forward(self.mlp_norm.forward(x), residual=x)


class Stack(nn.Module):
    """Layers, and the norm after the last."""

    def __init__(self, blocks: Sequence[Block], dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(dim)

    @property
    def attentions(self) -> list[Attention]:
        """The attention layers, first to last."""
        return [block.attention for block in self.blocks]  # type: ignore[misc]

    @property
    def window(self) -> AttnWindow:
        """Of every layer. To be changed between streams only: caches are made for it."""
        return self.attentions[0].window

    @window.setter
    def window(self, window: AttnWindow) -> None:
        for attention in self.attentions:
            attention.window = window

    def init_cache(self, batch: int, *, max_length: int | None = None, slack: int = 0) -> CacheManager:
        """Empty caches for `batch` streams; see `CacheManager`."""
        return CacheManager.for_layers(self.attentions, batch, max_length=max_length, slack=slack)

    def forward(self, x: Tensor, positions: Step | Tensor, cache: CacheManager | None = None) -> Tensor:
        """`[B, T, M]` at these positions to what heads read; over the caches, if given, whose clock stands still."""
        caches = [None] * len(self.blocks) if cache is None else cache
        step = positions if isinstance(positions, Step) else Step.of(positions)
        for block, layer_cache in zip(self.blocks, caches, strict=True):
            x = block(x, step, layer_cache)
        return self.norm.forward(x)


def init_weights(model: nn.Module, layers: int) -> None:
    """Normal weights of deviation 0.02, smaller where they add to the stream; biases 0."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 0.02 / (2 * layers) ** 0.5 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02
            nn.init.normal_(parameter, std=scale)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def shift(positions: Tensor, by: Tensor) -> Tensor:
    """Positions `[1, T]` moved by whole numbers `[B]`: `[B, T]`."""
    return positions + torch.as_tensor(by, device=positions.device)[:, None]
