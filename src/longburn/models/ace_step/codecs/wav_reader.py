"""Reading WAV files in parts.

Python's `wave` has no floating-point samples and, before Python 3.12, refuses the extensible header of many 24-bit
files.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longburn.models.ace_step.codecs.wav import FLOAT, PCM

_EXTENSIBLE = 0xFFFE  # the kind stands in an extension of the header
_UNKNOWN = 2**32 - 1  # what programs that write to a pipe say of the length


class WavReader:
    """A WAV file that is read in parts; a `Signal`. Integers of 8 to 32 bits and floating point of 32 and 64.

    Args:
        path: of the file.
        sample_rate: the rate it must have.
        channels: what it is read as; a file of one channel fills all of them.

    Raises:
        ValueError: no WAV file, one that is cut off, an unknown format, another rate or number of channels.
    """

    def __init__(self, path: str | Path, *, sample_rate: int = 48000, channels: int = 2) -> None:
        self.path, self.sample_rate, self.channels = Path(path), sample_rate, channels
        self._layout = _layout(self.path)
        if self._layout.rate != sample_rate:
            raise ValueError(
                f"{self.path}: the sample rate is {self._layout.rate} Hz, wanted {sample_rate} Hz; resample it first, "
                f"for example: ffmpeg -i {self.path.name} -ar {sample_rate} resampled.wav"
            )
        if self._layout.channels not in (1, channels):
            raise ValueError(
                f"{self.path}: has {self._layout.channels} channels, wanted {channels} or 1; mix it down first"
            )

    @property
    def length(self) -> int:
        """Samples of each channel."""
        return self._layout.samples

    def between(self, start: int, stop: int) -> Tensor:
        """Samples `start .. stop - 1`, fp32 in -1 .. 1, `[1, channels, stop - start]`.

        Raises:
            ValueError: a stretch that the file does not hold, or numbers in it that are not finite.
        """
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"{self.path}: asked for samples {start} to {stop}, has {self.length}")
        layout = self._layout
        with self.path.open("rb") as file:
            file.seek(layout.first_byte + start * layout.frame_bytes)
            data = file.read((stop - start) * layout.frame_bytes)
        if len(data) != (stop - start) * layout.frame_bytes:
            raise ValueError(f"{self.path}: became shorter while it was read")
        values = _values(data, layout).reshape(-1, layout.channels)
        if layout.kind == FLOAT and not (finite := np.isfinite(values)).all():
            raise ValueError(
                f"{self.path}: {np.count_nonzero(~finite)} of samples {start} to {stop} are not finite; "
                "wanted numbers in -1 to 1, so write the file anew"
            )
        return torch.from_numpy(np.ascontiguousarray(values.T)).expand(self.channels, -1)[None]


def read_wav(path: str | Path, *, sample_rate: int = 48000, channels: int = 2) -> Tensor:
    """The whole of a WAV file, fp32 `[1, channels, n]`; see `WavReader`."""
    file = WavReader(path, sample_rate=sample_rate, channels=channels)
    return file.between(0, file.length)


class _Layout(NamedTuple):
    kind: int
    width: int  # bytes a number
    channels: int
    rate: int
    first_byte: int
    samples: int

    @property
    def frame_bytes(self) -> int:
        return self.width * self.channels


def _values(data: bytes, layout: _Layout) -> np.ndarray:
    if layout.kind == FLOAT:
        return np.frombuffer(data, f"<f{layout.width}").astype(np.float32)
    if layout.width == 1:  # unsigned, as no other
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    wide = np.zeros((len(data) // layout.width, 4), np.uint8)
    wide[:, 4 - layout.width :] = np.frombuffer(data, np.uint8).reshape(-1, layout.width)
    return (wide.view("<i4")[:, 0] / 2.0**31).astype(np.float32)


def _layout(path: Path) -> _Layout:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        riff = file.read(12)
        if len(riff) < 12 or riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
            raise ValueError(
                f"{path}: not a WAV file; wanted RIFF/WAVE, for example: ffmpeg -i INPUT -ar 48000 song.wav"
            )
        description = b""
        while len(head := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", head)
            if name == b"data":
                return _described(path, description, file.tell(), length, size)
            content = file.read(length + length % 2)
            description = content if name == b"fmt " else description
    raise ValueError(f"{path}: cut off: it ends at byte {size}, before its audio")


def _described(path: Path, description: bytes, first_byte: int, length: int, size: int) -> _Layout:
    if len(description) < 16:
        raise ValueError(f"{path}: damaged: no description of its format before the audio")
    kind, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", description)
    if kind == _EXTENSIBLE and len(description) >= 26:
        (kind,) = struct.unpack_from("<H", description, 24)
    known = {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}
    if bits not in known.get(kind, ()) or channels < 1 or frame_bytes != channels * bits // 8:
        raise ValueError(
            f"{path}: format {kind} of {bits} bits and {channels} channels in {frame_bytes} bytes, wanted PCM of "
            "8, 16, 24 or 32 bits or floating point of 32 or 64"
        )
    length = size - first_byte if length == _UNKNOWN else length
    if first_byte + length > size:
        raise ValueError(f"{path}: cut off: it ends at byte {size}, its audio at {first_byte + length}")
    return _Layout(kind, bits // 8, channels, rate, first_byte, length // frame_bytes)
