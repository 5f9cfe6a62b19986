"""WAV files, against Python's `wave` and scipy; and that a file which is not whole is not there."""

import errno
import os
import resource
import signal
import struct
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from torch import Tensor

from longburn.models.ace_step.codecs import Cancelled, SampleFormat, WavReader, WavWriter, read_wav, write_wav

FORMATS: tuple[SampleFormat, ...] = ("int16", "int24", "float32")


def audio_of(samples: int, channels: int = 2) -> Tensor:
    return torch.rand(1, channels, samples, generator=torch.Generator().manual_seed(0)) * 2 - 1


def in_pieces(audio: Tensor, *sizes: int) -> Iterator[Tensor]:
    yield from audio.split(list(sizes), -1)


@pytest.mark.parametrize("sample_format", FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_scipy_reads_what_is_written(tmp_path: Path, sample_format: SampleFormat, channels: int) -> None:
    audio = audio_of(1001, channels)
    path = tmp_path / "song.wav"
    pieces = in_pieces(audio, 400, 1, 600)
    written = write_wav(path, pieces, sample_rate=44100, channels=channels, sample_format=sample_format)
    assert written == (1001, 0)
    rate, found = wavfile.read(path)
    assert rate == 44100
    expected = audio[0].T.double().numpy()
    if sample_format == "float32":
        assert np.array_equal(found.reshape(-1, channels), expected.astype(np.float32))
    else:  # scipy shifts 24 bits to the upper end of 32
        bits = {"int16": 16, "int24": 32}[sample_format]
        step = {"int16": 2.0**-15, "int24": 2.0**-23}[sample_format]
        assert np.abs(found.reshape(-1, channels) / 2.0 ** (bits - 1) - expected).max() <= step / 2
    assert os.listdir(tmp_path) == ["song.wav"]


@pytest.mark.parametrize(("sample_format", "width"), [("int16", 2), ("int24", 3)])
def test_the_standard_library_agrees(tmp_path: Path, sample_format: SampleFormat, width: int) -> None:
    path = tmp_path / "song.wav"
    write_wav(path, [audio_of(77, 1)[0]], channels=1, sample_format=sample_format)
    with wave.open(str(path)) as file:
        assert file.getparams()[:4] == (1, width, 48000, 77)
    size = path.stat().st_size
    assert size % 2 == 0  # 77 * 3 bytes are odd, and padded
    assert struct.unpack("<I", path.read_bytes()[4:8])[0] == size - 8


@pytest.mark.parametrize("sample_format", FORMATS)
def test_what_is_read_was_written(tmp_path: Path, sample_format: SampleFormat) -> None:
    path = tmp_path / "song.wav"
    audio = audio_of(500)
    write_wav(path, [audio], sample_format=sample_format)
    once = read_wav(path)
    bits = {"int16": 15, "int24": 23, "float32": 60}[sample_format]
    assert (once - audio).abs().max() <= 2.0 ** -(bits + 1)
    write_wav(path, [once], sample_format=sample_format)
    assert torch.equal(read_wav(path), once)
    assert torch.equal(WavReader(path).between(123, 321), once[..., 123:321])


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_reads_what_scipy_writes(tmp_path: Path, kind: type) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (300, 2))
    if np.issubdtype(kind, np.floating):
        stored, expected = values.astype(kind), values
    else:
        scale, zero = 2.0 ** (8 * np.dtype(kind).itemsize - 1), 128 if kind is np.uint8 else 0
        whole = np.clip(np.rint(values * scale), -scale, scale - 1)
        stored, expected = (whole + zero).astype(kind), whole / scale
    wavfile.write(tmp_path / "a.wav", 48000, stored)
    assert np.abs(read_wav(tmp_path / "a.wav")[0].T.numpy() - expected).max() <= 2.0**-24


def test_one_channel_fills_both_and_other_chunks_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    audio = audio_of(100, 1)
    write_wav(path, [audio], channels=1, sample_format="float32")
    data = path.read_bytes()
    path.write_bytes(data[:12] + b"LIST" + struct.pack("<I", 5) + b"song\0\0" + data[12:])
    assert torch.equal(read_wav(path), audio.expand(1, 2, 100))


def test_an_extensible_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    numbers = np.arange(-6, 6, dtype="<i2")
    description = struct.pack("<HHIIHHHHI", 0xFFFE, 2, 48000, 192000, 4, 16, 22, 16, 3) + struct.pack("<H14x", 1)
    chunks = b"fmt " + struct.pack("<I", len(description)) + description + b"data" + struct.pack("<I", 24)
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunks) + 24) + b"WAVE" + chunks + numbers.tobytes())
    assert np.array_equal(read_wav(path)[0].T.numpy() * 32768, numbers.reshape(-1, 2))


@pytest.mark.parametrize("sample_format", ["int16", "int24"])
def test_loud_samples_are_clipped_and_counted(tmp_path: Path, sample_format: SampleFormat) -> None:
    path = tmp_path / "a.wav"
    loud = torch.tensor([[1.0, 1.5, -1.0, -7.0], [0.0, 1e30, 0.5, -0.25]])
    assert write_wav(path, [loud], sample_format=sample_format) == (4, 3)
    top = 1 - 2.0 ** (-15 if sample_format == "int16" else -23)
    assert torch.equal(read_wav(path)[0], torch.tensor([[top, top, -1, -1], [0, top, 0.5, -0.25]]))


def test_any_floating_type_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_wav(path, [audio_of(10).bfloat16(), audio_of(10).double(), audio_of(10)], sample_format="float32")
    assert torch.equal(read_wav(path)[..., :10], audio_of(10).bfloat16().float())
    assert torch.equal(read_wav(path)[..., 10:20], audio_of(10))


def test_nothing_looks_complete_before_it_is(tmp_path: Path) -> None:
    path = tmp_path / "song.wav"
    with WavWriter(path) as file:
        file.write(audio_of(5000))
        assert not path.exists()
        (hidden,) = tmp_path.iterdir()
        assert hidden.name.startswith(".song.wav.")
        assert hidden.read_bytes()[:44] == bytes(44)  # what a crash leaves is no WAV file
        with pytest.raises(ValueError, match="not a WAV file"):
            read_wav(hidden)
    assert [file.name for file in tmp_path.iterdir()] == ["song.wav"]
    assert read_wav(path).shape == (1, 2, 5000)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_leaves_no_file_and_an_older_one_alone(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "song.wav"
    path.write_bytes(b"older")

    def failing() -> Iterator[Tensor]:
        yield audio_of(100)
        yield audio_of(100)
        raise error

    with pytest.raises(error):
        write_wav(path, failing())
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("song.wav", b"older")]


def test_progress_and_cancelling(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    write_wav(
        tmp_path / "a.wav",
        in_pieces(audio_of(60), 10, 20, 30),
        total=60,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(10, 60), (30, 60), (60, 60)]

    seen.clear()
    with pytest.raises(Cancelled, match=r"called off after 30 samples; .*b\.wav was not written"):
        write_wav(
            tmp_path / "b.wav",
            in_pieces(audio_of(60), 10, 20, 30),
            progress=lambda done, total: seen.append((done, total)),
            cancelled=lambda: len(seen) == 2,
        )
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.parametrize("limit", [10, 4000])  # bytes: the header's place does not fit, or the audio does not
def test_a_full_disk_leaves_no_file(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files stands for the disk: the same calls fail in the same places."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(OSError, match=r"cannot write .*song\.wav, and left no file: File too large") as caught:
            write_wav(tmp_path / "song.wav", in_pieces(audio_of(30000), 100, 29900))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == []


def test_no_place_for_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot write .*song\.wav"):
        write_wav(tmp_path / "nowhere" / "song.wav", [audio_of(3)])
    (tmp_path / "song.wav").mkdir()
    with pytest.raises(IsADirectoryError, match="left no file"):
        write_wav(tmp_path / "song.wav", [audio_of(3)])
    assert os.listdir(tmp_path) == ["song.wav"]


def test_bad_audio_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    bad = audio_of(10)
    bad[0, 1, 3] = torch.nan
    for pieces, message in (
        ([audio_of(5), bad], "1 of 20 values are not finite, after 5 samples"),
        ([audio_of(5, 3)], r"\[1, 3, 5\], wanted floating point \[2, n\]"),
        ([audio_of(5).int()], "int32"),
        ([audio_of(5).expand(2, 2, 5)], r"\[2, 2, 5\]"),
        ([], "no audio came"),
    ):
        with pytest.raises(ValueError, match=message):
            write_wav(path, pieces)
    with pytest.raises(ValueError, match="sample_format is 'int8', wanted one of int16, int24, float32"):
        write_wav(path, [audio_of(5)], sample_format="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use the writer in a with statement"):
        WavWriter(path).write(audio_of(5))
    with WavWriter(path, sample_format="float32") as file:
        file._samples = 2**29 - 100  # as if four gigabytes were there
        with pytest.raises(ValueError, match="over the 4 GiB of a WAV file"):
            file.write(audio_of(200))
        file._samples = 0
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, kind: type, value: float) -> None:
    """Where they are read; the rest of the file is what it was."""
    path, samples = tmp_path / "song.wav", np.zeros((100, 2), kind)
    samples[60, 1] = value
    wavfile.write(path, 48000, samples)
    reader = WavReader(path)
    assert reader.between(0, 60).shape == (1, 2, 60)
    with pytest.raises(ValueError, match=r"song.wav: 1 of samples 60 to 100 are not finite"):
        reader.between(60, 100)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_wav(path, [audio_of(100)], sample_rate=44100)
    good = path.read_bytes()
    with pytest.raises(ValueError, match=r"the sample rate is 44100 Hz, wanted 48000 Hz; resample it first"):
        read_wav(path)
    for data, message in (
        (good[:-1], "cut off: it ends at byte 443, its audio at 444"),
        (good[:30], "cut off: it ends at byte 30, before its audio"),
        (b"ID3" + good, "not a WAV file"),
        (b"", "not a WAV file"),
        (good[:20] + struct.pack("<H", 2) + good[22:], "format 2 of 16 bits"),
        (good[:34] + struct.pack("<H", 12) + good[36:], "format 1 of 12 bits"),
        (good[:12] + good[36:], "no description of its format"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_wav(path, sample_rate=44100)
    path.write_bytes(good)
    with pytest.raises(ValueError, match="has 2 channels, wanted 4 or 1"):
        read_wav(path, sample_rate=44100, channels=4)
    with pytest.raises(ValueError, match="asked for samples 50 to 101, has 100"):
        WavReader(path, sample_rate=44100).between(50, 101)
    path.write_bytes(good[:40] + b"\xff" * 4 + good[44:])  # as from a pipe: the audio goes on to the end
    assert read_wav(path, sample_rate=44100).shape == (1, 2, 100)
