"""The deep compression autoencoder against diffusers' `AutoencoderDC` with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longburn.models.ace_step.codecs import Dcae, DcaeConfig
from longburn.models.ace_step.codecs.dcae_names import dcae_rules
from longburn.weights import save_checkpoint

Peer = Any  # diffusers.AutoencoderDC
WAYS = [("Conv", "interpolate"), ("pixel_unshuffle", "pixel_shuffle")]


def peer_of(down: str = "Conv", up: str = "interpolate") -> Peer:
    """The released codec scaled down: three stages, the last two with attention, one of them at two scales."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    kinds = ["ResBlock", "EfficientViTBlock", "EfficientViTBlock"]
    peer = AutoencoderDC(
        in_channels=2,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=(8, 16, 32),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(2, 1, 2),
        decoder_layers_per_block=(1, 2, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (3, 5), (5,)),
        downsample_block_type=down,
        upsample_block_type=up,
        scaling_factor=0.41407,
    ).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * 0.08 if parameter.dim() > 1 else 1 + 0.1 * torch.randn_like(parameter)
            )
    return peer


@pytest.mark.parametrize(("down", "up"), WAYS)
@pytest.mark.parametrize("frames", [1, 9])
def test_encodes_and_decodes_as_diffusers(down: str, up: str, frames: int, tmp_path: Path) -> None:
    peer = peer_of(down, up)
    peer.save_pretrained(tmp_path)
    codec = Dcae.from_checkpoint(tmp_path)
    picture, latents = torch.randn(2, 2, 8, 4 * frames), torch.randn(2, 4, 6, frames)
    with torch.no_grad():
        encoded, decoded = peer.encoder(picture), peer.decoder(latents)
        # Encoded values grow to 40, where fp32 itself has steps of 4e-6: what counts is a share of the largest.
        torch.testing.assert_close(codec.encoder(picture), encoded, atol=1e-6 * float(encoded.abs().max()), rtol=0)
        torch.testing.assert_close(codec.decoder(latents), decoded, atol=1e-5, rtol=0)


def test_the_scales_on_both_sides(tmp_path: Path) -> None:
    """The official affine maps, written out: of the transformer's latents, and of logarithms of mel magnitudes."""
    peer = peer_of()
    peer.save_pretrained(tmp_path)
    codec = Dcae.from_checkpoint(tmp_path)
    mel, latents = torch.randn(1, 2, 8, 12) * 4 - 4, torch.randn(1, 4, 2, 5)
    with torch.no_grad():
        expected = (peer.encoder(((mel + 11) / 14 - 0.5) / 0.5) + 1.9091) * 0.1786
        torch.testing.assert_close(codec.encode(mel), expected, atol=1e-5, rtol=1e-5)
        expected = 14 * (0.5 * peer.decoder(latents / 0.1786 - 1.9091) + 0.5) - 11
        torch.testing.assert_close(codec.decode(latents), expected, atol=1e-4, rtol=1e-5)


def test_weights_travel_both_ways(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    peer = peer_of()
    peer.save_pretrained(tmp_path)
    codec = Dcae.from_checkpoint(tmp_path)
    save_checkpoint(codec, tmp_path / "again.safetensors", dcae_rules(codec.config.attention_widths))
    saved, theirs = load_file(tmp_path / "again.safetensors"), peer.state_dict()
    assert saved.keys() == theirs.keys()
    assert all(torch.equal(saved[name], theirs[name]) for name in saved)


def test_the_released_sizes_are_the_default() -> None:
    with torch.device("meta"):
        codec = Dcae()
    assert sum(parameter.numel() for parameter in codec.parameters()) == 156_812_426
    with torch.device("meta"):
        latents = codec.encode(torch.empty(1, 2, 128, 80))
        assert latents.shape == (1, 8, 16, 10)
        assert codec.decode(latents).shape == (1, 2, 128, 80)


def test_wrong_settings_are_named() -> None:
    for config, message in (
        ({"_class_name": "AutoencoderOobleck"}, "the codec is 'AutoencoderOobleck', wanted 'AutoencoderDC'"),
        ({"latents": 3}, "'latents' is not known"),
        ({"decoder_act_fns": ["silu", "relu"]}, "decoder_act_fns is .*, wanted 'silu'"),
        ({"upsample_block_type": "bilinear"}, "upsample_block_type is 'bilinear', wanted interpolate or pixel_shuffle"),
        ({"encoder_block_types": ["ResBlock"]}, "one entry for each of 4 stages"),
        ({"encoder_block_types": "Mamba"}, "'Mamba' is not known"),
        ({"decoder_layers_per_block": (0, 1, 1, 1)}, "at least 1 in every stage"),
    ):
        with pytest.raises(ValueError, match=message):
            DcaeConfig.from_config(config)
    assert DcaeConfig.from_config({"decoder_norm_types": ["rms_norm"] * 4, "scaling_factor": 0.4}) == DcaeConfig()
    with torch.device("meta"), pytest.raises(ValueError, match=r"\[1, 2, 128, 81\], wanted multiples of 8"):
        Dcae().encode(torch.empty(1, 2, 128, 81))
