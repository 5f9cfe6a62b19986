"""What ACE-Step 1.5 is conditioned on: lyrics, the timbre of references and a caption, as one sequence.

B batch, T tokens, R references of N latent frames, C size of the encoders.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longburn.cache import Step
from longburn.kernels.linear import linear
from longburn.models.ace_step.v15.blocks import Encoder
from longburn.models.ace_step.v15.config import AceStep15Config


class Conditions(NamedTuple):
    """What the transformer attends to: `[B, S, C]`, and where there is a token, bool `[B, S]` (None: everywhere).

    A row's tokens stand first; what follows them is 0.
    """

    hidden: Tensor
    mask: Tensor | None = None


class ConditionEncoder(nn.Module):
    """Encoders of lyrics and timbre and a projection of the caption, put one after the other.

    `null` `[1, 1, C]` is what base models learnt in place of all conditions, for guidance. Any number of copies of it
    is attended to as one is.
    """

    def __init__(self, config: AceStep15Config, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        size = config.encoder_hidden_size
        self.text = nn.Linear(config.text_hidden_dim, size, bias=False, dtype=dtype)
        self.lyrics = Encoder(config, config.text_hidden_dim, config.num_lyric_encoder_hidden_layers, dtype)
        self.timbre = Encoder(config, config.timbre_hidden_dim, config.num_timbre_encoder_hidden_layers, dtype)
        self.null = nn.Parameter(torch.empty(1, 1, size, dtype=dtype))
        nn.init.normal_(self.null)

    def forward(
        self,
        text: Tensor,
        lyrics: Tensor,
        timbre: Tensor,
        *,
        text_mask: Tensor | None = None,
        lyric_mask: Tensor | None = None,
        timbre_mask: Tensor | None = None,
    ) -> Conditions:
        """Lyrics, then timbre, then caption; tokens that are there first, in this order.

        Args:
            text: `[B, T, 1024]`, the last hidden state of the text encoder.
            lyrics: `[B, T', 1024]`, that encoder's embeddings of the tokens, before its layers.
            timbre: `[B, R, N, 64]`, latents of the references (30 s each, of silence where there is none).
            text_mask, lyric_mask: bool `[B, T]`, True where there is a token; None: everywhere. What is masked may be
                anything.
            timbre_mask: bool `[B, R]`, True where there is a reference; None: everywhere.

        Raises:
            ValueError: shapes that disagree.
        """
        self._check(text, lyrics, timbre)
        masks = (lyric_mask, timbre_mask, text_mask)
        shapes = (lyrics.shape[:2], timbre.shape[:2], text.shape[:2])
        for name, mask, shape in zip(("lyric_mask", "timbre_mask", "text_mask"), masks, shapes, strict=True):
            if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
                raise ValueError(
                    f"ConditionEncoder: {name} is {mask.dtype} {tuple(mask.shape)}, wanted bool {tuple(shape)}"
                )
        parts = (self.encode_lyrics(lyrics, lyric_mask), self.encode_timbre(timbre), linear(text, self.text.weight))
        hidden = torch.cat(parts, 1)
        if all(mask is None for mask in masks):
            return Conditions(hidden)
        return pack(hidden, torch.cat([_filled(mask, part) for mask, part in zip(masks, parts, strict=True)], 1))

    def encode_lyrics(self, lyrics: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B, T, 1024]` to `[B, T, C]`; see `forward`. What is masked is seen by nobody."""
        step = Step.from_zero(lyrics.shape[1], lyrics.device)
        if mask is not None:
            step = Step.of(torch.where(mask, step.positions, -1), read=False)
        return self.lyrics.forward(_embed(self.lyrics, lyrics), step)

    def encode_timbre(self, timbre: Tensor) -> Tensor:
        """`[B, R, N, 64]` to `[B, R, C]`: what the layers make of a reference's first frame."""
        flat = timbre.flatten(0, 1)
        encoded = self.timbre.forward(_embed(self.timbre, flat), Step.from_zero(flat.shape[1], flat.device))
        return encoded[:, 0].view(*timbre.shape[:2], -1)

    def _check(self, text: Tensor, lyrics: Tensor, timbre: Tensor) -> None:
        words, channels = self.text.in_features, self.timbre.embed.in_features
        fits = text.dim() == lyrics.dim() == 3 and timbre.dim() == 4 and text.shape[0] == lyrics.shape[0]
        sized = fits and text.shape[2] == lyrics.shape[2] == words and timbre.shape[3] == channels
        if not sized or timbre.shape[0] != text.shape[0] or not timbre.shape[2]:
            raise ValueError(
                f"ConditionEncoder: text {tuple(text.shape)}, lyrics {tuple(lyrics.shape)}, timbre "
                f"{tuple(timbre.shape)}: wanted [B, T, {words}], [B, T', {words}] and [B, R, N, {channels}] of one B"
            )


def pack(hidden: Tensor, mask: Tensor) -> Conditions:
    """Every row's tokens first, in their order, then zeros; hidden `[B, S, C]`, mask bool `[B, S]`."""
    order = mask.to(torch.uint8).argsort(stable=True, dim=1, descending=True)
    packed = mask.gather(1, order)
    moved = hidden.gather(1, order[..., None].expand_as(hidden))
    return Conditions(torch.where(packed[..., None], moved, 0), packed)


def _embed(encoder: Encoder, x: Tensor) -> Tensor:
    return linear(x, encoder.embed.weight, encoder.embed.bias)


def _filled(mask: Tensor | None, part: Tensor) -> Tensor:
    return torch.ones(part.shape[:2], dtype=torch.bool, device=part.device) if mask is None else mask


def thirds(latents: Tensor, frames: int) -> Tensor:
    """A third of `frames` each from the beginning, from a third on, and from the end; repeated where it is shorter."""
    times = -(-frames // latents.shape[1])
    latents, third = latents.repeat(1, times, 1), frames // 3
    total = latents.shape[1]
    starts = (0, total // 3, total - third)
    return torch.cat([latents[:, start : start + third] for start in starts], 1)
