"""Where tensors come from: one small protocol, and safetensors files behind it.

A source answers from headers alone which tensors it holds and of what shape; the data of one tensor is
read when it is asked for. So a loader can compare every name and shape before it touches a single weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longburn.weights.placing import fill

Progress = Callable[[int, int], None]
"""Called with (done, in all) as work goes on; the unit is the caller's."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit: says what came, what was wanted and where."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header tells about one tensor: its shape, the dtype that `read` returns, and why it cannot be read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    damage: str | None = None


class TensorSource(Protocol):
    """Named tensors that can be described without being read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the source, by name."""

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the CPU, of the shape and dtype its `TensorInfo` says."""


@runtime_checkable
class PlacingSource(TensorSource, Protocol):
    """A source that can read a tensor to where it belongs, without a second copy on the host."""

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill `target`, contiguous, on any device, and of the shape and dtype that the `TensorInfo` says."""


class StateDictSource:
    """The tensors of a state dict, of a module of another library, say. They are not copied: who reads shares them."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self._tensors = {name: TensorInfo(tuple(held.shape), held.dtype) for name, held in state.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """The tensor `name`, where it lies."""
        if name not in self._state:
            raise CheckpointError(f"StateDictSource: no tensor {name!r} in this state dict")
        return self._state[name]


SAFETENSORS_DTYPES = {
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

_LONGEST_HEADER = 100_000_000  # of the safetensors package


class SafetensorsSource:
    """The tensors of a `.safetensors` file, or of a directory of them.

    A directory with a `*.safetensors.index.json` is read through it: every shard it names must be there and
    hold what the index says. Without one, all `*.safetensors` files of the directory count. A tensor that is cut off by
    the end of its file is listed as damaged.

    Raises:
        CheckpointError: nothing there, a damaged header or index, a shard that is missing or lies outside the
            directory, or one name in two shards; every shard that is concerned is listed.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or directory")
        shards = _shards(path) if path.is_dir() else {path: frozenset()}
        self._extents: dict[str, _Extent] = {}
        self._tensors: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for shard, promised in shards.items():
            try:
                self._add(shard, promised)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError("; ".join(problems))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of all shards, by name."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU: a copy that the caller owns."""
        info, _ = self._find(name)
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill `target`, contiguous and of the tensor's shape and dtype, on any device.

        The file is not mapped, because pages of a mapped file stay in the process's memory as long as the mapping.
        """
        info, extent = self._find(name)
        if (tuple(target.shape), target.dtype) != (info.shape, info.dtype) or not target.is_contiguous():
            raise ValueError(
                f"SafetensorsSource.read_into: {name} is {info.dtype} {list(info.shape)}, wanted a contiguous target "
                f"of the same, got {target.dtype} {list(target.shape)} with strides {target.stride()}"
            )
        try:
            came = fill(target, extent.file, extent.start)
        except OSError as error:
            raise CheckpointError(f"{extent.file}: cannot read {name}: {error}") from error
        if came != extent.size:
            raise CheckpointError(f"{extent.file}: cannot read {name}: {came} bytes are left of {extent.size}")

    def _find(self, name: str) -> tuple[TensorInfo, _Extent]:
        if name not in self._tensors:
            raise CheckpointError(f"no tensor {name!r} in this checkpoint")
        return self._tensors[name], self._extents[name]

    def _add(self, shard: Path, promised: frozenset[str]) -> None:
        header, first_byte, size = _read_header(shard)
        if absent := sorted(promised - header.keys()):
            raise CheckpointError(
                f"{shard}: the index promises {', '.join(absent)} here, but the file does not hold it"
            )
        for name, entry in header.items():
            if name in self._extents:
                raise CheckpointError(f"tensor {name} is both in {self._extents[name].file} and in {shard}")
            dtype = entry["dtype"]
            if dtype not in SAFETENSORS_DTYPES:
                raise CheckpointError(
                    f"{shard}: tensor {name} has dtype {dtype}, wanted one of {', '.join(SAFETENSORS_DTYPES)}"
                )
            start, end = (first_byte + offset for offset in entry["data_offsets"])
            damage = f"cut off: {shard.name} ends at byte {size}, the tensor at {end}" if end > size else None
            self._extents[name] = _Extent(shard, start, end - start)
            self._tensors[name] = TensorInfo(tuple(entry["shape"]), SAFETENSORS_DTYPES[dtype], damage)


class _Extent(NamedTuple):
    file: Path
    start: int
    size: int


def _read_header(shard: Path) -> tuple[dict[str, Any], int, int]:
    """What a file says of its tensors, where their data begins, and the file's size.

    The safetensors package judges the file; that the end is missing is the one fault that is let pass.
    """
    try:
        size = shard.stat().st_size
        try:
            with safe_open(shard, framework="np"):
                pass
        except SafetensorError:
            if not _is_cut_off(shard, size):
                raise
        header, first_byte = _parse_header(shard)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{shard}: not a readable safetensors file: {error}") from error
    return header, first_byte, size


def _parse_header(shard: Path) -> tuple[dict[str, Any], int]:
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(min(length, _LONGEST_HEADER)))
    header.pop("__metadata__", None)
    return header, 8 + length


def _is_cut_off(shard: Path, size: int) -> bool:
    """Whether a file that the safetensors package refuses has a sound header, and only its end is missing."""
    try:
        header, first_byte = _parse_header(shard)
        end = first_byte
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
            start, stop = entry["data_offsets"]
            itemsize = SAFETENSORS_DTYPES[entry["dtype"]].itemsize
            if (
                start != end - first_byte
                or min(entry["shape"], default=0) < 0
                or stop - start != math.prod(entry["shape"]) * itemsize
            ):
                return False
            end = first_byte + stop
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False
    return first_byte <= size < end


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
