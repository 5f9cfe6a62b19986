"""GGUF files: metadata as plain Python values, tensors dequantised one at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
Type numbers, block sizes and dequantisation come from the `gguf` package. The header is walked here, over the
mapped file, because `gguf.GGUFReader` builds an array object for each element of a vocabulary (4.2 s against
0.1 s for 49,152 tokens) and does not check lengths against the size of the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)
from gguf.quants import dequantize
from torch import Tensor

from longburn.weights.sources import CheckpointError, TensorInfo

GgufScalar = str | int | float | bool
GgufValue = GgufScalar | list[GgufScalar]

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
# Stored as they are used; BF16 is among the quantised types of the gguf package and becomes float32.
_PLAIN = {
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.I8: torch.int8,
    GGMLQuantizationType.I16: torch.int16,
    GGMLQuantizationType.I32: torch.int32,
    GGMLQuantizationType.I64: torch.int64,
}
_MAX_DIMS = 4  # GGML_MAX_DIMS
_CHUNK = 1 << 22  # elements dequantised at a time: bounds the temporaries to 16 MiB each


@dataclass(frozen=True)
class _Extent:
    """Where a tensor's data lies: bytes `start` to `end` of the file, in blocks of `kind`."""

    kind: GGMLQuantizationType
    start: int
    end: int


class GgufFile:
    """A GGUF file opened for reading; a `TensorSource`.

    Attributes:
        path: the file.
        metadata: every key of the header; arrays are lists.

    Raises:
        CheckpointError: not a GGUF file, a version other than 2 and 3, or a header that contradicts itself
            or the size of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                magic = file.read(4)
                if magic != struct.pack("<I", GGUF_MAGIC):
                    raise CheckpointError(f"{self.path}: not a GGUF file: begins with {magic!r}, wanted b'GGUF'")
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened: {error.strerror or error}") from error
        cursor = _Cursor(self._data, self.path)
        tensor_count, value_count = _read_counts(cursor)
        self.metadata: Mapping[str, GgufValue] = _read_metadata(cursor, value_count)
        self._tensors, self._extents = _read_tensor_table(cursor, tensor_count, self.metadata)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name. Shapes are PyTorch's (rows first: GGUF stores sizes the other way round)."""
        return self._tensors

    def kind(self, name: str) -> str:
        """How `name` is stored: "F32", "Q4_1", ..."""
        return self._extent(name).kind.name

    def nbytes(self, name: str) -> int:
        """Bytes of `name` in the file."""
        extent = self._extent(name)
        return extent.end - extent.start

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor `name`, dequantised, in its own dtype or in `dtype`: a copy that the caller owns.

        Raises:
            CheckpointError: no such tensor, or a kind of quantisation that the gguf package cannot decode.
        """
        extent = self._extent(name)
        shape, own = self._tensors[name].shape, self._tensors[name].dtype
        out = torch.empty(shape, dtype=dtype or own)
        columns = shape[-1] if shape else 1
        block, block_bytes = GGML_QUANT_SIZES[extent.kind]
        rows = np.frombuffer(self._data, np.uint8, extent.end - extent.start, extent.start)
        rows = rows.reshape(-1, columns // block * block_bytes)
        flat = out.view(-1, columns)
        step = max(1, _CHUNK // columns)
        for first in range(0, rows.shape[0], step):
            flat[first : first + step].copy_(self._decode(name, extent.kind, rows[first : first + step]))
        # What was read is copied; its pages need not count as this process's memory any longer.
        page = extent.start - extent.start % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED, page, extent.end - page)
        return out

    def _decode(self, name: str, kind: GGMLQuantizationType, rows: np.ndarray) -> Tensor:
        if kind in _PLAIN:
            return torch.frombuffer(bytearray(rows), dtype=_PLAIN[kind]).view(rows.shape[0], -1)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # damaged scales: the loader's finite check reports them
                return torch.from_numpy(dequantize(rows, kind))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} is {kind.name}, which the gguf package cannot decode"
            ) from error

    def _extent(self, name: str) -> _Extent:
        if name not in self._extents:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}")
        return self._extents[name]


class _Cursor:
    """Reads the header front to back; nothing is taken beyond the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def need(self, count: int, what: str) -> int:
        """Steps over `count` bytes and returns where they began."""
        start = self.at
        if count > self.size - start:
            left = self.size - start
            raise self.error(f"{what} at byte {start} wants {count} bytes, {left} are left: truncated or damaged")
        self.at += count
        return start

    def scalar(self, code: str, what: str) -> GgufScalar:
        value: GgufScalar = struct.unpack_from("<" + code, self.data, self.need(struct.calcsize("<" + code), what))[0]
        return value

    def count(self, code: str, what: str) -> int:
        """An unsigned integer that steers the reading."""
        return int(self.scalar(code, what))

    def text(self, what: str) -> str:
        length = self.count("Q", f"length of {what}")
        start = self.need(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} at byte {start} is not UTF-8") from error

    def texts(self, count: int, what: str) -> list[GgufScalar]:
        # The same as `text`, `count` times, without its calls: a vocabulary has a hundred thousand of them.
        data, at, size, length_of = self.data, self.at, self.size, struct.Struct("<Q").unpack_from
        out: list[GgufScalar] = []
        try:
            for _ in range(count):
                end = at + 8 + length_of(data, at)[0]
                if end > size:
                    raise struct.error
                out.append(data[at + 8 : end].decode("utf-8"))
                at = end
        except struct.error:
            raise self.error(f"{what}[{len(out)}] at byte {at} goes beyond the end: truncated or damaged") from None
        except UnicodeDecodeError as error:
            raise self.error(f"{what}[{len(out)}] at byte {at} is not UTF-8") from error
        self.at = at
        return out

    def value_type(self, what: str) -> GGUFValueType:
        raw = self.count("I", f"type of {what}")
        try:
            return GGUFValueType(raw)
        except ValueError:
            raise self.error(f"{what} has value type {raw}, wanted 0 to {max(GGUFValueType).value}") from None


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Checks magic number and version; returns how many tensors and how many metadata values follow."""
    cursor.count("I", "magic number")
    version = cursor.count("I", "version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        hint = " (a big-endian file)" if swapped in (2, 3) else ""
        raise cursor.error(f"GGUF version {version}{hint}, wanted 2 or 3, little-endian")
    return cursor.count("Q", "tensor count"), cursor.count("Q", "metadata count")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, GgufValue]:
    metadata: dict[str, GgufValue] = {}
    for i in range(count):
        key = cursor.text(f"metadata key {i}")
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} comes twice")
        metadata[key] = _read_value(cursor, key)
    return metadata


def _read_value(cursor: _Cursor, key: str) -> GgufValue:
    kind = cursor.value_type(key)
    if kind == GGUFValueType.STRING:
        return cursor.text(key)
    if kind != GGUFValueType.ARRAY:
        return cursor.scalar(_SCALARS[kind], key)
    kind, count = cursor.value_type(key), cursor.count("Q", f"length of {key}")
    if kind == GGUFValueType.STRING:
        return cursor.texts(count, key)
    if kind == GGUFValueType.ARRAY:
        raise cursor.error(f"{key} is an array of arrays, wanted an array of plain values")
    code = _SCALARS[kind]
    start = cursor.need(count * struct.calcsize("<" + code), key)
    return list(struct.unpack_from(f"<{count}{code}", cursor.data, start))


def _read_tensor_table(
    cursor: _Cursor, count: int, metadata: Mapping[str, GgufValue]
) -> tuple[dict[str, TensorInfo], dict[str, _Extent]]:
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r}, wanted a power of two")
    infos: dict[str, TensorInfo] = {}
    places: list[tuple[str, GGMLQuantizationType, int, int]] = []
    for i in range(count):
        name = cursor.text(f"name of tensor {i}")
        if name in infos:
            raise cursor.error(f"tensor {name!r} comes twice")
        infos[name], kind, offset, size = _read_tensor_entry(cursor, name)
        if offset % alignment:
            raise cursor.error(f"tensor {name} begins at offset {offset}, wanted a multiple of {alignment}")
        places.append((name, kind, offset, size))
    base = -(-cursor.at // alignment) * alignment
    extents = {name: _Extent(kind, base + offset, base + offset + size) for name, kind, offset, size in places}
    _check_extents(cursor, extents)
    return infos, extents


def _read_tensor_entry(cursor: _Cursor, name: str) -> tuple[TensorInfo, GGMLQuantizationType, int, int]:
    """One row of the table: shape and dtype, kind of storage, offset and size of the data in bytes."""
    dims = cursor.count("I", f"number of dimensions of {name}")
    if dims > _MAX_DIMS:
        raise cursor.error(f"tensor {name} has {dims} dimensions, wanted at most {_MAX_DIMS}")
    shape = tuple(cursor.count("Q", f"shape of {name}") for _ in range(dims))[::-1]
    raw = cursor.count("I", f"type of {name}")
    try:
        kind = GGMLQuantizationType(raw)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise cursor.error(f"tensor {name} has type {raw}, which the gguf package does not know") from None
    columns = shape[-1] if shape else 1
    if 0 in shape or columns % block:
        raise cursor.error(
            f"tensor {name} is {list(shape)}, wanted no 0 and rows of a multiple of {kind.name}'s {block}"
        )
    size = math.prod(shape) // block * block_bytes
    offset = cursor.count("Q", f"offset of {name}")
    return TensorInfo(shape, _PLAIN.get(kind, torch.float32)), kind, offset, size


def _check_extents(cursor: _Cursor, extents: Mapping[str, _Extent]) -> None:
    before, end = "", 0
    for name, extent in sorted(extents.items(), key=lambda item: (item[1].start, item[1].end)):
        if extent.end > cursor.size:
            raise cursor.error(
                f"tensor {name} takes bytes {extent.start} to {extent.end}, the file ends at {cursor.size}: "
                "truncated or damaged"
            )
        if extent.start < end:
            raise cursor.error(f"tensors {before} and {name} overlap at byte {extent.start}")
        before, end = name, extent.end
