"""The example of Matrix-Game 2: on a small release made here, and on models of random weights."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from longburn.models.minigrid import MemoryPolicy, RoomModel

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
    monkeypatch.setattr(example, "walk", None)
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
