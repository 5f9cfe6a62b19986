"""`longburn play --model`: a small Matrix-Game 2 in the files of a release."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

sys.path.append(str(Path(__file__).parents[1] / "models" / "matrix_game_2"))

from tiny_release import write_release

from longburn.models.matrix_game_2.world import MatrixGameWorld


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"), "universal")


def test_it_is_played_and_written(invoke, release: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    options = ("play", "--model", release, "--image", release / "start.png", "--size", "32x48", "--json")
    more = ("--sampler", "1000,400", "--window", 7, "--sink-frames", 2, "--block", 3, "--kv-cache", "fp8")
    outcome = invoke(*options, *more, "--keys", "w*2,left,-", "--seed", 2, "-o", path)
    assert outcome.code == 0, outcome.err
    facts = json.loads(outcome.out)
    assert (facts["steps"], facts["frames"]) == (4, 1 + 9 + 12 + 12 + 12)
    with Image.open(path) as image:
        shown = [np.asarray(frame) for frame in ImageSequence.Iterator(image)]
        assert image.size == (48, 32)
    assert len(shown) == 46
    first = path.read_bytes()
    assert invoke(*options, *more, "--keys", "w*2,left,-", "--seed", 2, "-o", path).code == 0
    assert path.read_bytes() == first
    assert invoke(*options, "--keys", "w*2,left,-", "--seed", 2, "-o", path).code == 0
    assert path.read_bytes() != first


@pytest.fixture
def long_release(release: Path, tmp_path: Path) -> Path:
    """The same with a window and kept frames of its own."""
    folder = tmp_path / "long"
    shutil.copytree(release, folder)
    settings = folder / "base_distilled_model" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"local_attn_size": 9, "sink_size": 2}))
    return folder


@pytest.mark.parametrize(
    ("options", "window"),
    [((), (9, 2)), (("--window", 7), (7, 2)), (("--sink-frames", 0), (9, 0)), (("--sink-frames", 4), (9, 4))],
    ids=str,
)
def test_what_the_checkpoint_says_of_its_window(
    invoke, long_release: Path, monkeypatch: pytest.MonkeyPatch, options: tuple, window: tuple[int, int]
) -> None:
    windows = []
    reset = MatrixGameWorld.reset

    def seen(self: MatrixGameWorld, **given: object) -> object:
        windows.append(self.settings.window_of(self.model.config))
        return reset(self, **given)

    monkeypatch.setattr(MatrixGameWorld, "reset", seen)
    given = ("--model", long_release, "--image", long_release / "start.png", "--size", "32x48", "--keys", "w")
    outcome = invoke("play", *given, *options)
    assert outcome.code == 0, outcome.err
    assert [(seen.frames, seen.sink_frames) for seen in windows] == [window]


def test_options_that_do_not_fit_its_window_are_refused_unread(
    invoke, long_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longburn.models.matrix_game_2.release.load_world", None)
    given = ("--model", long_release, "--image", long_release / "start.png", "--size", "32x48", "--keys", "w")
    outcome = invoke("play", *given, "--window", 4)
    assert outcome.code == 2, outcome.err
    assert "2 kept frames and a block of 3 do not fit a window of 4" in outcome.err
    outcome = invoke("play", *given[:-1], "space")
    assert outcome.code == 2, outcome.err
    assert "'space' does nothing here" in outcome.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--window", 4, "--sink-frames", 2), 2, "2 kept frames and a block of 3 do not fit a window of 4"),
        (("--sink-frames", 4), 2, "4 kept frames and a block of 3 do not fit a window of 6"),
        (("--block", 1), 2, "--block 1: Matrix-Game 2 makes 3 latent frames at once"),
        (("--sampler", "1000,a"), 2, "--sampler '1000,a': wanted numbers"),
        (("--sampler", "1000,1000"), 2, "wanted falling numbers"),
        (("--size", "32"), 2, "--size '32': wanted height and width"),
        (("--size", "24x48"), 2, "--size 24x48: wanted multiples of 16"),
        (("--mode", "templerun"), 1, "no templerun_distilled_model"),
        (("--decoder", "tiny"), 1, "no taew2_1.pth"),
        (("--mode", "chess"), 2, "chess"),
        (("--keys", "x"), 2, "'x' does nothing here, wanted w, s, a, d, up, down, left, right or -"),
        (("--keys", "x", "--image", "nowhere.png"), 2, "'x' does nothing here"),
        (("--keys", "w*x", "--image", "nowhere.png"), 2, "'w*x', wanted a number"),
        (("--image", "nowhere.png"), 1, "nowhere.png cannot be read as a picture"),
    ],
    ids=str,
)
def test_bad_input(invoke, release: Path, tmp_path: Path, options: tuple, code: int, message: str) -> None:
    given = {"--keys": "w", "--image": release / "start.png", "--size": "32x48", "-o": tmp_path / "a.gif"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    outcome = invoke("play", "--model", release, *(part for option in given.items() for part in option))
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
