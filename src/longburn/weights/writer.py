"""Writes safetensors one tensor at a time: the header first, then each tensor's bytes as it is made.

The `safetensors` package writes a file from tensors that are all in memory; a converted checkpoint is larger than that.
Format: https://huggingface.co/docs/safetensors/index#format.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longburn.weights.sources import SAFETENSORS_DTYPES, CheckpointError, Progress, TensorSource

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_PIECE = 1 << 26  # bytes written at a time: bounds the copy of a tensor whose elements stand in another order


def write_shards(
    directory: Path, source: TensorSource, *, max_shard_size: int | None = None, progress: Progress | None = None
) -> list[Path]:
    """Write every tensor of `source` into `directory`, which exists; the host holds one tensor at a time.

    One file `model.safetensors`, or, where that would hold more than `max_shard_size` bytes of tensors,
    `model-00001-of-0000N.safetensors`, ... with an index. A tensor larger than that gets a file of its own.

    Args:
        progress: called with (bytes written, bytes in all).

    Raises:
        CheckpointError: a tensor that cannot be read, or is not what the source's table says.
        OSError: no room, or files of these names are there already.
    """
    shards = _shards(source, max_shard_size)
    total, done = sum(nbytes(source, name) for name in source.tensors), 0
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    paths = [directory / file for file in (files if len(shards) > 1 else ["model.safetensors"])]
    for path, names in zip(paths, shards, strict=True):
        for written in _write(path, source, names):
            done += written
            if progress is not None:
                progress(done, total)
    if len(paths) > 1:
        weight_map = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def write_file(path: Path, source: TensorSource) -> None:
    """Write every tensor of `source` into one new file; the host holds one tensor at a time."""
    for _ in _write(path, source, list(source.tensors)):
        pass


def nbytes(source: TensorSource, name: str) -> int:
    """Bytes of a tensor as `read` gives it."""
    info = source.tensors[name]
    return math.prod(info.shape) * info.dtype.itemsize


def _shards(source: TensorSource, most: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in source.tensors:
        size += nbytes(source, name)
        if most is not None and size > most and shards[-1]:
            shards.append([])
            size = nbytes(source, name)
        shards[-1].append(name)
    return shards


def _write(path: Path, source: TensorSource, names: Sequence[str]) -> Iterator[int]:
    """Yields the number of bytes after each piece."""
    names = sorted(names, key=lambda name: -source.tensors[name].dtype.itemsize)  # so that every tensor is aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        info, end = source.tensors[name], start + nbytes(source, name)
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for piece in _pieces(_read(source, name)):
                file.write(piece.numpy().data)
                yield piece.numel()
            del piece  # it may be a view of the whole tensor, which must go before the next one is read
        file.flush()
        os.fsync(file.fileno())


def _read(source: TensorSource, name: str) -> Tensor:
    tensor, info = source.read(name), source.tensors[name]
    if (tuple(tensor.shape), tensor.dtype) != (info.shape, info.dtype):
        raise CheckpointError(f"{name} is {tensor.dtype} {list(tensor.shape)}, wanted {info.dtype} {list(info.shape)}")
    return tensor


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor, in order."""
    if tensor.dim() == 0 or tensor.nbytes <= _PIECE:
        yield tensor.contiguous().reshape(-1).view(torch.uint8)
        return
    rows = max(1, _PIECE * tensor.shape[0] // tensor.nbytes)
    for part in torch.split(tensor, rows):
        if part.shape[0] == 1 and part.nbytes > _PIECE:
            yield from _pieces(part[0])
        else:
            yield part.contiguous().reshape(-1).view(torch.uint8)
