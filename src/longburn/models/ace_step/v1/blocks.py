"""The blocks of ACE-Step v1's transformer. B rows, F latent frames, S places of the condition, D model size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.attention import CrossAttention, CrossKeyValues, LinearAttention, attend
from longburn.cache import AttnWindow, Run, Step
from longburn.kernels.attend import Known
from longburn.kernels.linear import linear
from longburn.models.ace_step.v1.config import AceStepV1Config
from longburn.rope import MismatchedRotaryEncoding

EPS = 1e-6
PATCH_CHANNELS = 256  # hidden channels of the patch embedding for every channel of the latents
TIME_SCALE = 1000.0  # the noise level runs from 0 to 1, the clock that the model was trained with from 0 to this
FREQUENCIES = 128  # of the sinusoids of the time
LONGEST_PERIOD = 1e4


class PatchEmbed(nn.Module):
    """Latents `[B, C, height, F]` to tokens `[B, F, D]`: a token is a frame."""

    def __init__(self, config: AceStepV1Config, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = PATCH_CHANNELS * config.in_channels
        self.conv = nn.Conv2d(config.in_channels, hidden, config.patch_size, config.patch_size, dtype=dtype)
        self.norm = nn.GroupNorm(32, hidden, eps=EPS, dtype=dtype)
        self.out = nn.Conv2d(hidden, config.inner_dim, 1, dtype=dtype)

    def forward(self, latents: Tensor) -> Tensor:
        x: Tensor = self.out(self.norm(self.conv(latents)))
        return x.flatten(2).transpose(1, 2)


class TimeEmbedding(nn.Module):
    """A noise level `[B]` to `[B, D]`. The sinusoids are computed in fp32, as the model was trained."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(2 * FREQUENCIES, dim, dtype=dtype)
        self.down = nn.Linear(dim, dim, dtype=dtype)

    def forward(self, t: Tensor) -> Tensor:
        exponents = -math.log(LONGEST_PERIOD) * torch.arange(FREQUENCIES, dtype=torch.float32, device=t.device)
        phase = (TIME_SCALE * t.float())[:, None] * torch.exp(exponents / FREQUENCIES)
        waves = torch.cat((phase.cos(), phase.sin()), -1).to(self.up.weight.dtype)
        return linear(F.silu(linear(waves, self.up.weight, self.up.bias)), self.down.weight, self.down.bias)


class MismatchedCrossAttention(CrossAttention):
    """Cross attention with v1's position encoding: queries by their frame, keys by their place in the condition."""

    def __init__(self, config: AceStepV1Config, rope: MismatchedRotaryEncoding, dtype: torch.dtype) -> None:
        super().__init__(
            config.inner_dim,
            config.num_attention_heads,
            head_dim=config.attention_head_dim,
            qkv_bias=True,
            out_bias=True,
            dtype=dtype,
        )
        self.rope = rope

    def keys_values(self, context: Tensor, mask: Tensor | None = None) -> CrossKeyValues:
        """The condition's keys, which carry their positions, and values; see `CrossAttention.keys_values`."""
        held = super().keys_values(context, mask)
        places = torch.arange(context.shape[1], device=context.device)[None]
        return held._replace(k=self.rope.rotate(held.k, self.rope.angles(places, _wide(context))))

    def forward(
        self,
        x: Tensor,
        context: Tensor | CrossKeyValues,
        *,
        bias: Tensor | None = None,
        step: Step | None = None,
        query_scale: float = 1.0,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`[B, F, D]` to `[B, F, D]`; what `CrossAttention` does not have:

        Args:
            step: positions of the frames (default `0 .. F - 1`); -1 is no frame and attends to nothing.
            query_scale: factor of the queries.
            residual: `[B, F, D]`, added to the result.
        """
        B, T, _ = x.shape
        step = Step.from_zero(T, x.device) if step is None else step
        frames = step.positions
        held = context if isinstance(context, CrossKeyValues) else self.keys_values(context)
        wide = _wide(x)
        angles = step.share(("angles", id(self.rope), wide), lambda: self.rope.angles(frames, wide))
        q = linear(x, self.q.weight, self.q.bias).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        in_order = held.full and step.runs == (Run(0, T),)
        out = attend(
            self.rope.rotate(q, angles),
            held.k,
            held.v,
            q_pos=frames,
            k_pos=held.pos,
            window=AttnWindow(lookahead=None),
            bias=bias,
            scale=self.scale * query_scale,
            known=(Known(0, T, held.k.shape[2], 0, 0, True),) if in_order else None,
        )
        return linear(out.transpose(1, 2).reshape(B, T, -1), self.out.weight, self.out.bias, residual=residual)


class GatedConv(nn.Module):
    """Feed-forward along time: a frame also sees its two neighbours, whether or not they are masked (`GLUMBConv`)."""

    def __init__(self, dim: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden, dtype=dtype)
        self.conv = nn.Conv1d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, dtype=dtype)
        self.down = nn.Linear(hidden, dim, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, F, D]` to `[B, F, D]`."""
        wide = F.silu(linear(x, self.up.weight, self.up.bias))
        value, gate = self.conv(wide.transpose(1, 2)).transpose(1, 2).chunk(2, -1)
        return linear(value * F.silu(gate), self.down.weight)


class AceStepV1Block(nn.Module):
    """Linear self-attention and feed-forward, each modulated by the time; cross attention between them, which is not.

    `table` `[6, D]` is this block's own part of (shift, scale, gate) of both.
    """

    def __init__(self, config: AceStepV1Config, rope: MismatchedRotaryEncoding, dtype: torch.dtype) -> None:
        super().__init__()
        D = config.inner_dim
        self.table = _table(6, D, dtype)
        self.attention = LinearAttention(
            D,
            config.num_attention_heads,
            head_dim=config.attention_head_dim,
            rope=rope,
            qkv_bias=True,
            out_bias=True,
            dtype=dtype,
        )
        self.cross = MismatchedCrossAttention(config, rope, dtype)
        self.mlp = GatedConv(D, config.mlp_hidden, dtype)

    def forward(self, x: Tensor, time: Tensor, condition: CrossKeyValues, step: Step, query_scale: float) -> Tensor:
        """x `[B, F, D]`, time `[B, 6, D]`."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.table + time).unsqueeze(2).unbind(1)
        x = torch.addcmul(x, gate, self.attention.forward(_modulated(x, shift, scale), step))
        x = self.cross.forward(x, condition, step=step, query_scale=query_scale, residual=x)
        return torch.addcmul(x, mlp_gate, self.mlp.forward(_modulated(x, mlp_shift, mlp_scale)))


class FinalLayer(nn.Module):
    """Tokens `[B, F, D]` to latents `[B, C, height, F]`. `table` `[2, D]`: shift and scale, to which the time adds."""

    def __init__(self, config: AceStepV1Config, dtype: torch.dtype) -> None:
        super().__init__()
        D, self.height = config.inner_dim, config.max_height
        self.table = _table(2, D, dtype)
        self.linear = nn.Linear(D, config.max_height * config.out_channels, dtype=dtype)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x `[B, F, D]`, time `[B, D]`."""
        shift, scale = (self.table + time[:, None]).unsqueeze(2).unbind(1)
        x = linear(_modulated(x, shift, scale), self.linear.weight, self.linear.bias)
        return x.view(*x.shape[:2], self.height, -1).permute(0, 3, 2, 1)


def _table(rows: int, dim: int, dtype: torch.dtype) -> nn.Parameter:
    table = nn.Parameter(torch.empty(rows, dim, dtype=dtype))
    if not table.is_meta:  # there PyTorch would load its compiler to draw nothing
        nn.init.normal_(table, std=dim**-0.5)
    return table


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
