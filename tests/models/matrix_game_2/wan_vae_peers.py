"""Strangers that the VAE is compared with: diffusers' autoencoder, and its names as the released file has them."""

import re
from typing import Any

import torch
from torch import Tensor

Peer = Any  # diffusers.AutoencoderKLWan


def peer_of(**sizes: Any) -> Peer:
    """A small `AutoencoderKLWan` whose every parameter matters."""
    from diffusers import AutoencoderKLWan

    z = sizes.setdefault("z_dim", 4)
    sizes.setdefault("base_dim", 8)
    sizes.setdefault("latents_mean", torch.linspace(-0.9, 0.7, z).tolist())
    sizes.setdefault("latents_std", torch.linspace(0.4, 2.5, z).tolist())
    peer = AutoencoderKLWan(**sizes).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return peer


def scale_of(peer: Peer) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of its latents, `[1, C, 1, 1, 1]`."""
    mean, std = (torch.tensor(getattr(peer.config, f"latents_{name}")) for name in ("mean", "std"))
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


@torch.no_grad()
def decoded_by(peer: Peer, latents: Tensor) -> Tensor:
    mean, std = scale_of(peer)
    return peer.decode(latents * std + mean).sample


@torch.no_grad()
def encoded_by(peer: Peer, pictures: Tensor) -> Tensor:
    mean, std = scale_of(peer)
    return (peer.encode(pictures).latent_dist.mode() - mean) / std


def in_released_names(tensors: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Diffusers' tensors under the names of `Wan2.1_VAE.pth`, by a table written out by hand.

    Args:
        tensors: as diffusers names them.
        blocks: residual blocks in each stage of the decoder, 3 as released.
    """
    plain = {
        "quant_conv": "conv1",
        "post_quant_conv": "conv2",
        "conv_in": "conv1",
        "norm_out": "head.0",
        "conv_out": "head.2",
        "mid_block.resnets.0": "middle.0",
        "mid_block.attentions.0": "middle.1",
        "mid_block.resnets.1": "middle.2",
        "down_blocks": "downsamples",
        "norm1": "residual.0",
        "norm2": "residual.3",
        "conv_shortcut": "shortcut",
    }
    renamed = {}
    for name, tensor in tensors.items():
        new = re.sub(
            r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)",
            lambda m: f"upsamples.{int(m[1]) * (blocks + 1) + (int(m[3]) if m[2] == 'resnets' else blocks)}",
            name,
        )
        parts = new.split(".")
        if {"resnets", "residual"} & set(parts) or parts[-2] in {"conv1", "conv2"}:
            new = re.sub(r"\.conv1\.(\w+)$", r".residual.2.\1", new)
            new = re.sub(r"\.conv2\.(\w+)$", r".residual.6.\1", new)
        for theirs, released in plain.items():
            new = re.sub(rf"(^|\.){re.escape(theirs)}(\.|$)", rf"\g<1>{released}\g<2>", new)
        renamed[new] = tensor
    return renamed


RELEASED_NAMES = (  # some of those of the released file, one of every kind
    "encoder.conv1.weight",
    "encoder.downsamples.0.residual.0.gamma",
    "encoder.downsamples.0.residual.2.weight",
    "encoder.downsamples.0.residual.3.gamma",
    "encoder.downsamples.0.residual.6.bias",
    "encoder.downsamples.2.resample.1.weight",
    "encoder.downsamples.3.shortcut.weight",
    "encoder.downsamples.5.time_conv.weight",
    "encoder.downsamples.10.residual.6.weight",
    "encoder.middle.0.residual.2.weight",
    "encoder.middle.1.to_qkv.weight",
    "encoder.middle.1.norm.gamma",
    "encoder.head.0.gamma",
    "encoder.head.2.bias",
    "conv1.weight",
    "conv2.bias",
    "decoder.conv1.bias",
    "decoder.middle.2.residual.6.weight",
    "decoder.upsamples.3.time_conv.bias",
    "decoder.upsamples.4.shortcut.weight",
    "decoder.upsamples.7.resample.1.weight",
    "decoder.upsamples.11.resample.1.bias",
    "decoder.upsamples.14.residual.2.weight",
    "decoder.head.2.weight",
)
