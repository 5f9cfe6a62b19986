"""How actions reach the video: attention along time at every place for the mouse, and to the frames' keys.

B rows, F latent frames of n tokens each, D model size, C size of the attentions (heads times their size).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.cache import KeyValues, RollingKVCache, Rotation
from longburn.kernels.linear import linear
from longburn.kernels.norm import HeadNorms
from longburn.kernels.rotate import rotate
from longburn.models.matrix_game_2.config import MatrixGame2Config
from longburn.models.matrix_game_2.frames import Place, attend_ring
from longburn.nn import Residual

NORM_EPS = 1e-6
MLP_EPS = 1e-5


class Heard(NamedTuple):
    """What a layer heard of a block's actions; the same in all passes over it."""

    mouse: Tensor | None  # [B, F, C]: their share of the mouse's first projection
    keys: KeyValues  # of the keyboard, in its ring


class MouseAttention(nn.Module):
    """Every token hears the mouse, and then the same place of the frames before (and within its block, after)."""

    def __init__(self, config: MatrixGame2Config, dtype: torch.dtype) -> None:
        super().__init__()
        action = config.action_config
        size = action.mouse_hidden_dim
        self.heads, self.head_dim = action.heads_num, action.head_dim
        # The first projection takes a token and the actions side by side; these are the same at every place.
        self.token = nn.Linear(config.dim, size, bias=False, dtype=dtype)
        self.signal = nn.Linear(action.mouse_dim_in * action.window, size, dtype=dtype)
        self.mix = nn.Linear(size, size, dtype=dtype)
        self.norm_weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.norm_bias = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.qkv = nn.Linear(size, 3 * size, bias=False, dtype=dtype)
        self.out = nn.Linear(size, config.dim, bias=False, dtype=dtype)

    def hear(self, windows: Tensor) -> Tensor:
        """What the first projection has of the actions `[B, F, window, signals]`, `[B, F, C]`."""
        return linear(windows.flatten(2), self.signal.weight, self.signal.bias)

    def forward(self, x: Tensor, heard: Tensor, place: Place, ring: RollingKVCache) -> Tensor:
        """x `[B, F * n, D]` with what the attention adds to it."""
        B, T, _ = x.shape
        frames, H = heard.shape[1], self.heads
        n = T // frames
        mixed = linear(x, self.token.weight).view(B, frames, n, -1) + heard[:, :, None]
        mixed = linear(F.gelu(mixed, approximate="tanh"), self.mix.weight, self.mix.bias).view(B, T, -1)
        mixed = Residual(mixed).layer_norm(MLP_EPS, weight=self.norm_weight, bias=self.norm_bias).normed
        # Places are rows: [B * n, heads, F, size] each.
        qkv = linear(mixed, self.qkv.weight).view(B, frames, n, 3, H, self.head_dim).permute(3, 0, 2, 4, 1, 5)
        q, k, v = (part.reshape(B * n, H, frames, self.head_dim) for part in qkv)
        norms = HeadNorms(place.ones, place.ones, NORM_EPS)
        held = ring.update(k, v, place.frames, rotation=Rotation(q, place.frame_angles, None, True, norms))
        out = attend_ring(held, place, place.frames, self.head_dim**-0.5, window=None)
        out = out.reshape(B, n, H, frames, self.head_dim).permute(0, 3, 1, 2, 4).reshape(B, T, -1)
        return linear(out, self.out.weight, residual=x)


class KeyboardAttention(nn.Module):
    """Every token attends to the keys that were held at the frames of the window, one key and value a frame."""

    def __init__(self, config: MatrixGame2Config, dtype: torch.dtype) -> None:
        super().__init__()
        action = config.action_config
        size = action.keyboard_hidden_dim
        self.heads, self.head_dim = action.heads_num, action.head_dim
        self.embed_in = nn.Linear(action.keyboard_dim_in, action.hidden_size, dtype=dtype)
        self.embed_out = nn.Linear(action.hidden_size, action.hidden_size, dtype=dtype)
        self.kv = nn.Linear(action.hidden_size * action.window, 2 * size, bias=False, dtype=dtype)
        self.q = nn.Linear(config.dim, size, bias=False, dtype=dtype)
        self.out = nn.Linear(size, config.dim, bias=False, dtype=dtype)

    def hear(self, windows: Tensor, place: Place, ring: RollingKVCache) -> KeyValues:
        """Write the keys and values of the actions `[B, F, window, keys]` to the ring, and give what it holds."""
        B, frames = windows.shape[:2]
        embedded = F.silu(linear(windows, self.embed_in.weight, self.embed_in.bias))
        embedded = linear(embedded, self.embed_out.weight, self.embed_out.bias).flatten(2)
        kv = linear(embedded, self.kv.weight).view(B, frames, 2, self.heads, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4)
        norms = HeadNorms(place.ones, place.ones, NORM_EPS)
        return ring.update(k, v, place.frames, rotation=Rotation(None, place.frame_angles, None, True, norms))

    def forward(self, x: Tensor, heard: KeyValues, place: Place) -> Tensor:
        """x `[B, F * n, D]` with what the attention adds to it."""
        B, T, _ = x.shape
        q = linear(x, self.q.weight).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        q = rotate(q, *place.query_angles, interleaved=True, weight=place.ones, eps=NORM_EPS)
        out = attend_ring(heard, place, place.frames, self.head_dim**-0.5, q=q, window=None)
        return linear(out.transpose(1, 2).reshape(B, T, -1), self.out.weight, residual=x)


class Action(nn.Module):
    """The mouse, where the model has one, then the keyboard."""

    def __init__(self, config: MatrixGame2Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.mouse = MouseAttention(config, dtype) if config.action_config.enable_mouse else None
        self.keyboard = KeyboardAttention(config, dtype)

    def hear(self, mouse: Tensor | None, keyboard: Tensor, place: Place, ring: RollingKVCache) -> Heard:
        """What is the same in all passes over a block with these actions, `[B, F, window, signals]` each."""
        heard = None if self.mouse is None or mouse is None else self.mouse.hear(mouse)
        return Heard(heard, self.keyboard.hear(keyboard, place, ring))

    def forward(self, x: Tensor, heard: Heard, place: Place, ring: RollingKVCache | None) -> Tensor:
        """x `[B, F * n, D]`; the ring is the mouse's."""
        if self.mouse is not None and heard.mouse is not None and ring is not None:
            x = self.mouse.forward(x, heard.mouse, place, ring)
        return self.keyboard.forward(x, heard.keys, place)
