"""Checkpoints that were saved with `torch.save`, read by PyTorch's restricted unpickler, which makes tensors only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longburn.weights.checkpoint import open_source
from longburn.weights.sources import CheckpointError, TensorInfo, TensorSource

SUFFIXES = frozenset({".pth", ".pt"})


class PickledSource:
    """The tensors of a `.pth` file: one dictionary from names to tensors.

    No code of the file is run. Its data is mapped, so one tensor after another comes from the disk.

    Raises:
        CheckpointError: no such file, one that holds more than tensors, or a damaged one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path}: no such file")
        self._held = _load(self.path)
        self._tensors = {name: TensorInfo(tuple(held.shape), held.dtype) for name, held in self._held.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU: a copy that the caller owns."""
        if name not in self._held:
            raise CheckpointError(f"{self.path}: no tensor {name!r} in this checkpoint")
        return self._held[name].clone(memory_format=torch.contiguous_format)


def open_any(path: str | Path) -> TensorSource:
    """`open_source`, or a `PickledSource` for a file that is called so.

    Raises:
        CheckpointError: nothing there, or a file that cannot be read.
    """
    return PickledSource(path) if Path(path).suffix in SUFFIXES else open_source(path)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # of the older format
    except Exception as error:  # damaged files raise almost anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]  # of an empty file it has no words
        raise CheckpointError(f"{path}: cannot be read as tensors alone: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, wanted a dictionary of tensors")
    if strange := [name for name, held in content.items() if not isinstance(held, Tensor)]:
        raise CheckpointError(
            f"{path}: {strange[0]!r} is a {type(content[strange[0]]).__name__}, wanted a dictionary of tensors"
        )
    return content
