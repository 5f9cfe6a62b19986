"""Loading Matrix-Game 2's transformer, and telling from a checkpoint which of the models it is."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from longburn.models.matrix_game_2.config import MODES, MatrixGame2Config
from longburn.models.matrix_game_2.dit import MatrixGame2
from longburn.models.matrix_game_2.names import PREFIX, rules
from longburn.models.settings import read_settings
from longburn.weights import CheckpointError, Progress, SafetensorsSource, TensorInfo, load_checkpoint

_KEYS = "action_model.keyboard_embed.0.weight"
_MOUSE = "action_model.mouse_mlp.0.weight"


def load_matrix_game_2(
    path: str | Path,
    *,
    mode: str | None = None,
    config: MatrixGame2Config | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> MatrixGame2:
    """Load the transformer.

    Args:
        path: the `.safetensors` file of a release (they come without sizes), or a directory with one and, perhaps, a
            `config.json`.
        mode: "universal", "gta_drive" or "templerun"; None takes what the checkpoint is.
        config: sizes; None: those of the `config.json`, or of the release whose actions the checkpoint hears.
        dtype: of the weights. The released ones are bf16.
        progress: called with (elements placed, elements in all).

    Raises:
        CheckpointError: files that are missing or damaged, a checkpoint of another mode or model, names or shapes that
            do not fit.
        ValueError: a configuration of another architecture.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"load_matrix_game_2: mode is {mode!r}, wanted one of {', '.join(MODES)}")
    path = Path(path)
    source = SafetensorsSource(path)
    prefix, found = _signals(path, source.tensors)
    if mode is not None and found != mode:
        raise CheckpointError(f"{path}: holds {found} weights, wanted {mode}; load it with mode={found!r}")
    if config is None:
        config = stated_config(path, found)
    if config.mode != found:
        raise CheckpointError(f"{path}: holds {found} weights, but the configuration is for {config.mode}")
    with torch.device("meta"):
        model = MatrixGame2(config, dtype=dtype)
    load_checkpoint(model, source, rules(config, prefix=prefix), device=device, progress=progress)
    return model.eval()


def stated_config(path: Path, mode: str) -> MatrixGame2Config:
    """What a directory's `config.json` says, or else the released model of this mode.

    Raises:
        CheckpointError: a damaged file.
        ValueError: a configuration of another architecture.
    """
    if not (path / "config.json").is_file():
        return MatrixGame2Config.released(mode)
    return MatrixGame2Config.from_config(read_settings(path))


def _signals(path: Path, tensors: Mapping[str, TensorInfo]) -> tuple[str, str]:
    """The prefix of the names, and the mode whose actions the weights hear."""
    keyboards = sorted(name for name in tensors if name.endswith(_KEYS))
    if not keyboards or not keyboards[0].removeprefix(PREFIX).startswith("blocks."):
        raise CheckpointError(f"{path}: no tensor blocks.N.{_KEYS}; wanted the transformer of Matrix-Game 2")
    keys, mouse = tensors[keyboards[0]].shape[-1], any(name.endswith(_MOUSE) for name in tensors)
    prefix = PREFIX if keyboards[0].startswith(PREFIX) else ""
    base = MatrixGame2Config()
    action = replace(base.action_config, keyboard_dim_in=keys, enable_mouse=mouse)
    mode = replace(base, action_config=action).mode
    if mode not in MODES:
        raise CheckpointError(
            f"{path}: hears {keys} keys {'and a' if mouse else 'without a'} mouse, as no release does"
        )
    return prefix, mode
