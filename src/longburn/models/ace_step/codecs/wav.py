"""WAV files: audio is written as it is made, and a file is there only when it is whole.

Python's `wave` begins with the final name and a header that it mends at the end, so what a crash leaves looks like a
song. It also has no floating-point samples. The header is 44 bytes; `struct` does it here.
"""

import os
import secrets
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

SampleFormat = Literal["int16", "int24", "float32"]
"""How samples are stored."""

PCM, FLOAT = 1, 3  # kinds of samples, in a header
_FORMATS: dict[str, tuple[int, int]] = {"int16": (PCM, 2), "int24": (PCM, 3), "float32": (FLOAT, 4)}
_LARGEST = 2**32 - 1  # what the sizes in a header can say


class Cancelled(Exception):  # noqa: N818 (no error: it was asked for)
    """The writing was called off; no file is left."""


class Written(NamedTuple):
    """What a file holds: samples of each channel, and how many numbers lay beyond -1 .. 1 and were clipped."""

    samples: int
    clipped: int


class WavWriter:
    """A WAV file in the making, for a `with` statement.

    Samples go to a hidden file beside it, whose header stays empty. When the `with` ends well, the header is written
    and the file takes its name, in place of one that was there. When it ends by an exception of any kind, the hidden
    file is removed and an older file stays as it was.

    Args:
        path: of the file.
        sample_rate, channels: of the audio.
        sample_format: "int16" and "int24" round, and clip at -1 and 1; "float32" keeps samples as they are.
    """

    def __init__(
        self, path: str | Path, *, sample_rate: int = 48000, channels: int = 2, sample_format: SampleFormat = "int16"
    ) -> None:
        if sample_format not in _FORMATS:
            raise ValueError(f"WavWriter: sample_format is {sample_format!r}, wanted one of {', '.join(_FORMATS)}")
        if sample_rate < 1 or not 1 <= channels < 2**14:
            raise ValueError(f"WavWriter: {channels} channels at {sample_rate} Hz, wanted at least 1 of each")
        self.path = Path(path)
        self.sample_rate, self.channels, self.sample_format = sample_rate, channels, sample_format
        self._samples = self._clipped = 0
        self._unfinished = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        self._file: IO[bytes] | None = None

    @property
    def written(self) -> Written:
        """What was written so far."""
        return Written(self._samples, self._clipped)

    def __enter__(self) -> Self:
        try:
            self._file = self._unfinished.open("xb")
            self._file.write(bytes(len(self._header())))
        except OSError as error:
            self._discard()
            raise self._named(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failure:
            raise self._named(failure) from failure
        finally:
            self._discard()

    def write(self, audio: Tensor) -> None:
        """Append audio `[channels, n]` or `[1, channels, n]`, of any floating-point type, on any device.

        Raises:
            ValueError: another shape, values that are not finite, more than the 4 GiB that a file can hold, or no
            `with`.
            OSError: the disk is full, or other trouble with the file.
        """
        if self._file is None:
            raise ValueError(f"WavWriter.write: {self.path} is not open; use the writer in a with statement")
        one = audio[0] if audio.dim() == 3 and audio.shape[0] == 1 else audio
        if one.dim() != 2 or one.shape[0] != self.channels or not one.is_floating_point():
            raise ValueError(
                f"WavWriter.write: the audio is {audio.dtype} {list(audio.shape)}, wanted floating point "
                f"[{self.channels}, n]"
            )
        samples = one.detach().to("cpu", torch.float32).T.numpy()
        if not np.isfinite(samples).all():
            raise ValueError(
                f"WavWriter.write: {np.count_nonzero(~np.isfinite(samples))} of {samples.size} values are not finite, "
                f"after {self._samples} samples; a lower guidance or a wider dtype may help"
            )
        if len(self._header()) + (self._samples + len(samples)) * self._frame_bytes > _LARGEST:
            raise ValueError(
                f"WavWriter.write: {self._samples + len(samples)} samples as {self.sample_format} are over the 4 GiB "
                "of a WAV file; wanted fewer, or a smaller format"
            )
        try:
            self._file.write(_stored(samples, self.sample_format))
        except OSError as error:
            raise self._named(error) from error
        self._samples += len(samples)
        if self.sample_format != "float32":
            self._clipped += int(np.count_nonzero(np.abs(samples) > 1))

    @property
    def _frame_bytes(self) -> int:
        return _FORMATS[self.sample_format][1] * self.channels

    def _header(self) -> bytes:
        kind, width = _FORMATS[self.sample_format]
        size, rate = self._samples * self._frame_bytes, self.sample_rate
        description = struct.pack(
            "<HHIIHH", kind, self.channels, rate, rate * self._frame_bytes, width * self.channels, 8 * width
        )
        chunks = _chunk(b"fmt ", description)
        if kind != PCM:  # other kinds also say how many samples there are
            chunks = _chunk(b"fmt ", description + struct.pack("<H", 0)) + _chunk(
                b"fact", struct.pack("<I", self._samples)
            )
        riff = struct.pack("<4sI4s", b"RIFF", 4 + len(chunks) + 8 + size + size % 2, b"WAVE")
        return riff + chunks + struct.pack("<4sI", b"data", size)

    def _finish(self) -> None:
        assert self._file is not None
        self._file.write(bytes(self._samples * self._frame_bytes % 2))  # chunks are even
        self._file.seek(0)
        self._file.write(self._header())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._unfinished, self.path)

    def _discard(self) -> None:
        """Close, and leave nothing unfinished behind."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError:
            pass  # what could not be written is not wanted any more
        finally:
            self._unfinished.unlink(missing_ok=True)

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, f"WavWriter: cannot write {self.path}, and left no file: {error.strerror or error}")


def write_wav(
    path: str | Path,
    pieces: Iterable[Tensor],
    *,
    sample_rate: int = 48000,
    channels: int = 2,
    sample_format: SampleFormat = "int16",
    total: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Written:
    """Write consecutive pieces of audio, such as `Oobleck.decode_stream` gives, as they come.

    Args:
        path, sample_rate, channels, sample_format: see `WavWriter`.
        pieces: `[channels, n]` or `[1, channels, n]` each. The next one is asked for before one is written, so that a
        GPU
            works while the host waits for the disk.
        total: samples in all, for `progress`.
        progress: called with (samples written, total) after every piece.
        cancelled: asked before every piece; True ends the writing.

    Raises:
        Cancelled: as was asked.
        ValueError, OSError: what `WavWriter` raises, or no audio came. No file is left after any exception.
    """
    with WavWriter(path, sample_rate=sample_rate, channels=channels, sample_format=sample_format) as file:
        coming = iter(pieces)
        piece = next(coming, None)
        if piece is None:
            raise ValueError(f"write_wav: no audio came for {path}")
        while piece is not None:
            if cancelled is not None and cancelled():
                raise Cancelled(f"write_wav: called off after {file.written.samples} samples; {path} was not written")
            following = next(coming, None)
            file.write(piece)
            piece = following
            if progress is not None:
                progress(file.written.samples, total)
    return file.written


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack("<4sI", name, len(content)) + content


def _stored(samples: np.ndarray, sample_format: str) -> bytes:
    """fp32 `[n, channels]` as the file's bytes. Scaled by a power of two, so that reading gives back what was there."""
    kind, width = _FORMATS[sample_format]
    if kind == FLOAT:
        return samples.astype("<f4").tobytes()
    scale = 2.0 ** (8 * width - 1)
    whole = np.clip(np.rint(samples * np.float64(scale)), -scale, scale - 1).astype("<i4")
    return np.ascontiguousarray(whole).view(np.uint8).reshape(*whole.shape, 4)[..., :width].tobytes()
