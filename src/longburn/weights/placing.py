"""Bytes of a file into the memory of a tensor, in large pieces and by several readers at once.

A tensor on the CPU is filled where it is. One on a GPU is filled through page-locked buffers, so the host holds
`READERS * PIECE` bytes of it at most, and pieces are copied while others are read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

PIECE = 1 << 25  # bytes
READERS = min(4, os.cpu_count() or 1)

Piece = tuple[int, Tensor]  # where it begins in the file, and the bytes to fill


def fill(target: Tensor, file: Path, start: int) -> int:
    """Fill a contiguous tensor from byte `start` of `file` on; returns how many of its bytes the file had.

    Raises:
        OSError: the file cannot be read.
    """
    data = target.detach().reshape(-1).view(torch.uint8)
    pieces = list(zip(range(start, start + data.numel(), PIECE), torch.split(data, PIECE), strict=False))
    readers = min(READERS, len(pieces))
    stream = torch.cuda.current_stream(data.device) if data.is_cuda else None  # of the caller; threads have others

    def work(reader: int) -> int:
        own = pieces[reader::readers]
        with FileIO(file) as opened:
            return _fill_here(opened, own) if stream is None else _fill_there(opened, own, stream)

    if readers <= 1:
        return work(0) if readers else 0
    with ThreadPoolExecutor(readers) as pool:
        return sum(pool.map(work, range(readers)))


def _fill_here(file: FileIO, pieces: Sequence[Piece]) -> int:
    return sum(_read(file, start, piece) for start, piece in pieces)


def _fill_there(file: FileIO, pieces: Sequence[Piece], stream: torch.cuda.Stream) -> int:
    buffer = torch.empty(pieces[0][1].numel(), dtype=torch.uint8, pin_memory=True)
    came = 0
    for start, piece in pieces:
        staged = buffer[: piece.numel()]
        came += _read(file, start, staged)
        with torch.cuda.stream(stream):
            piece.copy_(staged, non_blocking=True)
            stream.record_event().synchronize()  # before the next piece comes into the same buffer
    return came


def _read(file: FileIO, start: int, data: Tensor) -> int:
    """Fill the bytes from byte `start` of the file on, or as many of them as it has."""
    view = data.numpy().data
    file.seek(start)
    done = 0
    while done < len(view) and (came := file.readinto(view[done:])):
        done += came
    return done
