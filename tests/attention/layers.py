"""A layer with random fp64 weights, the oracle's answer for its tokens, and a stream through its cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from oracle import Weights, attention
from torch import Tensor

from longburn import Attention, AttnWindow, CacheManager, RotaryEncoding

M = 7  # model size
THETA = 100.0
NAN = float("nan")


@dataclass(frozen=True)
class Streamed:
    """A layer and the same weights for the oracle."""

    layer: Attention
    weights: Weights
    sinks: np.ndarray | None
    rope: bool

    def wanted(self, x: Tensor, **settings: np.ndarray) -> Tensor:
        """The oracle's output `[T, M]` for one row of tokens `[T, M]` at the positions 0 .. T - 1."""
        window = self.layer.window
        result = attention(
            x.detach().double().numpy(),
            self.weights,
            window=window.size,
            sink_tokens=window.sink_tokens,
            relative=window.relative_sinks,
            theta=THETA if self.rope else None,
            sinks=self.sinks,
            slopes=settings.get("slopes"),
            dense=settings.get("dense"),
            block=window.block,
        )
        return torch.tensor(result)

    def cache(self, batch: int = 1, *, slack: int = 0, max_length: int | None = None) -> CacheManager:
        return CacheManager.for_layers([self.layer], batch, slack=slack, max_length=max_length)


def build(
    window: AttnWindow | None = None,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 6,
    rope: bool = True,
    sinks: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Streamed:
    g = np.random.default_rng(seed)
    weights = Weights(
        g.normal(size=(heads, head_dim, M)),
        g.normal(size=(kv_heads, head_dim, M)),
        g.normal(size=(kv_heads, head_dim, M)),
        g.normal(size=(M, heads * head_dim)),
    )
    logits = 3 * g.normal(size=heads) if sinks else None
    layer = Attention(
        M,
        heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=window,
        rope=RotaryEncoding(head_dim, theta=THETA) if rope else None,
        sinks=sinks,
        dtype=dtype,
    )
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.tensor(np.concatenate([a.reshape(-1, M) for a in weights_of(weights)])))
        layer.out.weight.copy_(torch.tensor(weights.out))
        if layer.sinks is not None:
            layer.sinks.copy_(torch.tensor(logits))
    return Streamed(layer, weights, logits, rope)


def weights_of(weights: Weights) -> tuple[np.ndarray, ...]:
    return weights.q, weights.k, weights.v


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def forward(
    layer: Attention, x: Tensor, cache: CacheManager, ids: Tensor | None = None, *, commit: bool = True
) -> Tensor:
    """One call over the cache's next positions; `ids` -1 marks columns without a token."""
    step = cache.positions(x.shape[1] if ids is None else ids)
    with torch.no_grad():
        y = layer(x, step, cache=cache[0])
    if commit:
        cache.advance(step)
    return y


def stream(layer: Attention, x: Tensor, cache: CacheManager, chunks: Sequence[int]) -> Tensor:
    """All of x `[B, T, M]` in chunks of these sizes, the last of them repeated."""
    parts, at, sizes = [], 0, list(chunks)
    while at < x.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        parts.append(forward(layer, x[:, at : at + size], cache))
        at += size
    return torch.cat(parts, 1)


def padded(rows: Sequence[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch; NaN and -1 where there is no token."""
    width = max(len(row) for row in rows)
    x = torch.full((len(rows), width, M), NAN, dtype=rows[0].dtype)
    ids = torch.full((len(rows), width), -1)
    for b, row in enumerate(rows):
        own = slice(width - len(row), width) if left else slice(0, len(row))
        x[b, own], ids[b, own] = row, 0
    return x, ids
