"""The two small models that travel with the package."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longburn.cache import AttnWindow
from longburn.models import data
from longburn.models.minigrid.policy import FULL, MemoryPolicy, PolicyConfig
from longburn.models.minigrid.world import RoomConfig, RoomModel
from longburn.weights import CheckpointError, Rename, load_checkpoint

AGENT, WORLD = "minigrid_agent", "minigrid_world"
FILE = "model.safetensors"


def load_policy(
    path: str | Path | None = None, *, window: AttnWindow = FULL, device: torch.device | str = "cpu"
) -> MemoryPolicy:
    """The trained policy for MiniGrid's memory task.

    Args:
        path: a directory with `model.safetensors` and `config.json`; default the one shipped.
        window: of every layer; see `longburn.models.minigrid.policy.window`.

    Raises:
        CheckpointError: the files do not fit the model, or are not there.
    """
    folder = _folder(path, AGENT)
    policy = MemoryPolicy(PolicyConfig(**_sizes(folder, PolicyConfig)), window=window)
    _fill(policy, folder, device)
    return policy.eval()


def load_room(path: str | Path | None = None, *, device: torch.device | str = "cpu", **sizes: int) -> RoomModel:
    """The trained world model of a room.

    Args:
        path: a directory with `model.safetensors` and `config.json`; default the one shipped.
        sizes: `window` and `sinks`, in frames, other than those it was trained with.

    Raises:
        CheckpointError: the files do not fit the model, or are not there.
    """
    folder = _folder(path, WORLD)
    model = RoomModel(RoomConfig(**{**_sizes(folder, RoomConfig), **sizes}))
    _fill(model, folder, device)
    return model.eval()


def _folder(path: str | Path | None, name: str) -> Path:
    return Path(data.__path__[0]) / name if path is None else Path(path)


def _sizes(folder: Path, config: type) -> dict[str, int]:
    """The sizes in `config.json`."""
    file = folder / "config.json"
    try:
        read: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}; wanted the sizes of a {config.__name__}") from error
    known = set(config.__dataclass_fields__)  # type: ignore[attr-defined]
    sizes = read if isinstance(read, dict) else {"": read}
    if set(sizes) - known or not all(type(n) is int and n >= (name != "sinks") for name, n in sizes.items()):
        raise CheckpointError(f"{file}: {read}, wanted whole numbers of at least 1 for {', '.join(sorted(known))}")
    return sizes


def _fill(model: nn.Module, folder: Path, device: torch.device | str) -> None:
    """Weights, kept in fp16, as fp32: models this small are computed in it."""
    rules = [Rename(name, name) for name in model.state_dict()]
    load_checkpoint(model, folder / FILE, rules, dtype=torch.float32, device=device)
