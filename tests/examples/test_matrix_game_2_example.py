"""The example of Matrix-Game 2: on a small release made here, and on models of random weights."""

import importlib.util
import signal
import sys
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from longburn.cli.play_options import PlayOptions
from longburn.cli.play_video import VideoWriter
from longburn.models.matrix_game_2.world import controls_of
from longburn.models.minigrid import MemoryPolicy, RoomModel, RoomWorld

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "models" / "matrix_game_2"))

from tiny_release import write_release  # noqa: E402

# By its path: a benchmark has the same name.
spec = importlib.util.spec_from_file_location("matrix_game_2_example", ROOT / "examples" / "matrix_game_2.py")
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)

app = Typer()
app.command()(example.main)


def run(*options: object) -> str:
    result = CliRunner().invoke(app, list(map(str, options)))
    assert result.exit_code == 0, result.output
    return result.output


def test_a_walk_through_the_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made, load = [], example.load_room

    def load_room(**sizes: int) -> RoomModel:
        made.append(sizes)
        return load(**sizes)

    monkeypatch.setattr(example, "load_room", load_room)
    shown = run("--seed", 1, "--seed", 2, "--window", 3, "--sink-frames", 0, "-o", tmp_path / "a.gif", "--keys", "up*3")
    assert made == [{"window": 3, "sinks": 0, "device": torch.device("cpu")}]
    for seed in (1, 2):
        assert f"seed {seed}: 3 steps, 4 frames" in shown
        assert (tmp_path / f"a-{seed}.gif").is_file()


def test_a_walk_with_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release = write_release(tmp_path / "release", "universal")
    small = example.RolloutSettings
    monkeypatch.setattr(example, "RolloutSettings", lambda **given: small(**given, latent_size=(4, 6)))
    given = ("--checkpoint", release, "--image", release / "start.png", "--sampler", "1000,300", "--device", "cpu")
    shown = run(*given, "--keys", "w,left", "-o", tmp_path / "a.gif")
    assert "seed 0: 2 steps, 22 frames" in shown
    assert f"{tmp_path / 'a.gif'}: 22 frames at 25 a second" in shown


@pytest.mark.parametrize("mode", ["universal", "gta_drive", "templerun"])
def test_each_mode_has_a_walk(mode: str) -> None:
    assert len(PlayOptions(keys=example.walk_of(mode)).script(controls_of(mode))) == 6


def test_a_checkpoint_is_walked_without_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release = write_release(tmp_path / "release", "universal")
    small = example.RolloutSettings
    monkeypatch.setattr(example, "RolloutSettings", lambda **given: small(**given, latent_size=(4, 6)))
    shown = run("--checkpoint", release, "--image", release / "start.png", "--sampler", "1000", "--device", "cpu")
    assert "seed 0: 6 steps, 70 frames" in shown


def test_keys_are_refused_before_a_checkpoint_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "load_world", None)
    given = ["--checkpoint", "m", "--image", "a.png", "--device", "cpu", "--mode", "gta_drive", "--keys", "w,up"]
    result = CliRunner().invoke(app, given, env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert result.exit_code == 2
    assert "'up' does nothing here, wanted w, s, left, right or -" in result.output


def test_frames_are_written_as_they_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order, add, step = [], VideoWriter.add, RoomWorld.step
    monkeypatch.setattr(VideoWriter, "add", lambda self, frames: order.append("write") or add(self, frames))
    monkeypatch.setattr(RoomWorld, "step", lambda self, action: order.append("step") or step(self, action))
    assert "seed 0: 2 steps, 3 frames" in run("--keys", "-*2", "-o", tmp_path / "a.gif")
    assert order == ["write", "step", "write", "step", "write"]


def test_a_signal_leaves_no_part_of_a_video(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts, step = [], RoomWorld.step

    def stopped(self: RoomWorld, action: int) -> object:
        parts.extend(tmp_path.iterdir())
        signal.raise_signal(signal.SIGTERM)
        return step(self, action)

    monkeypatch.setattr(RoomWorld, "step", stopped)
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        result = CliRunner().invoke(app, ["--keys", "-", "-o", str(tmp_path / "a.gif")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 143
    assert [part.suffix for part in parts] == [".part"]
    assert list(tmp_path.iterdir()) == []


def test_the_agent_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    windows = []
    monkeypatch.setattr(
        example, "load_policy", lambda window, device: windows.append(window) or MemoryPolicy(window=window).to(device)
    )
    made = example.memory_task
    monkeypatch.setattr(example, "memory_task", lambda size, gate: made(7, gate=5, max_steps=9))
    shown = run("--agent", "--episodes", 2, "--window", 3)
    assert "kept first steps, 3 steps in view:" in shown
    assert "of 2 episodes solved" in shown
    assert [window.sink_tokens > 0 for window in windows] == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "x.avi"), "ending '.avi'"),
        (("--keys", "bogus*2,up"), "'bogus' does nothing here"),
        (("--keys", "up*x"), "'up*x', wanted a number"),
        (("--keys", ""), "'' does nothing here"),
        (("--agent", "-o", "a.gif"), "--output does nothing with --agent"),
        (("--agent", "--keys", "up"), "--keys does nothing with --agent"),
        (("--agent", "--play"), "--play does nothing with --agent"),
        (("--agent", "--sink-frames", "0"), "--sink-frames does nothing with --agent"),
        (("--agent", "--checkpoint", "m"), "--checkpoint does nothing with --agent"),
        (("--agent", "--image", "a.png"), "--image does nothing with --agent"),
        (("--agent", "--mode", "universal"), "--mode does nothing with --agent"),
        (("--agent", "--sampler", "1000"), "--sampler does nothing with --agent"),
        (("--agent", "--seed", "1", "--seed", "2"), "--seed: 2 came, --agent takes one"),
        (("--play", "--seed", "1", "--seed", "2"), "--seed: 2 came, --play takes one"),
        (("--episodes", "2"), "--episodes is for --agent"),
        (("--mode", "bogus"), "bogus"),
        (("--device", "bogus"), "--device 'bogus': wanted auto, cpu, cuda or cuda:N"),
        (("--agent", "--device", "cuda:99"), "--device cuda:99: this PyTorch"),
        (("--mode", "universal"), "--mode is of Matrix-Game 2: give --checkpoint"),
        (("--image", "a.png"), "--image is of Matrix-Game 2: give --checkpoint"),
        (("--sampler", "1000"), "--sampler is of Matrix-Game 2: give --checkpoint"),
        (("--checkpoint", "m"), "wanted --image too"),
        (("--checkpoint", "m", "--image", "a.png", "--sampler", "q"), "--sampler 'q': wanted numbers"),
        (("--checkpoint", "m", "--image", "a.png"), "m: no such directory"),
    ],
    ids=str,
)
def test_bad_usage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("walk", "compare", "execute"):
        monkeypatch.setattr(example, name, None)
    result = CliRunner().invoke(app, options, env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert result.exit_code == 2
    assert message in result.output


def test_a_key_may_wait() -> None:
    assert "seed 0: 3 steps, 4 frames" in run("--keys", "-*2,up", "--device", "cpu")


def test_playing_hands_on_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    handed = []
    monkeypatch.setattr(example, "execute", lambda arguments: handed.append(arguments) or 0)
    run("--play", "--keys", "up*2", "--device", "cpu", "--seed", 3, "--window", 4)
    assert handed == [["play", "--window", "4", "--seed", "3", "--keys", "up*2", "--device", "cpu"]]
    run("--play", "--device", "cpu")
    assert handed[1] == ["play", "--seed", "0", "--device", "cpu"]


def test_keys_need_a_terminal() -> None:
    result = CliRunner().invoke(app, ["--play"])
    assert result.exit_code == 2
