"""What decoders share: embedding, layers over caches, final norm and head."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from longburn.attention import Attention
from longburn.cache import CacheManager, Step
from longburn.generation.model import check_tokens, last_of_rows
from longburn.kernels.linear import linear
from longburn.nn import RMSNorm


class Decoder(nn.Module):
    """A model of the next token; implements `AutoregressiveModel`.

    Args:
        vocab_size: V.
        dim: model size M.
        layers: first to last; each has an `attention` and is called with (x, step, its cache or None).
        norm: before the head.
        tied: the head is the embedding.
        dtype: of embedding and head.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        layers: Iterable[nn.Module],
        norm: RMSNorm,
        *,
        tied: bool = False,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        empty = torch.empty(vocab_size, dim, dtype=dtype)
        self.embed: nn.Embedding = nn.Embedding.from_pretrained(empty, freeze=False)  # type: ignore[no-untyped-call]
        if not self.embed.weight.is_meta:  # there PyTorch would load its compiler, 70 MiB, to draw nothing
            nn.init.normal_(self.embed.weight)
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.head = nn.Linear(dim, vocab_size, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        return self.embed.num_embeddings

    @property
    def attentions(self) -> Sequence[Attention]:
        """The attention layers, first to last."""
        return [layer.attention for layer in self.layers]  # type: ignore[misc]

    def init_cache(
        self, batch: int, *, max_length: int | None = None, slack: int = 0, packed: bool = False
    ) -> CacheManager:
        """Empty caches for `batch` rows of at most `max_length` positions (None: no end); see `CacheManager`."""
        return CacheManager.for_layers(self.attentions, batch, max_length=max_length, slack=slack, packed=packed)

    def forward_logits(
        self, tokens: Tensor, cache: CacheManager, *, all_positions: bool = False, commit: bool = True
    ) -> Tensor:
        """Logits of what follows the tokens, at the cache's next positions.

        Args:
            tokens: `[B, T]` int64; -1 is no token (padding on either side, or a row that pauses; on the CPU only).
            cache: is written to, and its clock advanced by the tokens of every row if `commit`.
            all_positions: `[B, T, V]` instead of `[B, V]` for each row's last token.
            commit: False leaves the clock where it was, so that the next call writes the same positions again.

        Raises:
            ValueError: a token id outside the vocabulary, or no room in the cache. Nothing is committed then.
        """
        return linear(self.forward_features(tokens, cache, all_positions, commit), self.head.weight)

    def forward_features(
        self, tokens: Tensor, cache: CacheManager, all_positions: bool = False, commit: bool = True
    ) -> Tensor:
        """What the head reads, `[B, M]` or `[B, T, M]`: `forward_logits` without its last product."""
        check_tokens(tokens, self.vocab_size)
        step = cache.positions(tokens)
        x = self.embed(tokens.to(self.embed.weight.device).clamp_min(0))
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, step, layer_cache)
        features = self.norm.forward(x if all_positions else last_of_rows(x, step))
        if commit:
            cache.advance(step)
        return features

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, T, V]` of whole sequences `[B, T]`, without a cache (training)."""
        check_tokens(tokens, self.vocab_size)
        step = Step.from_zero(tokens.shape[1], tokens.device)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, step, None)
        return linear(self.norm(x), self.head.weight)
