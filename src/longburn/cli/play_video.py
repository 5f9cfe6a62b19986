"""Frames to a GIF or MP4 file as they are made. The file is there only when it is whole."""

import os
import secrets
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]

LEAST_DELAY = 2  # hundredths of a second: what viewers of GIF files make of less is anybody's guess
MOST_PIXELS = 2**16 - 1  # on a side of a GIF file


class Encoder(Protocol):
    """Writes one kind of file."""

    def add(self, frame: "Frames") -> None:
        """The next frame, uint8 `[height, width, 3]`."""
        ...

    def finish(self) -> None:
        """All frames were given: complete the file and close it."""
        ...

    def abandon(self) -> None:
        """Close the file as it is."""
        ...


class VideoWriter:
    """A video in the making, for a `with` statement. Each `with` makes it anew.

    Frames go to a hidden file beside it. When the `with` ends well, that takes the name of the file, in place of one
    that was there; when it ends by an exception, it is removed, and an older file stays as it was.

    Args:
        path: ends in .gif or .mp4.
        size: height and width of the frames.
        fps: frames a second.
        scale: pixels of the video on a side of each pixel of the frames.

    Attributes:
        frames: how many there are so far.

    Raises:
        ValueError: another ending, or more pixels or frames a second than the format has.
        ImportError: what the format needs is not installed.
        OSError: no such directory, or the path is one.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: float, *, scale: int = 1) -> None:
        self.path, self.size, self.scale, self.frames = path, size, scale, 0
        self._make = encoder(path)
        if fps <= 0 or scale < 1:
            raise ValueError(f"VideoWriter: {fps} frames a second at scale {scale}, wanted more than 0 and at least 1")
        height, width = (side * scale for side in size)
        if path.suffix.lower() == ".gif" and fps > 100 / LEAST_DELAY:
            raise ValueError(f"VideoWriter: {fps:g} frames a second, a GIF file has at most {100 // LEAST_DELAY}")
        if path.suffix.lower() == ".gif" and max(height, width) > MOST_PIXELS:
            raise ValueError(f"VideoWriter: {height} x {width} pixels, a GIF file has at most {MOST_PIXELS} on a side")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"VideoWriter: {path}: no directory {path.parent}")
        if path.is_dir():
            raise IsADirectoryError(f"VideoWriter: {path} is a directory, wanted a file")
        self._fps = Fraction(fps).limit_denominator(1000)
        self._unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        self._encoder: Encoder | None = None

    def __enter__(self) -> Self:
        height, width = self.size
        self.frames = 0
        try:
            self._encoder = self._make(self._unfinished, (height * self.scale, width * self.scale), self._fps)
        except BaseException:
            self._unfinished.unlink(missing_ok=True)
            raise
        return self

    def add(self, frames: "Frames") -> None:
        """Append frames, uint8 `[n, height, width, 3]`.

        Raises:
            ValueError: frames of another size or type. The video is then as it was.
        """
        if self._encoder is None:
            raise ValueError(f"VideoWriter.add: {self.path} is not open; use the writer in a with statement")
        if str(frames.dtype) != "uint8" or frames.ndim != 4 or frames.shape[1:] != (*self.size, 3):
            raise ValueError(
                f"VideoWriter.add: {self.path}: frames {frames.dtype} {list(frames.shape)}, wanted uint8 "
                f"[n, {self.size[0]}, {self.size[1]}, 3]"
            )
        for frame in frames:
            self._encoder.add(frame.repeat(self.scale, 0).repeat(self.scale, 1))
            self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        encoder, self._encoder = self._encoder, None
        assert encoder is not None
        try:
            if kind is None and self.frames:
                encoder.finish()
                os.replace(self._unfinished, self.path)
            else:
                encoder.abandon()
        finally:
            self._unfinished.unlink(missing_ok=True)
        if kind is None and not self.frames:
            raise ValueError(f"VideoWriter: no frame came for {self.path}, which was not written")


def encoder(path: Path) -> Callable[[Path, tuple[int, int], Fraction], Encoder]:
    """What writes files with this ending.

    Raises:
        ValueError: another ending.
        ImportError: what it needs is not installed.
    """
    kinds: dict[str, tuple[str, str, type[GifEncoder] | type[Mp4Encoder]]] = {
        ".gif": ("PIL.Image", "pillow", GifEncoder),
        ".mp4": ("av", "av", Mp4Encoder),
    }
    if path.suffix.lower() not in kinds:
        raise ValueError(f"{path}: ending {path.suffix!r}, wanted {' or '.join(kinds)}")
    module, package, kind = kinds[path.suffix.lower()]
    try:
        __import__(module)
    except ImportError as error:
        raise ImportError(
            f"{path}: a {path.suffix.lower()} file needs {package}: pip install 'longburn[video]'"
        ) from error
    return kind


class GifEncoder:
    """A GIF file, frame by frame: memory does not grow with the video, and up to 256 colours a frame are exact."""

    def __init__(self, path: Path, size: tuple[int, int], fps: Fraction) -> None:
        self._fps, self._count = fps, 0
        self._file: IO[bytes] = path.open("xb")
        again_and_again = b"!\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00"
        self._file.write(b"GIF89a" + struct.pack("<HHBBB", size[1], size[0], 0, 0, 0) + again_and_again)

    def add(self, frame: "Frames") -> None:
        from PIL.GifImagePlugin import getdata

        until, self._count = self._hundredths(), self._count + 1
        delay = self._hundredths() - until
        for part in getdata(_in_colours(frame), duration=10 * delay, include_color_table=True):
            self._file.write(part)

    def finish(self) -> None:
        self._file.write(b";")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        self._file.close()

    def _hundredths(self) -> int:
        """When the frame that comes next is shown. Rounded here, so that a video is as long as it should be."""
        return round(self._count * 100 / self._fps)


class Mp4Encoder:
    """An MP4 file: H.264, or MPEG-4 where PyAV has no encoder for it. An odd size is made even by repeating an edge."""

    def __init__(self, path: Path, size: tuple[int, int], fps: Fraction) -> None:
        import av

        name = next(codec for codec in ("libx264", "mpeg4") if codec in av.codecs_available)
        self._container: Any = av.open(str(path), "w", format="mp4")
        self._stream: Any = self._container.add_stream(name, rate=fps)
        self._stream.height, self._stream.width = (side + side % 2 for side in size)
        self._stream.pix_fmt = "yuv420p"

    def add(self, frame: "Frames") -> None:
        import av
        import numpy as np

        height, width = frame.shape[:2]
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        self._container.mux(self._stream.encode(picture))

    def finish(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()

    def abandon(self) -> None:
        self._container.close()


def _in_colours(frame: "Frames") -> Any:
    """The frame as an image with a palette: of its own colours, if there are no more than 256."""
    import numpy as np
    from PIL import Image

    wide = frame.astype(np.uint32)
    packed = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    colours, which = np.unique(packed, return_inverse=True)
    if len(colours) > 256:
        return Image.fromarray(frame).quantize(256)
    image = Image.fromarray(which.reshape(packed.shape).astype(np.uint8))
    image.putpalette(np.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1).astype(np.uint8).tobytes())
    return image
