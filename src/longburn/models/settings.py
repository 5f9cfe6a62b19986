"""Reading the settings of a model directory."""

import json
from pathlib import Path
from typing import Any

from longburn.weights import CheckpointError


def read_settings(directory: Path) -> dict[str, Any]:
    """The `config.json` of a model directory.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: no config.json; wanted a model directory with config.json and safetensors")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a {type(config).__name__}, wanted an object")
    return config
