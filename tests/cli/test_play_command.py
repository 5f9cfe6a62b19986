"""`longburn play`: a scripted world under keys from a script, a pseudo-terminal or an agent."""

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

WORLDS = Path(__file__).parents[1] / "interact"
sys.path.append(str(WORLDS))

from worlds import DotWorld  # noqa: E402

from longburn.cli.play_options import PlayOptions  # noqa: E402

IN_A_PROCESS = f"""
import signal, sys, time
signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # which background jobs of some shells ignore
sys.path.append({str(WORLDS)!r})
from worlds import DotWorld
from longburn.cli.play_options import PlayOptions
class Slow(DotWorld):
    fps = 50.0
    def step(self, action):
        if "slow" in sys.argv: time.sleep(0.2)
        if "fails" in sys.argv: raise RuntimeError("the world came apart")
        return super().step(action)
PlayOptions._room = lambda self: Slow()
from longburn.cli.main import run
run([argument for argument in sys.argv[1:] if argument not in ("slow", "fails")])
"""


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> DotWorld:
    """The world that the command plays."""
    dots = DotWorld()
    monkeypatch.setattr(PlayOptions, "_room", lambda self: dots)
    return dots


def pictures(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def test_keys_of_a_script(invoke, world: DotWorld, tmp_path: Path) -> None:
    path = tmp_path / "play.gif"
    outcome = invoke("play", "--keys", "w,d*2,-, s", "--seed", 4, "-o", path, "--json")
    assert outcome.code == 0, outcome.err
    assert [asked for asked in world.asked if not isinstance(asked, tuple)] == [0, 3, 3, 4, 1]
    assert world.asked[0][0] == 4
    facts = json.loads(outcome.out)
    assert (facts["steps"], facts["frames"], facts["output"], facts["seed"]) == (5, 11, str(path), 4)
    assert len(facts["seconds"]) == 5
    assert "5 steps, 11 frames; a step took" in outcome.err
    assert outcome.err.endswith(f": {10 / sum(facts['seconds']):.1f} frames/s\n")  # no step made the first one
    shown = pictures(path)
    again = DotWorld()
    frames = [again.reset(seed=4).frames, *(again.step(action).frames for action in (0, 3, 3, 4, 1))]
    np.testing.assert_array_equal(shown, np.concatenate(frames))
    first = path.read_bytes()
    assert invoke("play", "--keys", "w,d*2,-, s", "--seed", 4, "-o", path).code == 0
    assert path.read_bytes() == first


def test_steps_end_a_script_and_an_end_begins_anew(invoke, world: DotWorld) -> None:
    assert invoke("play", "--keys", "s*20,d*20", "--steps", 9).code == 0
    actions = [asked for asked in world.asked if not isinstance(asked, tuple)]
    assert actions == [1] * 9
    world.asked.clear()
    assert invoke("play", "--keys", "s*3,d*9,w", "--seed", 1).code == 0
    seeds = [asked[0] for asked in world.asked if isinstance(asked, tuple)]
    assert seeds == [1, 2]  # the corner was reached, and a key later the next room began


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "not a terminal, so there are no keys to play with: give --keys or --agent"),
        (("--keys", "w", "--draw"), 2, "--draw: stdout is not a terminal"),
        (("--keys", "w,x"), 2, "--keys: 'x' does nothing here, wanted w, s, a, d or -"),
        (("--keys", "w*0"), 2, "'w*0', wanted a number of at least 1"),
        (("--keys", "w*x"), 2, "'w*x', wanted a number"),
        (("--keys", ""), 2, "'' does nothing here"),
        (("--keys", "w*9999999999", "--steps", "2"), 2, "--keys: 'w*9999999999' is too often, wanted at most"),
        (("--keys", "w*1000001"), 2, "'w*1000001' is too often"),
        (("--keys", "w,d*1000000"), 2, "'d*1000000' is too often, wanted at most 1,000,000 keys in all"),
        pytest.param(("--keys", f"w*{'9' * 5000}"), 2, f"'w*{'9' * 20}...' is too often", id="5000 digits"),
        (("--keys", "w", "--scale", "2"), 2, "--scale 2 is of a video, and none is written: give --output"),
        (("--keys", "w", "--fps", "3"), 2, "--fps 3: nothing is drawn or written: give --draw or --output"),
        (("--keys", "w", "--turns"), 2, "--turns is for your own keys, and --keys plays without: leave one out"),
        (("--keys", "w", "--realtime", "-o", "a.gif"), 2, "--realtime is for your own keys, and --keys plays without"),
        (("--keys", "w", "-o", "a.avi"), 2, "a.avi: ending '.avi', wanted .gif or .mp4"),
        (("--keys", "w", "-o", "nowhere/a.gif"), 2, "no directory nowhere"),
        (("--keys", "w", "-o", "a.gif", "--fps", "90"), 2, "90 frames a second, a GIF file has at most 50"),
        (("--keys", "w", "--agent"), 2, "--keys is for playing; --agent plays by itself"),
        (("--keys", "w", "-o", "a.gif", "--scale", "70000"), 2, "70000 x 70000 pixels, a GIF file has at most 65535"),
        (
            ("--keys", "w", "-o", "a.gif", "--scale", "60000"),
            2,
            "960000 x 1440000 pixels, a GIF file has at most",
        ),
        (("--keys", "w", "-o", "."), 2, "ending ''"),
        (("--keys", "w", "--sampler", "1000"), 2, "--sampler is of Matrix-Game 2"),
        (("--keys", "w", "--image", "a.png"), 2, "--image is of Matrix-Game 2"),
        (("--keys", "w", "--model", "m"), 2, "--model: wanted --image too"),
        (("--keys", "w", "--model", "m", "--image", "i", "--temperature", "1"), 2, "Matrix-Game 2 has --sampler"),
        (("--keys", "w", "--steps", "0"), 2, "0"),
        (("--keys", "w", "--seed", "-1"), 2, "-1"),
        (("--keys", "w", "--scale", "0"), 2, "0"),
        (("--keys", "w", "--device", "bogus"), 2, "--device 'bogus': wanted auto, cpu, cuda or cuda:N"),
        (("--keys", "w", "--device", "cuda:99"), 1, "--device cuda:99: this PyTorch"),
        (("--agent", "--steps", "1", "--device", "cuda:99"), 1, "--device cuda:99: this PyTorch"),
    ],
    ids=str,
)
def test_bad_usage(invoke, world: DotWorld, tmp_path, monkeypatch, options: tuple, code: int, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = invoke("play", *options)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert world.asked == []
    assert list(tmp_path.iterdir()) == []


def test_a_number_of_times_may_begin_with_zeros() -> None:
    assert PlayOptions(keys=f"w*{'0' * 5000}2,-").script({"w": "up"}) == ["w", "w", ""]


@pytest.mark.parametrize("options", [("--agent",), ("--agent", "-o", "a.gif")], ids=str)
def test_what_nobody_ends_wants_steps(invoke, monkeypatch, tmp_path: Path, options: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PlayOptions, "load", None)
    outcome = invoke("play", *options)
    assert outcome.code == 2
    assert "it would go on for ever, with nobody to end it: give --steps" in outcome.err


def test_a_directory_is_no_video(invoke, world: DotWorld, tmp_path: Path) -> None:
    (tmp_path / "a.gif").mkdir()
    outcome = invoke("play", "--keys", "w", "-o", tmp_path / "a.gif")
    assert outcome.code == 2
    assert "a.gif is a directory, wanted a file" in outcome.err
    assert world.asked == []


def test_a_missing_extra_is_named(invoke, world: DotWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    outcome = invoke("play", "--keys", "w", "-o", "a.mp4")
    assert outcome.code == 1
    assert outcome.err == "longburn: error: a.mp4: a .mp4 file needs av: pip install 'longburn[video]'\n"


def test_a_failure_in_the_middle_leaves_no_video(invoke, world: DotWorld, monkeypatch, tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(b"older")
    made = world.step

    def step(action):
        if len(world.asked) == 4:
            raise RuntimeError("the world came apart")
        return made(action)

    monkeypatch.setattr(world, "step", step)
    outcome = invoke("play", "--keys", "d*9", "-o", path)
    assert outcome.code == 1
    assert outcome.err == "longburn: error: the world came apart\n"
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted(invoke, world: DotWorld, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(world, "step", lambda action: signal.raise_signal(signal.SIGINT))
    path = tmp_path / "a.gif"
    outcome = invoke("play", "--keys", "d", "-o", path)
    assert outcome.code == 130
    assert outcome.err == f"interrupted: {path} was not written\n"
    assert list(tmp_path.iterdir()) == []


class Game:
    """The command on a pseudo-terminal of 100 x 30."""

    def __init__(self, *arguments: object, environment: dict[str, str]) -> None:
        self.terminal, program = pty.openpty()
        ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.before = termios.tcgetattr(program)
        self.program = program
        environment = {k: v for k, v in environment.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_A_PROCESS, *map(str, arguments)],
            stdin=program,
            stdout=program,
            stderr=program,
            start_new_session=True,
            env=environment | {"COLORTERM": "truecolor"},
        )
        self.shown = ""

    def until(self, text: str) -> str:
        """What is shown up to this text, which was not shown before."""
        deadline = time.monotonic() + 60
        while text not in self.shown and time.monotonic() < deadline:
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.shown += os.read(self.terminal, 65536).decode("utf-8", "replace")
        assert text in self.shown, self.shown[-500:]
        part, self.shown = self.shown.split(text, 1)
        return part

    def press(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def end(self) -> int:
        """The exit code; the rest of what is shown stays in `shown`."""
        while self.process.poll() is None:
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.shown += os.read(self.terminal, 65536).decode("utf-8", "replace")
        while select.select([self.terminal], [], [], 0)[0]:
            self.shown += os.read(self.terminal, 65536).decode("utf-8", "replace")
        return self.process.returncode

    @property
    def restored(self) -> bool:
        """Whether the terminal's settings are what they were, and its screen and cursor are back."""
        as_before = termios.tcgetattr(self.program) == self.before
        return as_before and "\x1b[?25h\x1b[?1049l" in self.shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.program)
        os.close(self.terminal)


@pytest.fixture
def game(environment) -> Iterator:
    games = []

    def start(*arguments: object) -> Game:
        games.append(Game("play", *arguments, environment=environment))
        return games[-1]

    yield start
    for one in games:
        one.close()


def test_playing_by_keys(game, tmp_path: Path) -> None:
    path = tmp_path / "play.gif"
    play = game("--seed", 4, "-o", path)
    start = play.until("step 0,")
    assert "\x1b[?1049h\x1b[?25l" in start
    assert "▀" in start
    assert "w up  s down  a left  d right  p pause  q quit" in play.until("\x1b[?2026l")
    play.press("d")
    play.until("step 1,")
    play.press("xzd")  # keys that mean nothing
    play.until("step 2,")
    play.press("W")
    play.until("step 3,")
    play.press("aa")  # a step each
    play.until("step 5,")
    play.press("wq")  # who quits wants no more of what was pressed before
    assert play.end() == 0
    assert play.restored
    assert "frames; a step took" in play.shown
    again = DotWorld()
    frames = [again.reset(seed=4).frames, *(again.step(action).frames for action in (3, 3, 0, 2, 2))]
    np.testing.assert_array_equal(pictures(path), np.concatenate(frames))


def test_real_time_goes_on_without_keys_and_pauses(game) -> None:
    play = game("--realtime")
    play.until("step 3,")
    play.press("p")
    time.sleep(0.5)
    while select.select([play.terminal], [], [], 0.3)[0]:
        play.shown += os.read(play.terminal, 65536).decode("utf-8", "replace")
    paused_at = max(map(int, re.findall(r"step (\d+),", play.shown)), default=3)
    play.press("p")
    play.until(f"step {paused_at + 2},")
    play.press("\x1b")
    assert play.end() == 0
    assert play.restored


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGQUIT, 131)], ids=str
)
def test_signals_leave_the_terminal_as_it_was(game, tmp_path: Path, number: signal.Signals, code: int) -> None:
    path = tmp_path / "play.gif"
    play = game("--realtime", "-o", path, "slow")
    play.until("step 1,")
    play.process.send_signal(number)
    assert play.end() == code
    assert play.restored
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT], ids=str)
def test_signals_leave_no_part_of_a_scripted_video(game, tmp_path: Path, number: signal.Signals) -> None:
    play = game("--keys", "w*1000", "-o", tmp_path / "play.gif", "slow")
    play.until("━")  # of the bar, of whose text more or less fits beside the file's path
    assert [file.suffix for file in tmp_path.iterdir()] == [".part"]
    play.process.send_signal(number)
    assert play.end() == 128 + number
    assert play.shown.rfind("\x1b[?25h") > play.shown.rfind("\x1b[?25l")  # the cursor, which the bar hid
    assert list(tmp_path.iterdir()) == []


def test_nobody_ends_what_is_not_drawn(game) -> None:
    play = game("--no-draw")
    play.until("give --steps")
    assert play.end() == 2


def test_turns_want_a_player(game) -> None:
    play = game("--no-draw", "--steps", 2, "--turns")
    play.until("--turns is for your own keys, and --no-draw plays without")
    assert play.end() == 2


def test_a_failing_world_leaves_the_terminal_as_it_was(game, tmp_path: Path) -> None:
    path = tmp_path / "play.gif"
    play = game("--realtime", "-o", path, "fails")
    assert play.end() == 1
    assert play.restored
    assert play.shown.rstrip().endswith("longburn: error: the world came apart")
    assert list(tmp_path.iterdir()) == []


def test_a_video_without_drawing_has_a_bar(game, tmp_path: Path) -> None:
    path = tmp_path / "play.gif"
    play = game("--keys", "d*3,a*3", "-o", path, "slow")
    assert play.end() == 0
    assert "━" in play.shown
    assert "6/6" in play.shown
    assert "▀" not in play.shown
    assert len(pictures(path)) == 13


def test_an_agent_plays(invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    from longburn.models import minigrid

    torch.manual_seed(0)
    policy = minigrid.MemoryPolicy()
    windows = []

    def load_policy(*, window, device):
        policy.to(device).window = window
        windows.append(window)
        return policy

    monkeypatch.setattr(minigrid, "load_policy", load_policy)
    options = ("play", "--agent", "--steps", 12, "--seed", 3, "--window", 5, "--json", "--temperature", 1)
    outcome = invoke(*options, "-o", tmp_path / "a.gif")
    assert outcome.code == 0, outcome.err
    facts = json.loads(outcome.out)
    assert (facts["steps"], facts["frames"]) == (12, 13)
    assert len(pictures(tmp_path / "a.gif")) == 13
    assert invoke(*options, "--sink-frames", 0, "-o", tmp_path / "b.gif").code == 0
    assert [window.sink_tokens > 0 for window in windows] == [True, False]
    assert all(window.size == 10 for window in windows)
    assert invoke(*options, "-o", tmp_path / "c.gif").code == 0
    assert (tmp_path / "c.gif").read_bytes() == (tmp_path / "a.gif").read_bytes()
