"""Small Matrix-Game 2 models: weights and inputs by name, as the golden cases have them."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longburn.models.matrix_game_2 import MatrixGame2, MatrixGame2Config
from longburn.models.matrix_game_2.names import rules
from longburn.weights import TensorInfo, load_checkpoint

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


class State:
    """A state dict as a source of a checkpoint."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.tensors = {name: TensorInfo(tuple(x.shape), x.dtype) for name, x in state.items()}

    def read(self, name: str) -> Tensor:
        return self.state[name]


def read_case(name: str) -> dict[str, Any]:
    return json.loads((DATA / name / "case.json").read_text())


def case_weights(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """In upstream's names, without the prefix."""
    return {name: weight(name, tuple(shape)) for name, shape in case["parameters"].items()}


def build(config: MatrixGame2Config, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> MatrixGame2:
    with torch.device("meta"):
        model = MatrixGame2(config, dtype=dtype)
    load_checkpoint(model, State(weights), rules(config, prefix=""))
    return model.eval()


def heard(track: Tensor, first: int, frames: int) -> Tensor:
    """The 12 actions that each latent frame hears, `[B, F, 12, signals]`; the track has one a frame of video."""
    rows = []
    for latent in range(first, first + frames):
        indices = [min(max(4 * latent - 12 + i, 0), track.shape[1] - 1) for i in range(12)]
        rows.append(track[:, indices])
    return torch.stack(rows, 1)
