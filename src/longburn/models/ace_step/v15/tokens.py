"""Audio tokens of ACE-Step 1.5: five latent frames (0.2 s) are one of 64000 ids, and back.

Groups of frames know nothing of each other. So a stream is coded as it comes, by any number of groups in a call, and
nothing is carried from one call to the next.

B batch, G groups of five frames, C size of the encoders.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.cache import Step
from longburn.kernels.linear import linear
from longburn.models.ace_step.v15.blocks import Encoder
from longburn.models.ace_step.v15.config import AceStep15Config


class FiniteScalarQuantizer(nn.Module):
    """A vector as a few numbers, each on one of a few levels between -1 and 1 (FSQ, Mentzer et al., arXiv 2309.15505).

    The id counts in mixed radix: level of the first number, plus `levels[0]` times that of the second, and so on.
    Everything is computed in fp32 at least: between levels lie thresholds.
    """

    def __init__(self, size: int, levels: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.levels = levels
        self.project_in = nn.Linear(size, len(levels), dtype=dtype)
        self.project_out = nn.Linear(len(levels), size, dtype=dtype)

    @property
    def codebook_size(self) -> int:
        """How many ids there are."""
        return math.prod(self.levels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x `[..., C]` to what stands for it, `[..., C]`, and ids, int64 `[...]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        numbers = F.linear(x.to(wide), self.project_in.weight.to(wide), self.project_in.bias.to(wide))
        ids, place = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device), 1
        for levels, y in zip(self.levels, numbers.unbind(-1), strict=True):
            bound = 1 + 1 / (levels - 1)  # beyond 1 by half a step: the outermost levels are as wide as the others
            y = torch.tanh(y / bound) * bound
            level = torch.floor((levels - 1) * (y.clamp(-1, 1) + 1) / 2 + 0.5)
            ids, place = ids + place * level.long(), place * levels
        return self.of_ids(ids).to(x.dtype), ids

    def of_ids(self, ids: Tensor) -> Tensor:
        """What ids `[...]` stand for, `[..., C]`, in the type of the weights.

        Raises:
            ValueError: ids out of range, on the CPU; elsewhere the host does not look.
        """
        if ids.is_cpu and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.codebook_size:
            raise ValueError(
                f"FiniteScalarQuantizer: ids from {int(ids.min())} to {int(ids.max())}, "
                f"wanted 0 to {self.codebook_size - 1}"
            )
        weight, numbers, rest = self.project_out.weight, [], ids
        wide = torch.promote_types(weight.dtype, torch.float32)
        for levels in self.levels:
            numbers.append((rest % levels).to(wide) * 2 / (levels - 1) - 1)
            rest = rest // levels
        return F.linear(torch.stack(numbers, -1), weight.to(wide), self.project_out.bias.to(wide)).to(weight.dtype)


class AudioTokenizer(nn.Module):
    """Latent frames to tokens: layers over a learned token and the five frames, whose first output is quantised."""

    def __init__(self, config: AceStep15Config, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        size = config.encoder_hidden_size
        self.group = config.pool_window_size
        self.project = nn.Linear(config.audio_acoustic_hidden_dim, size, dtype=dtype)
        self.pooler = Encoder(config, size, config.num_attention_pooler_hidden_layers, dtype)
        self.token = nn.Parameter(torch.empty(1, 1, size, dtype=dtype))
        nn.init.normal_(self.token, std=0.02)
        self.quantizer = FiniteScalarQuantizer(size, config.fsq_input_levels, dtype)

    def forward(self, latents: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the tokens stand for, `[B, G, C]`, and their ids, int64 `[B, G]`.

        Args:
            latents: `[B, N, 64]`.
            padding: `[1 or B, n, 64]`, frames (of silence) whose first ones fill the last group.

        Raises:
            ValueError: a last group that is not full and no padding for it, or other shapes.
        """
        channels = self.project.in_features
        if latents.dim() != 3 or latents.shape[2] != channels:
            raise ValueError(f"AudioTokenizer: latents are {tuple(latents.shape)}, wanted [B, N, {channels}]")
        if short := -latents.shape[1] % self.group:
            if padding is None or padding.shape[1] < short:
                raise ValueError(
                    f"AudioTokenizer: {latents.shape[1]} frames are no whole groups of {self.group}; "
                    f"give {short} frames of silence as padding"
                )
            filler = padding[:, :short].to(latents).expand(latents.shape[0], -1, -1)
            latents = torch.cat([latents, filler], 1)
        x = linear(latents.reshape(-1, self.group, channels), self.project.weight, self.project.bias)
        x = linear(x, self.pooler.embed.weight, self.pooler.embed.bias)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        pooled = self.pooler.forward(x, Step.from_zero(self.group + 1, x.device))[:, 0]
        values, ids = self.quantizer.forward(pooled.view(latents.shape[0], -1, pooled.shape[-1]))
        return values, ids


class AudioDetokenizer(nn.Module):
    """Tokens to latent frames: every token five times, each beside its own learned vector, through layers."""

    def __init__(self, config: AceStep15Config, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        size = config.encoder_hidden_size
        self.group = config.pool_window_size
        self.encoder = Encoder(config, size, config.num_attention_pooler_hidden_layers, dtype)
        self.tokens = nn.Parameter(torch.empty(1, self.group, size, dtype=dtype))
        nn.init.normal_(self.tokens, std=0.02)
        self.project = nn.Linear(size, config.audio_acoustic_hidden_dim, dtype=dtype)

    def forward(self, values: Tensor) -> Tensor:
        """What tokens stand for, `[B, G, C]`, to latent frames `[B, 5 G, 64]`.

        Raises:
            ValueError: other shapes.
        """
        size = self.project.in_features
        if values.dim() != 3 or values.shape[2] != size:
            raise ValueError(f"AudioDetokenizer: values are {tuple(values.shape)}, wanted [B, G, {size}]")
        B, G, _ = values.shape
        x = linear(values, self.encoder.embed.weight, self.encoder.embed.bias)
        x = x.reshape(B * G, 1, -1) + self.tokens
        x = self.encoder.forward(x, Step.from_zero(self.group, x.device))
        return linear(x, self.project.weight, self.project.bias).view(B, G * self.group, -1)
