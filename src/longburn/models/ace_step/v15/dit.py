"""The diffusion transformer of ACE-Step 1.5: the velocity of latent frames, given a context and conditions.

B batch, N frames (25 a second), L = ceil(N / 2) tokens, S tokens of the conditions, D its size, C the conditions'.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.attention import Attention, CrossAttention, CrossKeyValues
from longburn.cache import Step
from longburn.kernels.linear import linear
from longburn.models.ace_step.v15.config import AceStep15Config
from longburn.nn import Residual, RMSNorm, SwiGLU

FREQUENCIES = 128  # of the sinusoids of a timestep
LONGEST_PERIOD = 1e4
TIME_SCALE = 1000.0  # timesteps run from 0 to 1


class Modulation(NamedTuple):
    """How a timestep shifts, scales and gates every layer; for all rows alike or one a row.

    layers: `[B|1, layers, 6, D]`: shift, scale and gate of the attention, then of the feed-forward.
    out: `[B|1, 2, D]`: shift and scale before the output. Scales are what one multiplies by.
    """

    layers: Tensor
    out: Tensor


class TimeEmbedding(nn.Module):
    """A timestep as a vector, and as the six modulations that all layers share."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * FREQUENCIES, size, dtype=dtype)
        self.fc2 = nn.Linear(size, size, dtype=dtype)
        self.proj = nn.Linear(size, 6 * size, dtype=dtype)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t `[B]` to `[B, D]` and `[B, 6, D]`. The sinusoids are computed in fp32, as the model was trained."""
        octaves = torch.arange(FREQUENCIES, dtype=torch.float32, device=t.device) / FREQUENCIES
        phase = (t * TIME_SCALE).float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * octaves)
        waves = torch.cat([phase.cos(), phase.sin()], -1).to(self.fc1.weight.dtype)
        vector = self.fc2(F.silu(self.fc1(waves)))
        return vector, self.proj(F.silu(vector)).unflatten(-1, (6, -1))


class DiTLayer(nn.Module):
    """Attention to both sides, attention to the conditions, feed-forward; timesteps modulate the first and the last."""

    def __init__(self, config: AceStep15Config, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.attention_norm = RMSNorm(size, eps, dtype=dtype)
        self.attention = Attention(
            size,
            heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=config.window(layer),
            rope=config.rope,
            qk_norm=eps,
            dtype=dtype,
        )
        self.cross_norm = RMSNorm(size, eps, dtype=dtype)
        self.cross = CrossAttention(size, heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm=eps, dtype=dtype)
        self.mlp_norm = RMSNorm(size, eps, dtype=dtype)
        self.mlp = SwiGLU(size, config.intermediate_size, dtype=dtype)
        self.table = nn.Parameter(torch.empty(1, 6, size, dtype=dtype))
        nn.init.normal_(self.table, std=size**-0.5)

    def forward(self, stream: Residual, modulation: Tensor, conditions: CrossKeyValues, step: Step) -> Residual:
        """The stream `[B, L, D]` after this layer; modulation `[B|1, 6, D]`."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, 1)
        eps = self.mlp_norm.eps
        normed, x = stream.rms_norm(eps, self.attention_norm.weight, shift=shift, scale=scale)
        attended = Residual(x, self.attention.forward(normed, step), gate)
        normed, x = attended.rms_norm(eps, self.cross_norm.weight)
        crossed = Residual(x, self.cross.forward(normed, conditions))
        normed, x = crossed.rms_norm(eps, self.mlp_norm.weight, shift=mlp_shift, scale=mlp_scale)
        return Residual(x, self.mlp.forward(normed), mlp_gate)


class AceStepDiT(nn.Module):
    """The velocity of noisy latents. Nothing in it waits for the device, so a step can be recorded as a CUDA graph.

    Frames are taken in patches of two as tokens at the positions 0, 1, ...; even layers see `sliding_window` tokens on
    both sides, odd ones all. Keys and values of the conditions, and what a timestep modulates, do not change over a
    sampling loop and are computed before it: `conditions`, `modulations`.
    """

    def __init__(self, config: AceStep15Config, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.patch = nn.Linear(config.patch_size * config.in_channels, size, dtype=dtype)
        self.time = TimeEmbedding(size, dtype)
        self.time_r = TimeEmbedding(size, dtype)
        self.condition = nn.Linear(config.encoder_hidden_size, size, dtype=dtype)
        self.layers = nn.ModuleList(DiTLayer(config, layer, dtype) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, config.rms_norm_eps, dtype=dtype)
        self.table = nn.Parameter(torch.empty(1, 2, size, dtype=dtype))
        nn.init.normal_(self.table, std=size**-0.5)
        self.unpatch = nn.Linear(size, config.patch_size * config.audio_acoustic_hidden_dim, bias=False, dtype=dtype)
        self.unpatch_bias = nn.Parameter(torch.zeros(config.audio_acoustic_hidden_dim, dtype=dtype))

    @property
    def _layers(self) -> list[DiTLayer]:
        return list(self.layers)  # type: ignore[arg-type]

    def conditions(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[CrossKeyValues, ...]:
        """Every layer's keys and values of the conditions, for all steps of a sampling loop.

        Args:
            hidden: `[B, S, C]`.
            mask: bool `[B, S]`, True where there is a token. None: everywhere. With it a row of a batch is what it is
                alone; the released pipelines attend to padding too.

        Raises:
            ValueError: shapes that disagree.
        """
        if hidden.dim() != 3 or hidden.shape[2] != self.condition.in_features:
            raise ValueError(
                f"AceStepDiT.conditions: hidden is {tuple(hidden.shape)}, wanted [B, S, {self.condition.in_features}]"
            )
        context = linear(hidden, self.condition.weight, self.condition.bias)
        return tuple(layer.cross.keys_values(context, mask) for layer in self._layers)

    def modulations(self, ts: Sequence[float] | Tensor) -> tuple[Modulation, ...]:
        """What each of these timesteps modulates, for all rows alike; `forward` takes one in place of its timestep.

        Args:
            ts: the timesteps, or a tensor `[n]` of them, in whose type they are scaled.
        """
        t = ts if isinstance(ts, Tensor) else torch.tensor(ts, dtype=torch.float32, device=self.table.device)
        every = self.modulation(t)
        return tuple(Modulation(*(part[i : i + 1] for part in every)) for i in range(t.shape[0]))

    def modulation(self, t: Tensor) -> Modulation:
        """What the timesteps t `[B]` modulate.

        The model was trained with a second time r, and sees t - r too; sampling has r = t.
        """
        (vector, six), (vector_r, six_r) = self.time(t), self.time_r(torch.zeros_like(t[:1]))
        tables = torch.cat([layer.table for layer in self._layers])
        layers = tables + (six + six_r)[:, None]
        out = self.table + (vector + vector_r)[:, None]
        layers[:, :, 1::3] += 1  # the two scales
        out[:, 1] += 1
        return Modulation(layers, out)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float | Modulation,
        context_latents: Tensor,
        conditions: Sequence[CrossKeyValues],
    ) -> Tensor:
        """The velocity `[B, N, 64]`: noise minus music.

        Args:
            x: noisy latents `[B, N, 64]`, any number of frames.
            t: the timestep, 1 for noise and 0 for music: one for all rows, one a row `[B]`, or one of `modulations`.
            context_latents: `[B, N, 128]`: the source's latents, then the mask of what is to be made.
            conditions: see `conditions`.

        Raises:
            ValueError: shapes that disagree.
        """
        self._check(x, t, context_latents, conditions)
        if isinstance(t, float | int):
            t = torch.full((1,), t, dtype=torch.float32, device=x.device)
        modulation = t if isinstance(t, Modulation) else self.modulation(t)
        (B, frames, channels), patch = x.shape, self.config.patch_size
        both = F.pad(torch.cat([context_latents, x], -1), (0, 0, 0, -frames % patch))
        stream = Residual(linear(both.view(B, -1, self.patch.in_features), self.patch.weight, self.patch.bias))
        step = Step.from_zero(stream.x.shape[1], x.device)
        for i, (layer, held) in enumerate(zip(self._layers, conditions, strict=True)):
            stream = layer.forward(stream, modulation.layers[:, i], held, step)
        shift, scale = modulation.out.chunk(2, 1)
        normed = stream.rms_norm(self.norm.eps, self.norm.weight, shift=shift, scale=scale).normed
        h = linear(normed, self.unpatch.weight)
        return (h.reshape(B, -1, channels) + self.unpatch_bias)[:, :frames]

    def _check(
        self, x: Tensor, t: Tensor | float | Modulation, context: Tensor, conditions: Sequence[CrossKeyValues]
    ) -> None:
        config = self.config
        channels, others = config.audio_acoustic_hidden_dim, config.context_channels
        fits = x.dim() == 3 and x.shape[2] == channels and context.shape == (*x.shape[:2], others)
        if not fits or not x.numel():
            raise ValueError(
                f"AceStepDiT: x is {tuple(x.shape)} and context_latents {tuple(context.shape)}, "
                f"wanted [B, N, {channels}] and [B, N, {others}] with at least one frame"
            )
        B = x.shape[0]
        rows = t.layers.shape[0] if isinstance(t, Modulation) else t.numel() if isinstance(t, Tensor) else 1
        if rows not in (1, B) or (isinstance(t, Tensor) and t.dim() != 1):
            raise ValueError(f"AceStepDiT: timesteps of {rows} rows beside {B} rows of x, wanted 1 or as many: [B]")
        if len(conditions) != len(self.layers) or conditions[0].k.shape[0] != B:
            came = f"{len(conditions)} layers of {conditions[0].k.shape[0] if conditions else 0} rows"
            raise ValueError(f"AceStepDiT: conditions for {came}, wanted {len(self.layers)} layers of {B} rows")
