"""The ACE-Step example: its picture of a bias, which always fits into a page, and what it refuses before any work."""

import importlib.util
from pathlib import Path

import pytest
import typer

from longburn.cli.bias_drawing import PAGE_NUMBERS

# By its path: a benchmark has the same name.
PATH = Path(__file__).parents[2] / "examples" / "ace_step.py"
spec = importlib.util.spec_from_file_location("ace_step_example", PATH)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


@pytest.mark.parametrize("window", [1, 64, 512, 5000])
@pytest.mark.parametrize("tokens", [1, 255, 1024, 20000])
def test_queries_fit_into_a_page(tokens: int, window: int) -> None:
    length = example.PROMPT + tokens
    queries = example.drawn_queries(length, window, 4)
    keys = [min(at + 1, window + 4) for at in queries]
    assert sum(keys) * (example.HEADS + 1) <= PAGE_NUMBERS
    assert queries[0] == 0
    assert len(queries) <= example.QUERIES
    # Not thinned further than it takes: one step less would be too many of one or the other.
    closer = range(0, length, queries.step - 1) if queries.step > 1 else None
    most = min(example.QUERIES, PAGE_NUMBERS // ((example.HEADS + 1) * min(length, window + 4)))
    assert closer is None or len(closer) > most


def test_a_page_of_a_wide_window(tmp_path: Path) -> None:
    plot = tmp_path / "bias.html"
    example.stream(plot, tokens=500, window=400, sink_tokens=4, seed=0)
    assert "Forgetting attention over a stream" in plot.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "window", "message"),
    [
        ("bias.svg", 64, "wanted a name that ends in .png or .html"),
        ("bias", 64, "wanted a name that ends in .png or .html"),
        ("nowhere/bias.html", 64, "no directory"),
        ("there.html", 64, "a directory"),
        ("bias.html", 50000, "numbers for a single query"),
    ],
)
def test_refused_before_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, window: int, message: str
) -> None:
    monkeypatch.setattr(example, "generate", None)
    (tmp_path / "there.html").mkdir()
    with pytest.raises(typer.BadParameter, match=message):
        example.stream(tmp_path / name, tokens=100_000, window=window, sink_tokens=4, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["there.html"]


def test_a_song_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "small_music_maker", None)
    with pytest.raises(typer.BadParameter, match="no directory"):
        example.main(output=tmp_path / "nowhere" / "song.wav")
