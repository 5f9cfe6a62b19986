"""Where tensors come from: one small protocol, and safetensors files behind it.

A source answers from headers alone which tensors it holds and of what shape; the data of one tensor is
read when it is asked for. So a loader can compare every name and shape before it touches a single weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Progress = Callable[[int, int], None]
"""Called with (done, in all) as work goes on; the unit is the caller's."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit: says what came, what was wanted and where."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header tells about one tensor: its shape, and the dtype that `read` returns."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorSource(Protocol):
    """Named tensors that can be described without being read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the source, by name."""

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the CPU, of the shape and dtype its `TensorInfo` says."""


_SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}


class SafetensorsSource:
    """The tensors of a `.safetensors` file, or of a directory of them.

    A directory with a `*.safetensors.index.json` is read through it: every shard it names must be there and
    hold what the index says. Without one, all `*.safetensors` files of the directory count. Data is memory-mapped.

    Raises:
        CheckpointError: nothing there, a damaged file or index, a shard that is missing or lies outside the
            directory, or one name in two shards.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or directory")
        shards = _shards(path) if path.is_dir() else {path: frozenset()}
        self._files: dict[Path, Any] = {}
        self._shard_of: dict[str, Path] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for shard, promised in shards.items():
            self._open(shard, promised)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of all shards, by name."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU, backed by the mapped file."""
        if name not in self._shard_of:
            raise CheckpointError(f"no tensor {name!r} in this checkpoint")
        shard = self._shard_of[name]
        try:
            tensor: Tensor = self._files[shard].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard}: cannot read {name}: {error}") from error
        return tensor

    def _open(self, shard: Path, promised: frozenset[str]) -> None:
        try:
            file: Any = safe_open(shard, framework="pt", device="cpu")
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            described = {name: (tuple(h.get_shape()), h.get_dtype()) for name, h in headers.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{shard}: not a readable safetensors file: {error}") from error
        if absent := sorted(promised - described.keys()):
            raise CheckpointError(
                f"{shard}: the index promises {', '.join(absent)} here, but the file does not hold it"
            )
        for name, (shape, dtype) in described.items():
            if name in self._shard_of:
                raise CheckpointError(f"tensor {name} is both in {self._shard_of[name]} and in {shard}")
            if dtype not in _SAFETENSORS_DTYPES:
                raise CheckpointError(
                    f"{shard}: tensor {name} has dtype {dtype}, wanted one of {', '.join(_SAFETENSORS_DTYPES)}"
                )
            self._shard_of[name] = shard
            self._tensors[name] = TensorInfo(shape, _SAFETENSORS_DTYPES[dtype])
        self._files[shard] = file


def _shards(directory: Path) -> dict[Path, frozenset[str]]:
    """The files of a checkpoint directory, each with the tensor names that the index promises in it."""
    match sorted(directory.glob("*.safetensors.index.json")):
        case [index]:
            return _read_index(index)
        case [_, *_] as several:
            raise CheckpointError(f"{directory}: wanted one index, found {', '.join(i.name for i in several)}")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickled = sorted(file.name for suffix in ("bin", "pt", "pth") for file in directory.glob(f"*.{suffix}"))
        why = f" ({pickled[0]} is a pickle, which may run code when it is read; convert it first)" if pickled else ""
        raise CheckpointError(f"{directory}: holds no *.safetensors file{why}")
    return {file: frozenset() for file in files}


def _read_index(index: Path) -> dict[Path, frozenset[str]]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a readable JSON file: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: wanted an object 'weight_map' of tensor name to file name")
    promised: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not _stays_inside(file):
            raise CheckpointError(f"{index}: {name} lies in {file!r}, which is outside the checkpoint's directory")
        promised.setdefault(index.parent / file, set()).add(name)
    if absent := sorted(shard.name for shard in promised if not shard.is_file()):
        raise CheckpointError(f"{index}: names the shard {', '.join(absent)}, which is not there")
    return {shard: frozenset(names) for shard, names in promised.items()}


def _stays_inside(file: str) -> bool:
    """Whether the relative path cannot leave its directory, read as a path of either kind of system.

    Links are not followed: download caches keep shards as links to files elsewhere.
    """
    for path in (PurePosixPath(file), PureWindowsPath(file)):
        if path.anchor or ".." in path.parts or not path.parts:
            return False
    return "\0" not in file
