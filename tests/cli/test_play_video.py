"""Videos: read back by pillow and PyAV, and never half there."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from longburn.cli.play_video import VideoWriter

RNG = np.random.default_rng(0)


def few_colours(n: int, height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (20, 3), np.uint8)[RNG.integers(0, 20, (n, height, width))]


def read_gif(path: Path) -> tuple[np.ndarray, list[int]]:
    with Image.open(path) as image:
        frames = [(np.asarray(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(image)]
    return np.stack([frame for frame, _ in frames]), [duration for _, duration in frames]


def read_mp4(path: Path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        return np.stack(frames), float(file.streams.video[0].average_rate)


def test_a_gif_of_few_colours_is_exact(tmp_path: Path) -> None:
    frames, path = few_colours(7, 6, 9), tmp_path / "a.gif"
    with VideoWriter(path, (6, 9), 12.0, scale=3) as video:
        video.add(frames[:1])
        video.add(frames[1:])
    shown, durations = read_gif(path)
    np.testing.assert_array_equal(shown, frames.repeat(3, 1).repeat(3, 2))
    assert durations == [80, 90, 80, 80, 90, 80, 80]  # whole hundredths, and 583 ms in all
    with Image.open(path) as image:
        assert image.info["loop"] == 0
    assert path.read_bytes().endswith(b"\0;")  # the trailer, which not every reader asks for
    assert list(tmp_path.iterdir()) == [path]


def test_a_gif_of_many_colours_is_close(tmp_path: Path) -> None:
    across, down = np.meshgrid(np.linspace(0, 255, 48), np.linspace(0, 255, 40))
    frame = np.stack([across, down, 255 - across], -1).astype(np.uint8)
    with VideoWriter(tmp_path / "a.GIF", (40, 48), 4.0) as video:
        video.add(frame[None])
    shown, _ = read_gif(tmp_path / "a.GIF")
    assert np.abs(shown[0].astype(int) - frame).mean() < 8


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_an_mp4_is_close_and_as_long(tmp_path: Path, size: tuple[int, int]) -> None:
    across, down = np.meshgrid(np.linspace(40, 200, size[1]), np.linspace(40, 200, size[0]))
    frames = np.stack([np.stack([across, down, across], -1) + 2 * n for n in range(9)]).astype(np.uint8)
    with VideoWriter(tmp_path / "a.mp4", size, 12.5) as video:
        for frame in frames:
            video.add(frame[None])
    assert video.frames == 9
    shown, rate = read_mp4(tmp_path / "a.mp4")
    assert len(shown) == 9
    assert rate == 12.5
    assert np.abs(shown[:, : size[0], : size[1]].astype(int) - frames).mean() < 6
    assert all(side % 2 == 0 for side in shown.shape[1:3])


@pytest.mark.parametrize("ending", ["gif", "mp4"])
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_is_not_whole_is_not_there(tmp_path: Path, ending: str, failure: type[BaseException]) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(b"older")

    def fail() -> None:
        with VideoWriter(path, (16, 16), 5.0) as video:
            video.add(few_colours(3, 16, 16))
            hidden = [file for file in tmp_path.iterdir() if file != path]
            assert all(file.name.startswith(".") for file in hidden)
            assert hidden or ending == "mp4"  # of which nothing is written before the first packet
            raise failure

    with pytest.raises(failure):
        fail()
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_a_video_without_frames_is_none(tmp_path: Path, ending: str) -> None:
    with (
        pytest.raises(ValueError, match=r"no frame came for .*, which was not written"),
        VideoWriter(tmp_path / f"a.{ending}", (16, 16), 5.0),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_each_with_is_a_video_of_its_own(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    video = VideoWriter(path, (16, 16), 5.0)
    for n in (3, 2):
        with video:
            video.add(few_colours(n, 16, 16))
        assert video.frames == n
    assert len(read_gif(path)[0] if ending == "gif" else read_mp4(path)[0]) == 2
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="no frame came for"), video:
        pass
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "fps", "scale", "error", "message"),
    [
        ("a.webm", 5.0, 1, ValueError, r"ending '\.webm', wanted \.gif or \.mp4"),
        ("a", 5.0, 1, ValueError, "ending ''"),
        ("a.gif", 60.0, 1, ValueError, "60 frames a second, a GIF file has at most 50"),
        ("a.gif", 0.0, 1, ValueError, r"0\.0 frames a second"),
        ("a.mp4", 5.0, 0, ValueError, "scale 0"),
        ("a.gif", 5.0, 4096, ValueError, "65536 x 65536 pixels, a GIF file has at most 65535 on a side"),
        ("nowhere/a.gif", 5.0, 1, FileNotFoundError, "no directory"),
        ("there.gif", 5.0, 1, IsADirectoryError, r"there\.gif is a directory, wanted a file"),
    ],
)
def test_bad_videos(tmp_path: Path, name: str, fps: float, scale: int, error: type, message: str) -> None:
    (tmp_path / "there.gif").mkdir()
    with pytest.raises(error, match=message):
        VideoWriter(tmp_path / name, (16, 16), fps, scale=scale)


def test_bad_frames_change_nothing(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.gif", (6, 9), 5.0) as video:
        video.add(few_colours(1, 6, 9))
        for frames in (few_colours(1, 9, 6), few_colours(1, 6, 9).astype(float), few_colours(1, 6, 9)[0]):
            with pytest.raises(ValueError, match=r"wanted uint8 \[n, 6, 9, 3\]"):
                video.add(frames)
    assert len(read_gif(tmp_path / "a.gif")[0]) == 1
    with pytest.raises(ValueError, match="is not open"):
        video.add(few_colours(1, 6, 9))


@pytest.mark.parametrize(("ending", "module", "package"), [(".gif", "PIL.Image", "pillow"), (".mp4", "av", "av")])
def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'longburn\[video\]'"):
        VideoWriter(tmp_path / f"a{ending}", (16, 16), 5.0)
