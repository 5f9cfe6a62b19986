"""Oobleck against diffusers' `AutoencoderOobleck` with random weights."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from longburn.models.ace_step.codecs import Oobleck, OobleckConfig
from longburn.models.ace_step.codecs.names import oobleck_rules, with_weight_norm
from longburn.weights import CheckpointError, CheckpointMismatch, SafetensorsSource, save_checkpoint, write_file

Peer = Any  # diffusers.AutoencoderOobleck
SIZES = [  # downsampling ratios, multiples of the channels, latent channels; odd ratios shorten the audio
    ((2, 4), (1, 2), 8),
    ((2, 3, 5), (1, 2, 4), 6),
    ((2, 4, 4, 6, 10), (1, 1, 2, 2, 4), 8),
]


def peer_of(ratios: tuple[int, ...], multiples: tuple[int, ...], latents: int) -> Peer:
    """A small codec whose every parameter matters."""
    from diffusers import AutoencoderOobleck

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the weight normalisation that it is made with
        peer = AutoencoderOobleck(
            encoder_hidden_size=2 * latents,
            downsampling_ratios=list(ratios),
            channel_multiples=list(multiples),
            decoder_channels=8,
            decoder_input_channels=latents,
            sampling_rate=48000,
        ).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "snake" in name or name.endswith("bias"):
                parameter.normal_(0, 0.2)
            else:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    return peer


@pytest.mark.parametrize(("ratios", "multiples", "latents"), SIZES)
@pytest.mark.parametrize("frames", [1, 7, 31])
def test_encodes_and_decodes_as_diffusers(
    ratios: tuple[int, ...], multiples: tuple[int, ...], latents: int, frames: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    peer = peer_of(ratios, multiples, latents)
    peer.save_pretrained(tmp_path)
    codec = Oobleck.from_checkpoint(tmp_path)
    z = torch.randn(2, latents, frames)
    audio = torch.rand(2, 2, frames * codec.config.hop_length + frames) * 2 - 1
    with torch.no_grad():
        expected = peer.encode(audio).latent_dist
        posterior, decoded = codec.encode(audio), codec.decode(z)
        torch.testing.assert_close(decoded, peer.decode(z).sample, atol=1e-5, rtol=0)
    torch.testing.assert_close(posterior.mean, expected.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(posterior.std, expected.std, atol=1e-5, rtol=0)


def test_a_sample_is_the_distribution_that_it_says() -> None:
    torch.manual_seed(0)
    codec = Oobleck(OobleckConfig(16, (2, 4), (1, 2), 8, 8))
    with torch.no_grad():
        posterior = codec.encode(torch.rand(1, 2, 80) * 2 - 1)
        generator = torch.Generator().manual_seed(1)
        draws = torch.stack([posterior.sample(generator) for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), posterior.mean, atol=0.1, rtol=0)
    torch.testing.assert_close(draws.std(0), posterior.std, atol=0.1, rtol=0.1)


def test_the_released_sizes_are_the_default() -> None:
    from diffusers import AutoencoderOobleck

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        codec = Oobleck()
        peer = AutoencoderOobleck(downsampling_ratios=[2, 4, 4, 6, 10], sampling_rate=48000)
    theirs = {name: parameter.numel() for name, parameter in peer.named_parameters()}
    assert sum(theirs.values()) == 168_695_426
    folded = sum(size for name, size in theirs.items() if name.endswith("weight_g"))
    assert sum(parameter.numel() for parameter in codec.parameters()) == sum(theirs.values()) - folded
    assert codec.config.hop_length == 1920


def test_weights_travel_both_ways(tmp_path: Path) -> None:
    """Ours, saved under their names with weight normalisation, are the peer's; and folded ones load again."""
    from diffusers import AutoencoderOobleck

    torch.manual_seed(0)
    peer = peer_of(*SIZES[1])
    (tmp_path / "a").mkdir()
    peer.save_pretrained(tmp_path / "a")
    codec = Oobleck.from_checkpoint(tmp_path / "a")
    rules = oobleck_rules(codec.config.downsampling_ratios)
    (tmp_path / "b").mkdir()
    save_checkpoint(codec, tmp_path / "b" / "model.safetensors", rules)
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    again = Oobleck.from_checkpoint(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(codec.parameters(), again.parameters(), strict=True))

    folded = SafetensorsSource(tmp_path / "b")
    names = [name for name in folded.tensors if name.endswith("weight")]
    (tmp_path / "c").mkdir()
    write_file(tmp_path / "c" / "diffusion_pytorch_model.safetensors", with_weight_norm(folded, names))
    (tmp_path / "c" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = AutoencoderOobleck.from_pretrained(tmp_path / "c", low_cpu_mem_usage=False)
    z = torch.randn(1, SIZES[1][2], 9)
    with torch.no_grad():
        torch.testing.assert_close(theirs.decode(z).sample, peer.decode(z).sample, atol=1e-5, rtol=0)


def test_the_newer_names_of_weight_normalisation_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    peer_of(*SIZES[0]).save_pretrained(tmp_path)
    codec = Oobleck.from_checkpoint(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    newer = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    tensors = load_file(file)
    renamed = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        renamed[f"{stem}.{newer.get(last, last)}"] = tensor
    save_file(renamed, file)
    again = Oobleck.from_checkpoint(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(codec.parameters(), again.parameters(), strict=True))


def test_a_codec_that_lacks_half_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    peer_of(*SIZES[0]).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["decoder.conv1.weight_v"]
    save_file(tensors, file)
    with pytest.raises(CheckpointMismatch, match=r"decoder\.entry\.weight") as caught:
        Oobleck.from_checkpoint(tmp_path)
    assert any("decoder.conv1.weight_g" in line for line in caught.value.unused)


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    good = {**vars(OobleckConfig()), "_class_name": "AutoencoderOobleck"}
    assert OobleckConfig.from_config(good) == OobleckConfig()
    with pytest.raises(ValueError, match="the codec is 'AutoencoderDC', wanted 'AutoencoderOobleck'"):
        OobleckConfig.from_config({**good, "_class_name": "AutoencoderDC"})
    with pytest.raises(ValueError, match="'latent_dim' is not known"):
        OobleckConfig.from_config({**good, "latent_dim": 4})
    with pytest.raises(ValueError, match="'sampling_rate' is missing"):
        OobleckConfig.from_config({key: value for key, value in good.items() if key != "sampling_rate"})
    with pytest.raises(ValueError, match="one multiple for each ratio"):
        OobleckConfig(downsampling_ratios=(2, 4))
    with pytest.raises(ValueError, match="size below 1"):
        OobleckConfig(audio_channels=0)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Oobleck.from_checkpoint(tmp_path)
