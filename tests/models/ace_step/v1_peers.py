"""ACE-Step v1 written out once more, in fp64 and under the official names, after its published formulas.

It also draws the weights and reads the outputs of the golden cases in `tests/data/ace_step`, which were computed by the
original implementation in fp32.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from longburn.models.ace_step.v1 import AceStepV1, LyricEncoder, lyric_rules, official_rules
from longburn.weights import TensorInfo, save_checkpoint

DATA = Path(__file__).parents[2] / "data" / "ace_step"
Weights = Mapping[str, Tensor]


class Drawn:
    """A checkpoint whose tensors are drawn by name and shape, as the golden cases' were."""

    def __init__(self, shapes: Mapping[str, list[int]]) -> None:
        self.tensors = {name: TensorInfo(tuple(shape), torch.float32) for name, shape in shapes.items()}

    def read(self, name: str) -> Tensor:
        shape = self.tensors[name].shape
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            return torch.from_numpy(1 + 0.3 * z if name.endswith("weight") else 0.05 * z)
        if "pos_bias" in name:
            return torch.from_numpy(0.5 * z)
        if "scale_shift_table" in name:
            return torch.from_numpy(0.3 * z)
        return torch.from_numpy((1.5 * z / np.sqrt(z[0].size)).astype(np.float32))

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Those behind the prefix, in fp64."""
        return {name[len(prefix) :]: self.read(name).double() for name in self.tensors if name.startswith(prefix)}


def golden(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `case.json` says, and the tensors."""
    return json.loads((DATA / case / "case.json").read_text()), load_file(DATA / case / "expected.safetensors")


def redrawn(model: AceStepV1 | LyricEncoder, seed: int = 0) -> None:
    """Other weights: N(0, 1.5 / sqrt(inputs)), norms 1 + N(0, 0.1), and tables and biases that are not small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            z = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 1:
                z = 1 + 0.1 * z if "norm" in name and name.endswith("weight") else 0.3 * z
            elif name.endswith((".u", ".v", "table")):
                z = 0.5 * z
            else:
                z = 1.5 * z / math.sqrt(parameter[0].numel())
            parameter.copy_(z)


def official(model: AceStepV1 | LyricEncoder, directory: Path) -> dict[str, Tensor]:
    """The model's weights under the official names."""
    rules = official_rules(model.config) if isinstance(model, AceStepV1) else lyric_rules(model.config)
    save_checkpoint(model, directory / "weights.safetensors", rules)
    return load_file(directory / "weights.safetensors")


def lyric_states(
    w: Weights,
    x: Tensor,
    heads: int,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    sink_tokens: int = 0,
    query_scale: Mapping[int, float] | None = None,
) -> Tensor:
    """The lyric encoder: x `[B, T, input]` to `[B, T, M]`; the first `sink_tokens` stay visible beyond the window."""
    x = x @ w["embed.out.0.weight"].T + w["embed.out.0.bias"]
    x = F.layer_norm(x, x.shape[-1:], w["embed.out.1.weight"], w["embed.out.1.bias"])
    (B, T, M), layer = x.shape, 0
    x = x * math.sqrt(M)
    while f"encoders.{layer}.norm_ff.weight" in w:
        p, scale = f"encoders.{layer}.", (query_scale or {}).get(layer, 1.0)
        y = F.layer_norm(x, (M,), w[p + "norm_mha.weight"], w[p + "norm_mha.bias"])
        q, k, v = (
            (y @ w[f"{p}self_attn.linear_{n}.weight"].T + w[f"{p}self_attn.linear_{n}.bias"]).view(B, T, heads, -1)
            for n in "qkv"
        )
        d, out = M // heads, torch.zeros(B, T, heads, M // heads, dtype=x.dtype)
        for b in range(B):
            for i in range(T):
                seen = [j for j in range(T) if mask is None or mask[b, j]]
                near = [j for j in seen if window is None or i - j < window or j < sink_tokens]
                seen = [j for j in near if j <= i] if causal else seen
                if not seen or (mask is not None and not mask[b, i]):
                    continue
                distances = torch.stack([sinusoid(i - j, M) for j in seen])
                r = (distances @ w[p + "self_attn.linear_pos.weight"].T).view(len(seen), heads, d)
                u, vv = w[p + "self_attn.pos_bias_u"], w[p + "self_attn.pos_bias_v"]
                query = scale * q[b, i]
                score = ((query + u) * k[b, seen]).sum(-1) + ((query + vv) * r).sum(-1)
                out[b, i] = ((score / math.sqrt(d)).softmax(0)[..., None] * v[b, seen]).sum(0)
        x = x + out.flatten(2) @ w[p + "self_attn.linear_out.weight"].T + w[p + "self_attn.linear_out.bias"]
        y = F.layer_norm(x, (M,), w[p + "norm_ff.weight"], w[p + "norm_ff.bias"])
        y = F.silu(y @ w[p + "feed_forward.w_1.weight"].T + w[p + "feed_forward.w_1.bias"])
        x = x + y @ w[p + "feed_forward.w_2.weight"].T + w[p + "feed_forward.w_2.bias"]
        layer += 1
    return F.layer_norm(x, (M,), w["after_norm.weight"], w["after_norm.bias"])


def sinusoid(distance: int, size: int) -> Tensor:
    phase = distance * 1e4 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return torch.stack([phase.sin(), phase.cos()], -1).flatten()


def turned(x: Tensor, theta: float) -> Tensor:
    """x `[B, T, H, d]` at the positions 0 .. T - 1: adjacent pairs, frequencies in half-split order."""
    T, d = x.shape[1], x.shape[3]
    y = torch.empty_like(x)
    for n in range(d):
        phase = torch.arange(T, dtype=torch.float64)[None, :, None] * theta ** (-2 * (n % (d // 2)) / d)
        other = x[..., n + 1] * -1 if n % 2 == 0 else x[..., n - 1]
        y[..., n] = x[..., n] * phase.cos() + other * phase.sin()
    return y


def velocity(
    w: Weights,
    config: Any,
    latents: Tensor,
    t: float,
    condition: Tensor,
    *,
    mask: Tensor | None = None,
    frame_mask: Tensor | None = None,
    query_scale: Mapping[int, float] | None = None,
) -> Tensor:
    """The transformer, given the condition `[B, S, D]`; masks are bool."""
    B, C, height, T = latents.shape
    H, D, theta = config.num_attention_heads, config.inner_dim, config.rope_theta
    mask = torch.ones(condition.shape[:2], dtype=torch.bool) if mask is None else mask
    frames = torch.ones(B, T, dtype=torch.bool) if frame_mask is None else frame_mask

    def dense(name: str, y: Tensor) -> Tensor:
        return y @ w[name + ".weight"].flatten(1).T + w[name + ".bias"]

    def normed(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    patches = latents.permute(0, 3, 1, 2).reshape(B, T, C * height)
    x = dense("proj_in.early_conv_layers.0", patches)
    groups = x.view(B, T, 32, -1)
    mean, var = groups.mean((1, 3), keepdim=True), groups.var((1, 3), keepdim=True, unbiased=False)
    x = ((groups - mean) / (var + 1e-6).sqrt()).flatten(2)
    x = x * w["proj_in.early_conv_layers.1.weight"] + w["proj_in.early_conv_layers.1.bias"]
    x = dense("proj_in.early_conv_layers.2", x)

    # In fp32, as the model was trained: 700 radians are then known to 3e-5, which shows in the velocity.
    phase = 1000 * t * torch.exp(-math.log(1e4) * torch.arange(128, dtype=torch.float32) / 128)
    e = dense("timestep_embedder.linear_1", torch.cat([phase.cos(), phase.sin()]).double())
    e = dense("timestep_embedder.linear_2", F.silu(e))
    six = dense("t_block.1", F.silu(e)).view(6, D)

    for n in range(config.num_layers):
        p = f"transformer_blocks.{n}."
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = w[p + "scale_shift_table"] + six
        y = normed(x, scale, shift)
        q, k, v = (dense(f"{p}attn.to_{part}", y).view(B, T, H, -1) for part in "qkv")
        q, k = (F.relu(turned(z, theta) * frames[:, :, None, None]) for z in (q, k))
        v = v * frames[:, :, None, None]
        weight = torch.einsum("bihd,bjhd->bhij", q, k)
        out = weight @ v.transpose(1, 2) / (weight.sum(-1, keepdim=True) + 1e-15)
        x = x + gate * dense(p + "attn.to_out.0", out.transpose(1, 2).flatten(2))

        q = dense(p + "cross_attn.to_q", x).view(B, T, H, -1) * (query_scale or {}).get(n, 1.0)
        k, v = (dense(f"{p}cross_attn.to_{part}", condition).view(B, -1, H, D // H) for part in "kv")
        score = torch.einsum("bihd,bjhd->bhij", turned(q, theta), turned(k, theta)) / math.sqrt(D // H)
        score = score.masked_fill(~(frames[:, None, :, None] & mask[:, None, None, :]), -math.inf)
        weight = score.softmax(-1).nan_to_num()  # a frame that is none sees nothing
        x = x + dense(p + "cross_attn.to_out.0", (weight @ v.transpose(1, 2)).transpose(1, 2).flatten(2))

        y = F.silu(dense(p + "ff.inverted_conv.conv", normed(x, mlp_scale, mlp_shift)))
        taps, before, after = w[p + "ff.depth_conv.conv.weight"][:, 0].T, y[:, :-1], y[:, 1:]
        y = y * taps[1] + F.pad(before, (0, 0, 1, 0)) * taps[0] + F.pad(after, (0, 0, 0, 1)) * taps[2]
        value, g = (y + w[p + "ff.depth_conv.conv.bias"]).chunk(2, -1)
        x = x + mlp_gate * ((value * F.silu(g)) @ w[p + "ff.point_conv.conv.weight"][..., 0].T)

    shift, scale = w["final_layer.scale_shift_table"] + e
    return dense("final_layer.linear", normed(x, scale, shift)).view(B, T, height, -1).permute(0, 3, 2, 1)
