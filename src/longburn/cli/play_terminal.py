"""A terminal to play on: keys as they are pressed, and frames as coloured half blocks. It is left as it was found."""

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Frame = NDArray[np.uint8]

NAMED = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1b[C": "right",
    "\x1b[D": "left",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\x1bOC": "right",
    "\x1bOD": "left",
    " ": "space",
    "\r": "enter",
    "\n": "enter",
    "\x1b": "escape",
}
REST_OF_A_SEQUENCE = 0.02  # seconds within which the rest of an arrow key comes
STATUS_LINES = 2


class Keyboard:
    """The keys of a terminal, without echo and without waiting for a line; use `keyboard()`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = ""
        self.closed = False

    def wait(self, seconds: float | None) -> list[str]:
        """The keys that were pressed, at once if there are any, else when one is or after so many seconds (None: for
        ever). The empty list then; also when the terminal is gone, see `closed`."""
        if self.closed or not self._is_ready(seconds):
            return []
        self._read()
        while self._unread.startswith("\x1b") and self._unread not in NAMED and self._is_ready(REST_OF_A_SEQUENCE):
            self._read()
        if self._unread == "\x1b" and self._is_ready(REST_OF_A_SEQUENCE):
            self._read()
        text, self._unread = self._unread, ""
        return keys_in(text)

    def _is_ready(self, seconds: float | None) -> bool:
        return not self.closed and bool(select.select([self._descriptor], [], [], seconds)[0])

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, 1024)
        except OSError:  # the terminal was closed
            data = b""
        self.closed = not data
        self._unread += data.decode("utf-8", "ignore")


def keys_in(text: str) -> list[str]:
    """The names of the keys that send this text; capital letters are their small ones, unknown sequences nothing."""
    keys, at = [], 0
    while at < len(text):
        if text[at] == "\x1b" and text[at + 1 : at + 2] in ("[", "O"):
            end = at + 2
            while end < len(text) and not text[end].isalpha() and text[end] != "~":
                end += 1
            sequence, at = text[at : end + 1], end + 1
        else:
            sequence, at = text[at], at + 1
        if sequence in NAMED:
            keys.append(NAMED[sequence])
        elif sequence.isprintable():
            keys.append(sequence.lower())
    return keys


@contextmanager
def keyboard(file: TextIO | None = None) -> Iterator[Keyboard]:
    """The keys of the terminal `file`, default stdin, which is restored however the `with` ends; see `ends_orderly()`.
    Ctrl-C interrupts as usual; Ctrl-Z does nothing.

    Raises:
        ValueError: not a terminal.
    """
    import termios

    descriptor = (file or sys.stdin).fileno()
    if not os.isatty(descriptor):
        raise ValueError("keyboard: stdin is not a terminal")
    before = termios.tcgetattr(descriptor)
    silent = termios.tcgetattr(descriptor)
    silent[3] &= ~(termios.ICANON | termios.ECHO)
    for which in (termios.VSUSP, getattr(termios, "VDSUSP", termios.VSUSP)):
        silent[6][which] = b"\0"  # no stop in the middle of a game, with the terminal in this state
    silent[6][termios.VMIN], silent[6][termios.VTIME] = 1, 0
    try:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
        yield Keyboard(descriptor)
    finally:
        with suppress(termios.error):  # the terminal is gone
            # What was typed ahead would go to the shell.
            termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)


@contextmanager
def ends_orderly() -> Iterator[None]:
    """Inside, SIGTERM, SIGHUP and SIGQUIT (which Ctrl-\\ sends) end the process by an exception, so that everything is
    put back on the way. One that is ignored (SIGHUP under nohup) stays so."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    ends = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    signals = [number for number in ends if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, leave) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


class Screen:
    """Frames on a terminal; use `screen()`."""

    def __init__(self, file: TextIO, *, truecolor: bool) -> None:
        self._file, self._truecolor, self._size = file, truecolor, (0, 0)

    def draw(self, frame: "Frame", *lines: str) -> None:
        """The frame, uint8 `[height, width, 3]`, as large as fits, and up to two lines below it."""
        size = shutil.get_terminal_size()
        parts = ["\x1b[?2026h"]  # terminals that know it show all of this at once
        if size != self._size:
            self._size = size
            parts.append("\x1b[2J")
        parts.append("\x1b[H")
        rows = half_blocks(fitted(frame, size.columns, size.lines - STATUS_LINES), truecolor=self._truecolor)
        parts += [row + "\x1b[0m\x1b[K\r\n" for row in rows]
        lines = tuple(line[: size.columns - 1] for line in lines[:STATUS_LINES])
        parts += ["\x1b[K\r\n".join(lines), "\x1b[J\x1b[?2026l"]
        self._file.write("".join(parts))
        self._file.flush()


@contextmanager
def screen(file: TextIO | None = None) -> Iterator[Screen]:
    """A screen of its own on the terminal `file`, default stdout; what was there before comes back at the end."""
    file = file or sys.stdout
    try:
        file.write("\x1b[?1049h\x1b[?25l\x1b[2J")
        yield Screen(file, truecolor=has_truecolor())
    finally:
        with suppress(OSError):  # the terminal is gone
            file.write("\x1b[0m\x1b[?25h\x1b[?1049l")
            file.flush()


def has_truecolor() -> bool:
    """Whether the terminal says that it has 24 bits of colour."""
    return os.environ.get("COLORTERM", "").lower() in ("truecolor", "24bit")


def fitted(frame: "Frame", columns: int, lines: int) -> "Frame":
    """The frame as large as fits so many columns and lines of half blocks, in its own proportions: means of pixels
    where it shrinks, whole multiples of them where it grows. Its height is even."""
    import numpy as np

    height, width = frame.shape[:2]
    room = min(columns / width, 2 * lines / height)
    if room >= 1:
        times = int(room)
        grown = frame.repeat(times, 0).repeat(times, 1)
    else:
        rows, across = max(1, int(height * room)), max(1, int(width * room))
        tops, lefts = np.arange(rows) * height // rows, np.arange(across) * width // across
        sums = np.add.reduceat(np.add.reduceat(frame.astype(np.int64), tops, 0), lefts, 1)
        counts = np.diff(tops, append=height)[:, None, None] * np.diff(lefts, append=width)[:, None]
        grown = (sums // counts).astype(np.uint8)
    return np.pad(grown, ((0, len(grown) % 2), (0, 0), (0, 0)))


def half_blocks(frame: "Frame", *, truecolor: bool) -> list[str]:
    """Each line of the terminal: "▀" in the colours of two rows of pixels, which are said where they change."""
    pixels = frame.tolist()
    texts = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        parts: list[str] = []
        above: list[int] | None = None
        below: list[int] | None = None
        for top, bottom in zip(upper, lower, strict=True):
            if top != above:
                parts.append(_colour(38, top, truecolor))
            if bottom != below:
                parts.append(_colour(48, bottom, truecolor))
            above, below = top, bottom
            parts.append("▀")
        texts.append("".join(parts))
    return texts


def _colour(layer: int, rgb: list[int], truecolor: bool) -> str:
    if truecolor:
        return f"\x1b[{layer};2;{rgb[0]};{rgb[1]};{rgb[2]}m"
    r, g, b = (round(part * 5 / 255) for part in rgb)
    return f"\x1b[{layer};5;{16 + 36 * r + 6 * g + b}m"  # the cube of 6 x 6 x 6 colours


def pause(keys: Keyboard | None, until: float) -> list[str]:
    """Wait until this moment of `time.perf_counter`, or for the next key: what was pressed."""
    left = until - time.perf_counter()
    if left <= 0:
        return [] if keys is None else keys.wait(0)
    if keys is not None:
        return keys.wait(left)
    time.sleep(left)
    return []
