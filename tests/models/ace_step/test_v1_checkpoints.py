"""Configuration and names of ACE-Step v1's checkpoint, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longburn.models.ace_step.v1 import AceStepV1, AceStepV1Config, LyricEncoderConfig, official_rules
from longburn.weights import CheckpointError, CheckpointMismatch, save_checkpoint

LYRICS = LyricEncoderConfig(input_size=12, output_size=16, attention_heads=2, linear_units=24, num_blocks=2)
SETTINGS: dict[str, Any] = {
    "_class_name": "ACEStepTransformer2DModel",
    "_diffusers_version": "0.32.2",
    "in_channels": 2,
    "num_layers": 2,
    "inner_dim": 24,
    "attention_head_dim": 6,
    "num_attention_heads": 4,
    "out_channels": 2,
    "patch_size": [4, 1],
    "max_height": 4,
    "speaker_embedding_dim": 5,
    "text_embedding_dim": 7,
    "lyric_encoder_vocab_size": 30,
    "lyric_hidden_size": 12,
    "ssl_encoder_depths": [1, 1],
    "ssl_names": ["mert", "m-hubert"],
    "ssl_latent_dims": [9, 9],
}
DEAD = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def released(directory: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Writes a checkpoint of these sizes under the official names, and what the original stores without using it."""
    config = AceStepV1Config.from_config(SETTINGS, lyric_encoder=LYRICS)
    torch.manual_seed(0)
    save_checkpoint(AceStepV1(config), directory / "weights.safetensors", official_rules(config))
    tensors = load_file(directory / "weights.safetensors")
    for layer in range(2):
        for name in DEAD:
            tensors[f"transformer_blocks.{layer}.cross_attn.{name}.weight"] = torch.full((24, 24), float("nan"))
            tensors[f"transformer_blocks.{layer}.cross_attn.{name}.bias"] = torch.full((24,), float("nan"))
        for part in (0, 2, 4):
            tensors[f"projectors.{layer}.{part}.weight"] = torch.zeros(9, 24)
            tensors[f"projectors.{layer}.{part}.bias"] = torch.zeros(9)
    save_file(tensors, directory / "weights.safetensors")
    (directory / "config.json").write_text(json.dumps(SETTINGS | changes))
    return tensors


def test_load_and_save(tmp_path: Path) -> None:
    """What is skipped is not read (it is NaN here); all else comes back bit for bit."""
    tensors = released(tmp_path)
    model = AceStepV1.from_checkpoint(tmp_path, dtype=torch.float32, lyric_encoder=LYRICS)
    save_checkpoint(model, tmp_path / "again.safetensors", official_rules(model.config))
    again = load_file(tmp_path / "again.safetensors")
    assert tensors.keys() - again.keys() == {
        name for name in tensors if any(dead in name for dead in (*DEAD, "projectors."))
    }
    assert all(torch.equal(again[name], tensors[name]) for name in again)
    condition = model.conditions(torch.ones(1, 3, 7), torch.tensor([[1, 2]]))
    assert model(torch.ones(1, 2, 4, 5), 0.5, condition).isfinite().all()


def test_bf16_is_the_default(tmp_path: Path) -> None:
    released(tmp_path)
    model = AceStepV1.from_checkpoint(tmp_path, lyric_encoder=LYRICS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    tensors = released(tmp_path)
    tensors["surprise"] = tensors.pop("genre_embedder.weight")
    tensors["t_block.1.weight"] = tensors["t_block.1.weight"][:-1].contiguous()
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointMismatch) as raised:
        AceStepV1.from_checkpoint(tmp_path, lyric_encoder=LYRICS)
    assert [line.split(":")[0].split(" ")[0] for line in raised.value.unused] == ["surprise"]
    assert [line.split(":")[0].split(" ")[0] for line in raised.value.missing] == ["text.weight"]
    assert "t_block.1.weight" in raised.value.misshapen[0]


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        AceStepV1.from_checkpoint(tmp_path)


def test_defaults_are_the_released_sizes() -> None:
    """3.306 billion parameters, less those that do nothing when music is made."""
    config = AceStepV1Config()
    assert config == AceStepV1Config.from_config({})
    assert (config.mlp_hidden, config.rope.head_dim, config.rope.theta) == (6400, 128, 1e6)
    with torch.device("meta"):
        model = AceStepV1(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    dead = 24 * 4 * (2560 * 2560 + 2560)
    projectors = 87.8e6
    assert abs(dead - 629.4e6) < 0.1e6
    assert abs(count + dead + projectors - 3.306e9) < 1e6
    assert abs(sum(parameter.numel() for parameter in model.lyric_encoder.parameters()) - 82.9e6) < 0.1e6


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"_class_name": "AceStepTransformer1DModel"}, "is of 'AceStepTransformer1DModel', wanted 'ACEStepTransf"),
        ({"_class_name": None, "model_type": "acestep"}, "is of 'acestep'"),
        ({"inner_dim": 25}, "inner_dim 25 is not num_attention_heads 4 times attention_head_dim 6"),
        ({"patch_size": [2, 1]}, r"patch_size is \(2, 1\), wanted \(4, 1\)"),
        ({"patch_size": 4}, "patch_size is 4, wanted two whole numbers"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": 2.5}, "num_layers is 2.5, wanted a whole number"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({"in_chanels": 2}, "unknown key 'in_chanels'"),
        ({"lyric_hidden_size": 13}, "lyric_hidden_size is 13, but the lyric encoder's input_size is 12"),
    ],
)
def test_configurations_that_are_wrong(changes: dict[str, Any], complaint: str) -> None:
    settings = {key: value for key, value in (SETTINGS | changes).items() if value is not None}
    with pytest.raises(ValueError, match=complaint):
        AceStepV1Config.from_config(settings, lyric_encoder=LYRICS)
