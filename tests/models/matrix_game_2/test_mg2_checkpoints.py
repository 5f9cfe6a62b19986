"""Sizes and names of the releases, and what does not fit them."""

import json
from pathlib import Path

import pytest
import torch
from mg2_cases import read_case, tiny, tiny_weights, weight
from safetensors.torch import save_file

from longburn.models.matrix_game_2 import MatrixGame2, MatrixGame2Config, load_matrix_game_2
from longburn.weights import CheckpointError


@pytest.mark.parametrize(("mode", "billions"), [("universal", 1.619), ("gta_drive", 1.619), ("templerun", 1.509)])
def test_released_sizes(mode: str, billions: float) -> None:
    config = MatrixGame2Config.released(mode)
    with torch.device("meta"):
        model = MatrixGame2(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert config.mode == mode
    assert config.local_attn_size == (4 if mode == "gta_drive" else 6)


def test_a_configuration_is_read_by_its_own_names() -> None:
    config = MatrixGame2Config.from_config(read_case("universal_window7_sink2")["config"])
    assert (config.dim, config.num_layers, config.local_attn_size, config.sink_size) == (96, 3, 7, 2)
    assert config.action_config.blocks == (0, 1)
    assert MatrixGame2Config.from_config({}) == MatrixGame2Config.released("universal")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_attn_size": -1}, "bidirectional foundation model"),
        ({"dim": 0}, "dim is 0"),
        ({"model_type": "t2v"}, "model_type is 't2v', wanted 'i2v'"),
        ({"in_dim": 35}, "in_dim"),
        ({"num_heads": 7}, "dim and num_heads"),
        ({"action_config": {"rope_dim_list": [8, 28]}}, "rope_dim_list"),
        ({"action_config": {"blocks": [30]}}, "layers that there are"),
        ({"action_config": {"qkv_bias": True}}, "qkv_bias is True"),
        ({"action_config": 5}, "action_config is 5, wanted a dictionary"),
        ({"action_config": [["blocks", [0]]]}, "action_config is .*, wanted a dictionary"),
        ({"action_config": {"blocks": 3}}, "blocks is 3, wanted a list of whole numbers"),
        ({"action_config": {"blocks": "abc"}}, "blocks is 'abc', wanted a list of whole numbers"),
        ({"action_config": {"blocks": [0, 0.5]}}, r"blocks is \[0, 0.5\], wanted a list of whole numbers"),
        ({"action_config": {"blocks": None}}, "blocks is None, wanted a list of whole numbers"),
        ({"action_config": {"rope_dim_list": 64}}, "rope_dim_list is 64, wanted a list of whole numbers"),
        ({"action_config": {"mouse_qk_dim_list": 64}}, "mouse_qk_dim_list is 64, wanted a list of whole numbers"),
        ({"action_config": {"rope_theta": "a"}}, "rope_theta is 'a', wanted a finite number above 0"),
        ({"eps": "a"}, "eps is 'a', wanted a finite number above 0"),
        ({"eps": float("nan")}, "eps is nan, wanted a finite number above 0"),
        ({"eps": float("inf")}, "eps is inf, wanted a finite number above 0"),
        ({"eps": 10**400}, "eps is 10+, wanted a finite number above 0"),
        ({"eps": 0}, "eps is 0, wanted a finite number above 0"),
        ({"eps": True}, "eps is True, wanted a finite number above 0"),
    ],
)
def test_a_bad_configuration_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^MatrixGame2Config: .*{message}") as raised:
        MatrixGame2Config.from_config(change)
    assert "\n" not in str(raised.value)


def unused(mode: str) -> dict[str, torch.Tensor]:
    names = ["key_attn_q_norm", "key_attn_k_norm"]
    names += [] if mode == "templerun" else ["img_attn_q_norm", "img_attn_k_norm"]
    return {f"blocks.{i}.action_model.{n}.weight": weight(n, (64,)) for i in (0, 2) for n in names}


@pytest.mark.parametrize("mode", ["universal", "templerun"])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_checkpoint_is_read(tmp_path: Path, mode: str, prefix: str) -> None:
    config = tiny(mode)
    weights = {**tiny_weights(config), **unused(mode)}
    save_file({prefix + name: x.contiguous() for name, x in weights.items()}, tmp_path / "model.safetensors")
    model = load_matrix_game_2(tmp_path / "model.safetensors", mode=mode, config=config, dtype=torch.float32)
    theirs = weights["patch_embedding.weight"]
    assert torch.equal(model.noisy.weight, theirs[:, :16].flatten(1))
    assert torch.equal(model.condition.weight, theirs[:, 16:].flatten(1))
    assert torch.equal(model.layers[1].image.q_norm.weight, weights["blocks.1.cross_attn.norm_q.weight"])
    stated = {**config_json(config), "_class_name": "CausalWanModel"}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    again = load_matrix_game_2(tmp_path, dtype=torch.float32)
    assert again.config == config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def config_json(config: MatrixGame2Config) -> dict[str, object]:
    action = {**vars(config.action_config)}
    return {**vars(config), "model_type": "i2v", "action_config": {**action, "rope_dim_list": [8, 28, 28]}}


def test_what_does_not_fit_is_said_in_a_line(tmp_path: Path) -> None:
    config = tiny("templerun")
    weights = {f"model.{name}": x.contiguous() for name, x in {**tiny_weights(config), **unused("templerun")}.items()}
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="holds templerun weights, wanted universal"):
        load_matrix_game_2(path, mode="universal", config=config)
    with pytest.raises(CheckpointError, match="holds templerun weights, but the configuration is for universal"):
        load_matrix_game_2(path, config=tiny("universal"))
    with pytest.raises(ValueError, match="mode is 'tetris'"):
        load_matrix_game_2(path, mode="tetris")
    absent = {name: x for name, x in weights.items() if "blocks.1.ffn.0.bias" not in name}
    save_file({**absent, "model.blocks.1.extra": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"(?s)layers\.1\.up\.bias.*blocks\.1\.extra"):
        load_matrix_game_2(path, config=config)
    save_file({"lm_head.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="wanted the transformer of Matrix-Game 2"):
        load_matrix_game_2(path)
