"""Configurations and names of both formats, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from v15_peers import COMMON, assert_parity, diffusers_parts, official_settings, ours_of, randn, tiny_config

from longburn import AttnWindow
from longburn.models.ace_step.v15 import AceStep15, AceStep15Config, diffusers_rules, official_rules
from longburn.models.ace_step.v15.checkpoint import find_parts
from longburn.models.ace_step.v15.model import read_config
from longburn.models.ace_step.v15.names import DIFFUSERS_PARTS
from longburn.weights import CheckpointError, CheckpointMismatch, save_checkpoint

DEAD = "encoder.timbre_encoder.special_token"
PREFIXES = {
    "transformer": "decoder.",
    "condition_encoder": "encoder.",
    "audio_tokenizer": "tokenizer.",
    "audio_token_detokenizer": "detokenizer.",
}
RENAMED = {
    ".to_q.": ".q_proj.",
    ".to_k.": ".k_proj.",
    ".to_v.": ".v_proj.",
    ".to_out.0.": ".o_proj.",
    ".norm_q.": ".q_norm.",
    ".norm_k.": ".k_norm.",
    "proj_in_conv.": "proj_in.1.",
    "proj_out_conv.": "proj_out.1.",
}


def official_state(parts: dict[str, torch.nn.Module]) -> dict[str, Tensor]:
    """The tensors of diffusers' parts under the official names."""
    state = {}
    for part, prefix in PREFIXES.items():
        for name, tensor in parts[part].state_dict().items():
            if name == "silence_latent":
                continue
            theirs = name if name == "null_condition_emb" else prefix + name
            for old, new in RENAMED.items():
                theirs = theirs.replace(old, new)
            state[theirs] = tensor
    return state


def write_official(path: Path, shape: str) -> dict[str, torch.nn.Module]:
    parts = diffusers_parts(shape)
    save_file(official_state(parts), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(official_settings(shape)))
    torch.save(parts["condition_encoder"].silence_latent.mT.contiguous(), path / "silence_latent.pt")
    return parts


def write_diffusers(path: Path, shape: str) -> dict[str, torch.nn.Module]:
    parts = diffusers_parts(shape)
    for name, part in parts.items():
        part.save_pretrained(path / name)
    return parts


def assert_same(model: AceStep15, wanted: AceStep15) -> None:
    ours, theirs = model.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("shape", ["2b", "xl"])
def test_an_official_directory(tmp_path: Path, shape: str) -> None:
    parts = write_official(tmp_path, shape)
    model = AceStep15.from_checkpoint(tmp_path, dtype=torch.float32)
    assert_same(model, ours_of(parts, shape))
    assert torch.equal(model.silence, parts["condition_encoder"].silence_latent)
    assert model.config == tiny_config(shape)
    # And back: all of it but the tensor that nothing reads.
    saved = tmp_path / "saved.safetensors"
    save_checkpoint(model, saved, official_rules(model.config))
    came, wanted = load_file(saved), official_state(parts)
    del wanted[DEAD]
    assert came.keys() == wanted.keys()
    assert not [name for name in came if not torch.equal(came[name], wanted[name])]


@pytest.mark.parametrize("shape", ["2b", "xl"])
@torch.no_grad()
def test_a_pipeline_of_diffusers(tmp_path: Path, shape: str) -> None:
    parts = write_diffusers(tmp_path, shape)
    model = AceStep15.from_checkpoint(tmp_path, dtype=torch.float32)
    assert_same(model, ours_of(parts, shape))
    assert torch.equal(model.silence, parts["condition_encoder"].silence_latent)
    assert (model.config.is_turbo, model.config.model_version) == (True, "turbo")
    x, context = randn(1, 9, 8), randn(1, 9, 16, seed=2)
    hidden, t = randn(1, 6, model.config.encoder_hidden_size, seed=3), torch.tensor([0.5])
    wanted = parts["transformer"](x, t, t, hidden, context, return_dict=False)[0]
    assert_parity(model.dit(x, 0.5, context, model.dit.conditions(hidden)), wanted)
    for directory, rules in diffusers_rules(model.config).items():
        saved = tmp_path / "saved.safetensors"
        save_checkpoint(model.get_submodule(DIFFUSERS_PARTS[directory]), saved, rules)
        came, state = load_file(saved), parts[directory].state_dict()
        assert state.keys() - came.keys() <= {"timbre_encoder.special_token", "silence_latent"}
        assert not [name for name in came if not torch.equal(came[name], state[name])]


def test_the_types_of_weights_and_silence(tmp_path: Path) -> None:
    write_official(tmp_path, "2b")
    model = AceStep15.from_checkpoint(tmp_path)
    assert {p.dtype for p in model.parameters()} == {model.silence.dtype} == {torch.bfloat16}
    assert not model.training


def test_silence_begins_again() -> None:
    model = AceStep15(tiny_config())
    model.silence = torch.arange(3.0)[None, :, None].expand(1, 3, 8)
    assert model.silent(7)[0, :, 5].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert model.silent(2).shape == (1, 2, 8)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    parts = write_official(tmp_path, "2b")
    state = official_state(parts)
    del state["decoder.layers.2.cross_attn.k_proj.weight"]
    state["decoder.layers.9.mlp.down_proj.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointMismatch) as error:
        AceStep15.from_checkpoint(tmp_path)
    assert "missing: decoder.layers.2.cross_attn.k_proj.weight" in str(error.value)
    assert "unused: decoder.layers.9.mlp.down_proj.weight" in str(error.value)


def test_silence_that_is_not_there_or_not_silence(tmp_path: Path) -> None:
    write_official(tmp_path, "2b")
    path = tmp_path / "silence_latent.pt"
    torch.save(torch.zeros(1, 20, 8), path)
    with pytest.raises(CheckpointError, match=r"silence_latent.pt: holds \(1, 20, 8\), wanted a tensor \[1, 8, n\]"):
        AceStep15.from_checkpoint(tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"silence_latent.pt: cannot be read"):
        AceStep15.from_checkpoint(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"silence_latent.pt: no such file"):
        AceStep15.from_checkpoint(tmp_path)


@pytest.mark.parametrize("size", ["2b", "xl"])
def test_the_configuration_without_the_weights(tmp_path: Path, size: str) -> None:
    for name, write in (("official", write_official), ("diffusers", write_diffusers)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, size)
        loaded = AceStep15.from_checkpoint(tmp_path / name)
        for weights in (tmp_path / name).rglob("*.safetensors"):
            weights.unlink()
        assert read_config(tmp_path / name) == loaded.config


def test_the_transformer_of_the_other_generation(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "ACEStepTransformer2DModel"}')
    with pytest.raises(CheckpointError, match=r"the transformer of ACE-Step v1 .* wanted a checkpoint of ACE-Step 1.5"):
        find_parts(tmp_path)


def test_parts_of_a_pipeline_that_are_missing(tmp_path: Path) -> None:
    write_diffusers(tmp_path, "2b")
    (tmp_path / "audio_tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no audio_tokenizer; wanted a directory for each of"):
        AceStep15.from_checkpoint(tmp_path)


@pytest.mark.parametrize(("name", "billions"), [("turbo", 2.394), ("xl-base", 4.988)])
def test_released_sizes(name: str, billions: float) -> None:
    """As many parameters as the released files hold."""
    config = AceStep15Config.released(name)
    with torch.device("meta"):
        model = AceStep15(config)
    count = {part: sum(p.numel() for p in module.parameters()) / 1e9 for part, module in model.named_children()}
    assert count["dit"] == pytest.approx({"turbo": 1.575, "xl-base": 4.169}[name], abs=6e-4)
    assert count["encoder"] == pytest.approx(0.608, abs=6e-4)
    assert count["tokenizer"] == pytest.approx(0.105, abs=6e-4)
    assert count["detokenizer"] == pytest.approx(0.105, abs=6e-4)
    assert sum(count.values()) == pytest.approx(billions, abs=2e-3)
    assert (config.is_turbo, config.model_version) == (name == "turbo", name.removeprefix("xl-"))
    assert [config.window(i) for i in (0, 1, 2)] == [
        AttnWindow.two_sided(128, 128),
        AttnWindow.two_sided(),
        AttnWindow.two_sided(128, 128),
    ]


def test_the_official_file_of_turbo() -> None:
    """Its keys, the training's among them."""
    settings: dict[str, Any] = {
        "hidden_size": 2048,
        "head_dim": 128,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 6144,
        "hidden_act": "silu",
        "num_hidden_layers": 24,
        "in_channels": 192,
        "audio_acoustic_hidden_dim": 64,
        "patch_size": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "sliding_window": 128,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "text_hidden_dim": 1024,
        "num_lyric_encoder_hidden_layers": 8,
        "num_timbre_encoder_hidden_layers": 4,
        "num_attention_pooler_hidden_layers": 2,
        "num_audio_decoder_hidden_layers": 24,
        "timbre_hidden_dim": 64,
        "timbre_fix_frame": 750,
        "pool_window_size": 5,
        "fsq_dim": 2048,
        "fsq_input_levels": [8, 8, 8, 5, 5, 5],
        "fsq_input_num_quantizers": 1,
        "vocab_size": 64003,
        "timestep_mu": -0.4,
        "timestep_sigma": 1.0,
        "data_proportion": 0.5,
        "is_turbo": True,
        "model_version": "turbo",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 32768,
    }
    assert AceStep15Config.from_config(settings) == AceStep15Config.released("turbo")
    assert AceStep15Config.from_config(settings | {"use_sliding_window": False}).window(0) == AttnWindow.two_sided()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"hidden_size": None}, "has no 'hidden_size'; wanted that of ACE-Step 1.5"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5, wanted a whole number"),
        (
            {"layer_types": ["full_attention"] * 3},
            "wanted 'sliding_attention' or 'full_attention' for each of 4 layers",
        ),
        ({"layer_types": ["linear"] * 4}, r"layer_types is \['linear'"),
        ({"attention_bias": True}, "attention_bias is True, wanted False"),
        ({"fsq_input_num_quantizers": 2}, "fsq_input_num_quantizers is 2, wanted 1"),
        ({"fsq_dim": 63}, "fsq_dim is 63, wanted the encoders' size 64"),
        ({"num_lyric_encoder_hidden_layers": 5}, "an encoder of 5 layers beside a transformer of 4"),
        ({"in_channels": 8}, "in_channels is 8, wanted more than the 8 of the latents"),
        ({"fsq_input_levels": [8, 1]}, "wanted at least 2 each"),
        ({"rope_type": "odd"}, "rope"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(change: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        AceStep15Config.from_config(official_settings() | change)


def test_parts_that_do_not_fit() -> None:
    transformer = {"_class_name": "AceStepTransformer1DModel", **official_settings("xl"), "encoder_hidden_size": 32}
    inner = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    encoder = {key: value for key, value in COMMON.items() if "lyric" in key or "timbre" in key} | inner
    parts: dict[str, dict[str, Any]] = {"transformer": transformer, "condition_encoder": encoder}
    assert AceStep15Config.from_diffusers(parts).encoder_hidden_size == 32
    with pytest.raises(ValueError, match="no condition_encoder; there are transformer"):
        AceStep15Config.from_diffusers({"transformer": transformer})
    with pytest.raises(ValueError, match="encoder_hidden_size is 40 in condition_encoder, but 32 elsewhere"):
        AceStep15Config.from_diffusers(parts | {"condition_encoder": encoder | {"hidden_size": 40}})
    with pytest.raises(ValueError, match="transformer is a 'ACEStepTransformer2DModel', wanted 'AceStepTransformer1D"):
        AceStep15Config.from_diffusers(parts | {"transformer": {"_class_name": "ACEStepTransformer2DModel"}})
    with pytest.raises(ValueError, match="no release 'huge'; there are base, sft and turbo"):
        AceStep15Config.released("huge")
