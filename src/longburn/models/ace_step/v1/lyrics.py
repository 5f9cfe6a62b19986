"""ACE-Step v1's lyric encoder: attention whose bias is learned and depends on the query (Transformer-XL, 1901.02860).

The score of query i and key j in head h is `((q_i + u_h).k_j + (q_i + v_h).(W_pos R(i - j))_h) / sqrt(d)`, with learned
u, v and W_pos and sinusoids R of the distance.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.attention import Attention
from longburn.bias import RelativeBias
from longburn.cache import AttnWindow, CacheManager, RollingKVCache, Step
from longburn.kernels.linear import linear
from longburn.models.ace_step.v1.config import LyricEncoderConfig

EPS = 1e-5
BIDIRECTIONAL = AttnWindow(lookahead=None)
AS_TRAINED: Mapping[int, float] = {}  # no factors


class FeedForward(nn.Module):
    """`down(silu(up(x)))`, with biases."""

    def __init__(self, dim: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, dtype=dtype)
        self.down = nn.Linear(hidden, dim, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        x = F.silu(linear(x, self.up.weight, self.up.bias))
        return linear(x, self.down.weight, self.down.bias, residual=residual)


class LyricLayer(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and added to the stream."""

    def __init__(self, config: LyricEncoderConfig, window: AttnWindow, dtype: torch.dtype) -> None:
        super().__init__()
        M, H = config.output_size, config.attention_heads
        self.attention_norm = nn.LayerNorm(M, eps=EPS, dtype=dtype)
        self.attention = Attention(
            M, H, window=window, qkv_bias=True, out_bias=True, bias=RelativeBias(M, H, dtype=dtype), dtype=dtype
        )
        self.mlp_norm = nn.LayerNorm(M, eps=EPS, dtype=dtype)
        self.mlp = FeedForward(M, config.linear_units, dtype)

    def forward(self, x: Tensor, step: Step, cache: RollingKVCache | None, query_scale: float) -> Tensor:
        normed = self.attention_norm(x)
        if query_scale == 1.0:
            x = self.attention.forward(normed, step, cache=cache, residual=x)
        else:
            scaled, named = _with_queries(self.attention, query_scale), {"cache": cache, "residual": x}
            x = torch.func.functional_call(self.attention, scaled, (normed, step), named)
        return self.mlp.forward(self.mlp_norm(x), residual=x)


class LyricEncoder(nn.Module):
    """Embeddings of lyrics to states: in both directions, as the released weights were trained, or a causal stream.

    >>> encoder = LyricEncoder(model.lyric_encoder.config, window=AttnWindow(256))
    >>> encoder.load_state_dict(model.lyric_encoder.state_dict())
    >>> cache = encoder.init_cache(batch=1)
    >>> states = [encoder(token, cache=cache) for token in tokens.split(1, dim=1)]  # the state stays that of 256 tokens

    Args:
        config: sizes.
        window: what a token sees. Default all others, earlier and later, as the released pipeline runs it.
            `AttnWindow()` is causal (the original's `static_chunk_size=1`), `AttnWindow(W)` needs bounded memory too.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: LyricEncoderConfig,
        *,
        window: AttnWindow = BIDIRECTIONAL,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        M = config.output_size
        self.config = config
        self.embed = nn.Linear(config.input_size, M, dtype=dtype)
        self.embed_norm = nn.LayerNorm(M, eps=EPS, dtype=dtype)
        self.layers = nn.ModuleList(LyricLayer(config, window, dtype) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(M, eps=EPS, dtype=dtype)

    @property
    def attentions(self) -> Sequence[Attention]:
        """The attention layers, first to last."""
        return [layer.attention for layer in self.layers]  # type: ignore[misc]

    def init_cache(self, batch: int, *, max_length: int | None = None, slack: int = 0) -> CacheManager:
        """Empty caches for `batch` rows of at most `max_length` tokens (None: no end); see `CacheManager`.

        Raises:
            ValueError: the encoder's window sees later tokens.
        """
        return CacheManager.for_layers(self.attentions, batch, max_length=max_length, slack=slack)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        cache: CacheManager | None = None,
        commit: bool = True,
        query_scale: Mapping[int, float] = AS_TRAINED,
    ) -> Tensor:
        """Embeddings `[B, T, input_size]` to states `[B, T, output_size]`.

        Args:
            x: the embeddings.
            mask: bool `[B, T]`, True where there is a token (default: everywhere); what is not may be anything. With a
                cache, on the CPU only, and not between tokens. States of what is not a token mean nothing.
            cache: of the stream that x goes on. None: x is all there is.
            commit: False leaves the cache's clock where it was, so that the next call writes the same positions again.
            query_scale: factors of the queries of some layers, by the layer's index.

        Raises:
            ValueError: shapes that disagree, or a cache for an encoder that sees later tokens.
        """
        B, T, size = x.shape
        if size != self.embed.in_features or (mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool)):
            came = "none" if mask is None else f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(
                f"LyricEncoder: x is {tuple(x.shape)} and the mask {came}, "
                f"wanted [B, T, {self.embed.in_features}] and bool [B, T]"
            )
        step = self._step(T, mask, cache, x.device)
        if mask is not None:
            x = torch.where(mask[..., None], x, 0)
        x = self.embed_norm(linear(x, self.embed.weight, self.embed.bias)) * math.sqrt(self.config.output_size)
        for index, layer in enumerate(self.layers):
            x = layer(x, step, None if cache is None else cache[index], query_scale.get(index, 1.0))
        if cache is not None and commit:
            cache.advance(step)
        out: Tensor = self.norm(x)
        return out

    def _step(self, T: int, mask: Tensor | None, cache: CacheManager | None, device: torch.device) -> Step:
        if cache is not None:
            return cache.positions(T if mask is None else torch.where(mask, 0, -1))
        if mask is None:
            return Step.from_zero(T, device)
        return Step.of(torch.where(mask, torch.arange(T, device=device), -1), read=False)


def _with_queries(attention: Attention, factor: float) -> dict[str, Tensor]:
    """The layer's projection of q, k and v, with q multiplied by the factor."""
    linear = attention.qkv
    queries = attention.heads * attention.head_dim
    by_row = torch.ones(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)
    by_row[:queries] = factor
    return {"qkv.weight": linear.weight * by_row[:, None], "qkv.bias": linear.bias * by_row}
