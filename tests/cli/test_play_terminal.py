"""Keys and pictures: what sequences mean, what is drawn, and that a terminal is left as it was found."""

import os
import pty
import re
import signal
import termios
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from longburn.cli.play_terminal import ends_orderly, fitted, half_blocks, keyboard, keys_in, screen


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("w", ["w"]),
        ("W\x1b[A\x1bOBq", ["w", "up", "down", "q"]),
        ("\x1b[C\x1b[D \r\n", ["right", "left", "space", "enter", "enter"]),
        ("\x1b", ["escape"]),
        ("\x1b[1;5A\x1b[15~x", ["x"]),  # with modifiers, and function keys: unknown, and not their letters
        ("\x01\x7fé", ["é"]),
        ("", []),
    ],
)
def test_keys(text: str, keys: list[str]) -> None:
    assert keys_in(text) == keys


@pytest.fixture
def terminal():
    """A pseudo-terminal: the end that a person types at, and the program's as a file."""
    person, program = pty.openpty()
    with os.fdopen(program, "r+b", buffering=0) as file:
        yield person, file
    os.close(person)


def test_keys_come_one_by_one_without_echo(terminal) -> None:
    person, file = terminal
    with keyboard(file) as keys:
        assert keys.wait(0) == []
        os.write(person, b"w")
        assert keys.wait(5) == ["w"]
        os.write(person, b"\x1b[")
        threading.Timer(0.005, os.write, (person, b"A")).start()  # the rest of an arrow key, a little later
        assert keys.wait(5) == ["up"]
        os.write(person, b"\x1b")
        assert keys.wait(5) == ["escape"]
        began = time.perf_counter()
        assert keys.wait(0.05) == []
        assert time.perf_counter() - began >= 0.05
    os.set_blocking(person, False)
    with pytest.raises(BlockingIOError):
        os.read(person, 100)  # nothing was echoed


def settings(file) -> list:
    return termios.tcgetattr(file.fileno())


@pytest.fixture
def quits_are_heard() -> Iterator[None]:
    """Even if the tests run in the background of a shell that leaves SIGQUIT ignored there."""
    before = signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGQUIT, before)


ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@pytest.mark.usefixtures("quits_are_heard")
@pytest.mark.parametrize("end", ["well", "error", "interrupt", *ENDS], ids=str)
def test_the_terminal_is_restored(terminal, end) -> None:
    _, file = terminal
    before, handlers = settings(file), [signal.getsignal(number) for number in ENDS]

    def use() -> None:
        with ends_orderly(), keyboard(file):
            during = settings(file)
            assert not during[3] & (termios.ICANON | termios.ECHO)
            assert during[3] & termios.ISIG  # Ctrl-C interrupts
            assert during[6][termios.VSUSP] == b"\0"  # and Ctrl-Z does nothing
            if end == "error":
                raise RuntimeError
            if end == "interrupt":
                raise KeyboardInterrupt
            if isinstance(end, signal.Signals):
                signal.raise_signal(end)

    if end == "well":
        use()
    else:
        expected = {"error": RuntimeError, "interrupt": KeyboardInterrupt}.get(end, SystemExit)
        with pytest.raises(expected) as raised:
            use()
        if expected is SystemExit:
            assert raised.value.code == 128 + end
    assert settings(file) == before
    assert [signal.getsignal(number) for number in ENDS] == handlers


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ends_orderly():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_was_typed_ahead_does_not_reach_the_shell(terminal) -> None:
    person, file = terminal
    with keyboard(file):
        os.write(person, b"rm -rf important\n")
        time.sleep(0.05)
    os.set_blocking(file.fileno(), False)
    assert file.read(100) is None


def test_a_terminal_that_goes_away_is_noticed() -> None:
    person, program = pty.openpty()
    with os.fdopen(program, "r+b", buffering=0) as file, keyboard(file) as keys:
        os.close(person)
        assert keys.wait(5) == []
        assert keys.closed
        assert keys.wait(5) == []


def test_no_terminal_is_refused(tmp_path) -> None:
    with (
        (tmp_path / "file").open("w+b") as file,
        pytest.raises(ValueError, match="stdin is not a terminal"),
        keyboard(file),
    ):
        pass


class Sheet:
    """What was written."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_a_picture_in_half_blocks() -> None:
    frame = np.array([[[255, 0, 0], [255, 0, 0]], [[0, 0, 255], [0, 255, 0]]], np.uint8)
    assert half_blocks(frame, truecolor=True) == [
        "\x1b[38;2;255;0;0m\x1b[48;2;0;0;255m▀\x1b[48;2;0;255;0m▀",
    ]
    assert half_blocks(frame, truecolor=False) == ["\x1b[38;5;196m\x1b[48;5;21m▀\x1b[48;5;46m▀"]


def test_pictures_fit() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    assert fitted(frame, 200, 45).shape == (90, 150, 3)  # three times as large: 4 would take 60 lines
    np.testing.assert_array_equal(fitted(frame, 200, 45)[::3, ::3], frame)
    half = fitted(frame, 25, 100)
    assert half.shape == (16, 25, 3)  # 15 rows, and a black one to make it even
    blocks = frame.reshape(15, 2, 25, 2, 3).astype(int).sum((1, 3)) // 4
    np.testing.assert_array_equal(half[:15], blocks)
    assert fitted(frame, 7, 1).shape == (2, 3, 3)
    assert fitted(frame, 1, 1).shape[1] == 1


def test_a_screen_is_left_as_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "6")
    sheet = Sheet()

    def use() -> None:
        with screen(sheet) as shown:
            shown.draw(np.zeros((4, 4, 3), np.uint8), "a caption that is longer than the terminal is wide", "keys")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert sheet.text.startswith("\x1b[?1049h\x1b[?25l")
    assert sheet.text.endswith("\x1b[?25h\x1b[?1049l")
    assert re.search(r"a caption that is l\x1b\[K\r\nkeys\x1b\[J", sheet.text)
    assert sheet.text.count("▀") == 8 * 4  # 8 x 8 pixels, two to a character
