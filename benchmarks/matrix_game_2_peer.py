"""Matrix-Game 2's transformer in plain PyTorch, the way it was released: what the benchmark is compared with.

Eager operators and `scaled_dot_product_attention`; caches that are cloned and rolled when they are full; every pass
computes again what the passes over a block share. Weights are a state dict in the released names, without `model.`.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
Rolled = dict[str, Any]  # keys, values, and how many units were ever written


class Peer:
    """The model and its caches: `cache_units` latent frames, the first `sinks` of them kept."""

    def __init__(self, weights: Weights, config: Mapping[str, Any], *, window: int, sinks: int = 0) -> None:
        self.w, self.config, self.window, self.sinks = weights, config, window, sinks
        self.caches: dict[str, Rolled] = {}
        self.image: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(
        self, x: Tensor, t: Tensor, clip: Tensor, cond: Tensor, mouse: Tensor | None, keyboard: Tensor, start: int
    ) -> Tensor:
        """The velocity of x `[B, 16, F, H, W]` at timesteps t `[B, F]`, frames from `start` on.

        mouse, keyboard: what every frame hears, `[B, F, 12, signals]`.
        """
        B, _, frames, H, W = x.shape
        h, w = H // 2, W // 2
        tokens = F.conv3d(
            torch.cat([x, cond], 1), self.w["patch_embedding.weight"], self.w["patch_embedding.bias"], (1, 2, 2)
        )
        tokens = tokens.flatten(2).transpose(1, 2)
        dim, dtype = tokens.shape[-1], tokens.dtype
        half = self.config["freq_dim"] // 2
        rates = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
        phase = t.double()[..., None] * rates
        e = self._linear("time_embedding.0", torch.cat([phase.cos(), phase.sin()], -1).to(dtype))
        e = self._linear("time_embedding.2", F.silu(e))
        e0 = self._linear("time_projection.1", F.silu(e)).view(B, frames, 6, dim)
        context = F.layer_norm(clip, (1280,), self.w["img_emb.proj.0.weight"], self.w["img_emb.proj.0.bias"])
        context = self._linear("img_emb.proj.3", F.gelu(self._linear("img_emb.proj.1", context)))
        context = F.layer_norm(context, (dim,), self.w["img_emb.proj.4.weight"], self.w["img_emb.proj.4.bias"])
        rope = self._rope(dim // self.config["num_heads"], start, frames, h, w, x.device)
        for i in range(self.config["num_layers"]):
            tokens = self._block(i, tokens, e0, context, mouse, keyboard, rope, start, frames)
        shift, scale = (self.w["head.modulation"][:, None] + e[:, :, None]).unbind(2)
        out = self._linear("head.head", self._modulated(tokens, shift, scale, frames))
        return out.view(B, frames, h, w, 2, 2, 16).permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape)

    def _block(
        self,
        i: int,
        x: Tensor,
        e0: Tensor,
        context: Tensor,
        mouse: Tensor | None,
        keyboard: Tensor,
        rope: Tensor,
        start: int,
        frames: int,
    ) -> Tensor:
        name = f"blocks.{i}."
        m = (self.w[name + "modulation"][:, None] + e0).unbind(2)
        eps, heads = self.config.get("eps", 1e-6), self.config["num_heads"]
        y = self._modulated(x, m[0], m[1], frames)
        q, k, v = self._qkv(name + "self_attn.", y, y, heads)
        q, k = self._turn(q, rope), self._turn(k, rope)
        per_frame = x.shape[1] // frames
        k, v = self._roll(f"video.{i}", k, v, start * per_frame, self.window * per_frame, self.sinks * per_frame)
        y = self._linear(name + "self_attn.o", self._sdpa(q, k, v))
        x = x + (y.unflatten(1, (frames, -1)) * m[2][:, :, None]).flatten(1, 2)
        y = F.layer_norm(x, x.shape[-1:], self.w[name + "norm3.weight"], self.w[name + "norm3.bias"], eps)
        q = self._heads(self._rms(self._linear(name + "cross_attn.q", y), name + "cross_attn.norm_q.weight"), heads)
        if i not in self.image:
            k = self._rms(self._linear(name + "cross_attn.k", context), name + "cross_attn.norm_k.weight")
            self.image[i] = self._heads(k, heads), self._heads(self._linear(name + "cross_attn.v", context), heads)
        x = x + self._linear(name + "cross_attn.o", self._sdpa(q, *self.image[i]))
        if i in self.config["action_config"]["blocks"]:
            x = self._act(name + "action_model.", i, x, mouse, keyboard, start, frames)
        y = self._linear(name + "ffn.0", self._modulated(x, m[3], m[4], frames))
        y = self._linear(name + "ffn.2", F.gelu(y, approximate="tanh"))
        return x + (y.unflatten(1, (frames, -1)) * m[5][:, :, None]).flatten(1, 2)

    def _act(
        self, name: str, i: int, x: Tensor, mouse: Tensor | None, keyboard: Tensor, start: int, frames: int
    ) -> Tensor:
        heads, (B, T, _) = self.config["action_config"]["heads_num"], x.shape
        n = T // frames
        if mouse is not None:
            beside = mouse.flatten(2).repeat_interleave(n, 1)
            y = F.gelu(self._linear(name + "mouse_mlp.0", torch.cat([x, beside], -1)), approximate="tanh")
            y = self._linear(name + "mouse_mlp.2", y)
            y = F.layer_norm(y, y.shape[-1:], self.w[name + "mouse_mlp.3.weight"], self.w[name + "mouse_mlp.3.bias"])
            y = F.linear(y, self.w[name + "t_qkv.weight"]).unflatten(1, (frames, n)).transpose(1, 2).flatten(0, 1)
            q, k, v = (part.unflatten(-1, (heads, -1)) for part in y.chunk(3, -1))
            q, k = self._turn_time(self._per_head(q), start), self._turn_time(self._per_head(k), start)
            k, v = self._roll(f"mouse.{i}", k, v, start, self.window, 0)
            y = self._sdpa(q, k, v).unflatten(0, (B, n)).transpose(1, 2).flatten(1, 2)
            x = x + F.linear(y, self.w[name + "proj_mouse.weight"])
        y = F.silu(self._linear(name + "keyboard_embed.0", keyboard))
        y = self._linear(name + "keyboard_embed.2", y).flatten(2)
        k, v = (
            part.unflatten(-1, (heads, -1))
            for part in F.linear(y, self.w[name + "keyboard_attn_kv.weight"]).chunk(2, -1)
        )
        k, v = self._roll(f"keys.{i}", self._turn_time(self._per_head(k), start), v, start, self.window, 0)
        q = self._per_head(F.linear(x, self.w[name + "mouse_attn_q.weight"]).unflatten(-1, (heads, -1)))
        q = q.unflatten(1, (frames, n)).transpose(1, 2).flatten(0, 1)  # every place looks at copies of the keys
        q = self._turn_time(q, start)
        y = self._sdpa(q, k.repeat_interleave(n, 0), v.repeat_interleave(n, 0))
        y = y.unflatten(0, (B, n)).transpose(1, 2).flatten(1, 2)
        return x + F.linear(y, self.w[name + "proj_keyboard.weight"])

    def _roll(self, name: str, k: Tensor, v: Tensor, start: int, capacity: int, sinks: int) -> tuple[Tensor, Tensor]:
        """Write `[B, T, heads, size]` at units from `start` on; all that is held then, the oldest evicted."""
        new, end = k.shape[1], start + k.shape[1]
        cache = self.caches.setdefault(
            name,
            {"k": k.new_zeros(k.shape[0], capacity, *k.shape[2:]), "v": v.new_zeros(v.shape[0], capacity, *v.shape[2:])}
            | {
                "end": torch.zeros(1, dtype=torch.int64, device=k.device),
                "held": torch.zeros_like(k[0, :1, 0, 0].long()),
            },
        )
        total, held = int(cache["end"].item()), int(cache["held"].item())
        stop = held + end - total
        if end > total and stop > capacity:
            evicted = stop - capacity
            kept = held - evicted - sinks
            for part in ("k", "v"):
                cache[part][:, sinks : sinks + kept] = cache[part][:, sinks + evicted : sinks + evicted + kept].clone()
            stop = capacity
        cache["k"][:, stop - new : stop], cache["v"][:, stop - new : stop] = k, v
        cache["end"].fill_(end)
        cache["held"].fill_(stop)
        return cache["k"][:, :stop], cache["v"][:, :stop]

    def _qkv(self, name: str, x: Tensor, context: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        q = self._rms(self._linear(name + "q", x), name + "norm_q.weight")
        k = self._rms(self._linear(name + "k", context), name + "norm_k.weight")
        return self._heads(q, heads), self._heads(k, heads), self._heads(self._linear(name + "v", context), heads)

    def _modulated(self, x: Tensor, shift: Tensor, scale: Tensor, frames: int) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], eps=self.config.get("eps", 1e-6)).unflatten(1, (frames, -1))
        return (y * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def _rms(self, x: Tensor, weight: str) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.get("eps", 1e-6))
        return normed.to(x.dtype) * self.w[weight]

    @staticmethod
    def _per_head(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    @staticmethod
    def _heads(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1))

    @staticmethod
    def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    @staticmethod
    def _rope(size: int, start: int, frames: int, h: int, w: int, device: torch.device) -> Tensor:
        """Turns of every token `[T, size / 2]`, complex128: made again in every pass, as the released code does."""
        pairs = size // 2
        counts = (pairs - 2 * (size // 6), size // 6, size // 6)
        places = torch.meshgrid(
            torch.arange(start, start + frames, device=device),
            torch.arange(h, device=device),
            torch.arange(w, device=device),
            indexing="ij",
        )
        parts = []
        for place, count in zip(places, counts, strict=True):
            rates = 10000.0 ** (-torch.arange(count, device=device, dtype=torch.float64) / count)
            phase = place.reshape(-1, 1).double() * rates
            parts.append(torch.polar(torch.ones_like(phase), phase))
        return torch.cat(parts, -1)

    @staticmethod
    def _turn(x: Tensor, rope: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * rope[:, None]).flatten(-2).to(x.dtype)

    def _turn_time(self, x: Tensor, start: int) -> Tensor:
        """Turn the first channels of `[B, F, heads, size]` by the number of the frame."""
        action = self.config["action_config"]
        count = action["rope_dim_list"][0]
        rates = float(action["rope_theta"]) ** (-torch.arange(0, count, 2, device=x.device).double() / count)
        phase = (torch.arange(x.shape[1], device=x.device).double()[:, None] + start) * rates
        cos, sin = phase.cos()[:, None].to(x.dtype), phase.sin()[:, None].to(x.dtype)
        even, odd = x[..., :count:2], x[..., 1:count:2]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        return torch.cat([turned, x[..., count:]], -1)
