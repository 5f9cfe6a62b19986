"""The names of VAE checkpoints, both ways, and files that were saved with `torch.save`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from wan_vae_peers import RELEASED_NAMES, in_released_names, peer_of

from longburn.models.matrix_game_2.vae import WanVae, WanVaeConfig
from longburn.models.matrix_game_2.vae_names import wan_vae_rules
from longburn.weights import CheckpointError, CheckpointMismatch, load_checkpoint, save_checkpoint
from longburn.weights.match import match
from longburn.weights.pickled import PickledSource

SIZES: dict[str, Any] = {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}


def test_the_released_names_are_those_of_the_released_sizes() -> None:
    """The peers' table, some of the released file's names, and the rules agree."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        peer, vae = AutoencoderKLWan(), WanVae()
    renamed = in_released_names(peer.state_dict(), 3)
    assert len(renamed) == len(peer.state_dict()) == 194
    assert set(RELEASED_NAMES) <= renamed.keys()
    for names in (peer.state_dict(), renamed):
        found = match(wan_vae_rules(vae.config), names, vae.state_dict())
        assert (found.missing, found.unused) == ({}, {})
        assert len(found.links) == 194


@pytest.mark.parametrize("kind", ["diffusers", "released"])
def test_weights_travel_both_ways(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    peer = peer_of(**SIZES)
    peer.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    vae = WanVae.from_checkpoint(tmp_path)
    theirs = load_file(file)
    theirs = in_released_names(theirs, 3) if kind == "released" else theirs
    save_checkpoint(vae, tmp_path / "ours.safetensors", wan_vae_rules(vae.config, save_as=kind))
    ours = load_file(tmp_path / "ours.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    with torch.device("meta"):
        again = WanVae(vae.config)
    load_checkpoint(again, tmp_path / "ours.safetensors", wan_vae_rules(vae.config))
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), again.parameters(), strict=True))


def test_what_is_missing_or_strange_is_named(tmp_path: Path) -> None:
    peer_of(**SIZES).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["decoder.extra.weight"] = tensors.pop("decoder.up_blocks.1.upsamplers.0.time_conv.weight")
    tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"][:, :, :2].contiguous()
    save_file(tensors, file)
    with pytest.raises(CheckpointMismatch) as caught:
        WanVae.from_checkpoint(tmp_path)
    error = caught.value
    assert any(line.startswith("decoder.ups.1.frames.conv.weight") for line in error.missing)
    assert any(line.startswith("decoder.extra.weight") for line in error.unused)
    assert any("encoder.conv_in.weight" in line for line in error.misshapen)
    with pytest.raises(ValueError, match="save_as is 'gguf'"):
        wan_vae_rules(WanVaeConfig(), save_as="gguf")


@pytest.mark.parametrize("older", [False, True])
def test_a_pth_file_is_read_as_tensors_alone(older: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    peer = peer_of(**SIZES)
    peer.save_pretrained(tmp_path)
    wanted = WanVae.from_checkpoint(tmp_path)
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save(in_released_names(peer.state_dict(), 3), path, _use_new_zipfile_serialization=not older)
    with torch.device("meta"):
        vae = WanVae(wanted.config)
    load_checkpoint(vae, PickledSource(path), wan_vae_rules(wanted.config))
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), wanted.parameters(), strict=True))
    with pytest.raises(CheckpointMismatch, match="mis-shaped"):
        WanVae.from_checkpoint(path)  # a single file is of the released sizes


class _Strange:
    """What a pickle could make do anything."""


def test_other_pth_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vae.pth"
    for content, message in (
        ({"weight": _Strange()}, "cannot be read as tensors alone"),
        ([torch.zeros(1)], "holds a list, wanted a dictionary of tensors"),
        ({"weight": torch.zeros(1), "step": 3}, "'step' is a int, wanted a dictionary of tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            PickledSource(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read as tensors alone"):
        PickledSource(path)
    with pytest.raises(CheckpointError, match="no such file"):
        PickledSource(tmp_path / "none.pth")
    torch.save({"a": torch.arange(6.0).view(2, 3).mT}, path)
    source = PickledSource(path)
    assert source.tensors["a"].shape == (3, 2)
    assert source.read("a").is_contiguous()
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        source.read("b")
