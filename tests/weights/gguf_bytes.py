"""GGUF files byte by byte, so that every field of one can be made wrong."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

UINT8, UINT32, BOOL, STRING, ARRAY = 0, 4, 7, 8, 9
F32, Q4_1 = 0, 3


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: bytes) -> bytes:
    return u64(len(text)) + text


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + u32(kind) + value


def array(kind: int, values: Sequence[bytes], count: int | None = None) -> bytes:
    return u32(kind) + u64(len(values) if count is None else count) + b"".join(values)


def tensor(name: bytes, shape: Sequence[int], kind: int, offset: int) -> bytes:
    """A row of the table; the shape fastest first, as the format has it."""
    return string(name) + u32(len(shape)) + b"".join(map(u64, shape)) + u32(kind) + u64(offset)


@dataclass
class File:
    """A file that is right as it stands: one text, and two tensors of 64 bytes each."""

    magic: bytes = b"GGUF"
    version: int = 3
    pairs: list[bytes] = field(default_factory=lambda: [pair(b"general.name", STRING, string(b"tiny"))])
    tensors: list[bytes] = field(
        default_factory=lambda: [tensor(b"a", [8, 2], F32, 0), tensor(b"b", [16], F32, 64)],
    )
    pair_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32
    data: bytes = bytes(range(128))

    def build(self) -> bytes:
        counts = u64(len(self.tensors) if self.tensor_count is None else self.tensor_count)
        counts += u64(len(self.pairs) if self.pair_count is None else self.pair_count)
        header = self.magic + u32(self.version) + counts + b"".join(self.pairs) + b"".join(self.tensors)
        return header + bytes(-len(header) % self.alignment) + self.data
