"""Small Matrix-Game 2 models: weights and inputs by name, as the golden cases have them."""

import json
import sys
import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longburn.models.matrix_game_2 import FrameWindow, MatrixGame2, MatrixGame2Config
from longburn.models.matrix_game_2.names import rules
from longburn.weights import StateDictSource, in_their_names, load_checkpoint

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from matrix_game_2_peer import Peer

DATA = Path(__file__).parents[2] / "data" / "matrix_game_2"
CASES = ("universal_window6", "universal_window7_sink2")


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(size=shape).astype(np.float32)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    z = drawn(name, shape)
    is_norm = name.endswith("weight") and ("norm" in name or name.endswith("mouse_mlp.3.weight"))
    if is_norm or name in ("img_emb.proj.0.weight", "img_emb.proj.4.weight"):
        return torch.from_numpy(1 + np.float32(0.3) * z)
    if name.endswith("bias"):
        return torch.from_numpy(np.float32(0.05) * z)
    if name.endswith("modulation"):
        return torch.from_numpy(np.float32(0.3) * z)
    return torch.from_numpy(z / np.float32(np.sqrt(z[0].size)))


def given(what: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(drawn(f"input.{what}", shape))


def read_case(name: str) -> dict[str, Any]:
    return json.loads((DATA / name / "case.json").read_text())


def case_weights(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """In upstream's names, without the prefix."""
    return {name: weight(name, tuple(shape)) for name, shape in case["parameters"].items()}


def build(config: MatrixGame2Config, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> MatrixGame2:
    with torch.device("meta"):
        model = MatrixGame2(config, dtype=dtype)
    load_checkpoint(model, StateDictSource(weights), rules(config, prefix=""))
    return model.eval()


def heard(track: Tensor, first: int, frames: int) -> Tensor:
    """The 12 actions that each latent frame hears, `[B, F, 12, signals]`; the track has one a frame of video."""
    rows = []
    for latent in range(first, first + frames):
        indices = [min(max(4 * latent - 12 + i, 0), track.shape[1] - 1) for i in range(12)]
        rows.append(track[:, indices])
    return torch.stack(rows, 1)


def tiny(mode: str, *, listening: tuple[int, ...] = (0, 2), **changes: Any) -> MatrixGame2Config:
    """A small model of a released mode, with layers that listen and layers that do not."""
    released = MatrixGame2Config.released(mode)
    action = replace(
        released.action_config,
        blocks=listening,
        heads_num=1,
        hidden_size=8,
        img_hidden_size=48,
        keyboard_hidden_dim=64,
        mouse_hidden_dim=64,
    )
    sizes = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 3, "action_config": action}
    return replace(released, **{**sizes, **changes})


@cache
def tiny_weights(config: MatrixGame2Config) -> Mapping[str, Tensor]:
    """In upstream's names, without the prefix."""
    with torch.device("meta"):
        model = MatrixGame2(config)
    source = in_their_names(StateDictSource(model.state_dict()), rules(config, prefix=""))
    return {name: weight(name, info.shape) for name, info in source.tensors.items()}


@cache
def tiny_model(config: MatrixGame2Config) -> MatrixGame2:
    return build(config, tiny_weights(config))


def peer_of(config: MatrixGame2Config, window: FrameWindow) -> Peer:
    """The plain transformer of the benchmark, which agrees with the golden streams too."""
    action = config.action_config
    settings: dict[str, Any] = {name: getattr(config, name) for name in ("num_heads", "num_layers", "freq_dim", "eps")}
    names = ("heads_num", "blocks", "rope_dim_list", "rope_theta")
    settings["action_config"] = {name: getattr(action, name) for name in names}
    return Peer(tiny_weights(config), settings, window=window.frames, sinks=window.sink_frames)


def distance(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth.double()).norm() / truth.double().norm())
