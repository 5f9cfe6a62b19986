"""A layer of the video transformer: attention to the window of frames, to the start image, to actions; feed-forward."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longburn.attention import CrossKeyValues, attend
from longburn.cache import AttnWindow, RollingKVCache, Rotation
from longburn.kernels.attend import Known
from longburn.kernels.gelu import linear_gelu
from longburn.kernels.linear import linear
from longburn.models.matrix_game_2.action import Action, Heard
from longburn.models.matrix_game_2.config import MatrixGame2Config
from longburn.models.matrix_game_2.frames import FrameWindow, Place, attend_ring
from longburn.nn import Residual, RMSNorm


class Rings(NamedTuple):
    """A layer's share of the caches."""

    window: FrameWindow
    video: RollingKVCache
    mouse: RollingKVCache | None


class _Attention(nn.Module):
    """Queries and keys are normalised over all heads together, before they are cut into heads."""

    def __init__(self, config: MatrixGame2Config, dtype: torch.dtype) -> None:
        super().__init__()
        size = config.dim
        self.heads, self.scale = config.num_heads, config.head_dim**-0.5
        self.out = nn.Linear(size, size, dtype=dtype)
        self.q_norm = RMSNorm(size, config.eps, dtype=dtype)
        self.k_norm = RMSNorm(size, config.eps, dtype=dtype)

    def _cut(self, y: Tensor) -> Tensor:
        """`[B, T, D]` to `[B, heads, T, size]`."""
        return y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)

    def _joined(self, out: Tensor) -> Tensor:
        return linear(out.transpose(1, 2).flatten(2), self.out.weight, self.out.bias)


class VideoAttention(_Attention):
    """Attention of a block to the frames of its window, itself among them, without order within the block."""

    def __init__(self, config: MatrixGame2Config, dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        self.qkv = nn.Linear(config.dim, 3 * config.dim, dtype=dtype)

    def forward(self, x: Tensor, place: Place, rings: Rings) -> Tensor:
        """x `[B, T, D]` to `[B, T, D]`. Keys and values of x take the places of those that a pass before left there."""
        q, k, v = linear(x, self.qkv.weight, self.qkv.bias).chunk(3, 2)
        q, k, v = self._cut(self.q_norm.forward(q)), self._cut(self.k_norm.forward(k)), self._cut(v)
        held = rings.video.update(k, v, place.tokens, rotation=Rotation(q, place.angles, place.sink_angles, True))
        return self._joined(attend_ring(held, place, place.tokens, self.scale, window=rings.window))

    def remember(self, x: Tensor, place: Place, rings: Rings) -> None:
        """The keys and values of `forward` alone."""
        size = x.shape[2]
        k, v = linear(x, self.qkv.weight[size:], self.qkv.bias[size:]).chunk(2, 2)
        k, v = self._cut(self.k_norm.forward(k)), self._cut(v)
        rings.video.update(k, v, place.tokens, rotation=Rotation(None, place.angles, None, True))


class ImageAttention(_Attention):
    """Attention to the tokens of the start image, whose keys and values are computed once."""

    def __init__(self, config: MatrixGame2Config, dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        self.q = nn.Linear(config.dim, config.dim, dtype=dtype)
        self.kv = nn.Linear(config.dim, 2 * config.dim, dtype=dtype)

    def keys_values(self, context: Tensor) -> CrossKeyValues:
        """Of the image's tokens `[B, S, D]`."""
        pos = torch.arange(context.shape[1], device=context.device)[None]
        k, v = linear(context, self.kv.weight, self.kv.bias).chunk(2, 2)
        return CrossKeyValues(self._cut(self.k_norm.forward(k)).contiguous(), self._cut(v).contiguous(), pos, True)

    def forward(self, x: Tensor, image: CrossKeyValues, place: Place) -> Tensor:
        """x `[B, T, D]` to `[B, T, D]`."""
        q = self._cut(self.q_norm.forward(linear(x, self.q.weight, self.q.bias)))
        (T, S), device = (q.shape[2], image.k.shape[2]), x.device
        q_pos = place.tokens.share(("slots", T), lambda: torch.arange(T, device=device)[None])
        known = (Known(0, T, S, 0, 0, True),)
        everything = AttnWindow(lookahead=None)
        return self._joined(
            attend(q, image.k, image.v, q_pos=q_pos, k_pos=image.pos, window=everything, scale=self.scale, known=known)
        )


class Layer(nn.Module):
    """One layer; timesteps modulate its attention to the video and its feed-forward."""

    def __init__(self, config: MatrixGame2Config, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        size, self.eps = config.dim, config.eps
        self.attention = VideoAttention(config, dtype)
        self.image_norm_weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.image_norm_bias = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.image = ImageAttention(config, dtype)
        self.action = Action(config, dtype) if index in config.action_config.blocks else None
        self.up = nn.Linear(size, config.ffn_dim, dtype=dtype)
        self.down = nn.Linear(config.ffn_dim, size, dtype=dtype)
        self.table = nn.Parameter(torch.empty(1, 6, size, dtype=dtype))
        nn.init.normal_(self.table, std=size**-0.5)

    def forward(
        self,
        stream: Residual,
        modulation: Tensor,
        place: Place,
        rings: Rings,
        image: CrossKeyValues,
        heard: Heard | None,
    ) -> Residual:
        """The stream `[B, T, D]` after this layer; modulation `[B|1, F|1, 6, D]`: shift, scale and gate, twice."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.unbind(2)
        h, x = stream.layer_norm(self.eps, shift=shift, scale=scale)
        attended = Residual(x, self.attention.forward(h, place, rings), gate)
        h, x = attended.layer_norm(self.eps, weight=self.image_norm_weight, bias=self.image_norm_bias)
        seen = self.image.forward(h, image, place)
        stream = Residual(x, seen)
        if self.action is not None and heard is not None:
            stream = Residual(self.action.forward(x + seen, heard, place, rings.mouse))
        h, x = stream.layer_norm(self.eps, shift=ff_shift, scale=ff_scale)
        fed = linear(linear_gelu(h, self.up.weight, self.up.bias), self.down.weight, self.down.bias)
        return Residual(x, fed, ff_gate)

    def remember(self, stream: Residual, modulation: Tensor, place: Place, rings: Rings) -> None:
        """Only what later blocks see of this one."""
        h, _ = stream.layer_norm(self.eps, shift=modulation[:, :, 0], scale=modulation[:, :, 1])
        self.attention.remember(h, place, rings)
