"""`longburn bias-view`: what it records, writes and refuses, and the page in a real browser."""

import json
import re
import struct
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from longburn.bias import alibi_slopes
from longburn.bias.picture import BiasPicture, BiasRow, record_bias
from longburn.cli.bias_drawing import PAGE_NUMBERS, Columns, near_range, page
from longburn.cli.bias_policies import KINDS, Layer
from longburn.cli.bias_view import every, fresh_layer, look, make_input, read_text

SMALL = Layer(dim=24, heads=3, head_dim=8, window=9, sink_tokens=2)


def numbers_of(content: str) -> dict[str, Any]:
    """The data of a page, as its script reads them."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', content, re.DOTALL)[1])


# --- what is recorded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_stream_is_the_whole_pass(name: str) -> None:
    """What a ring of 11 slots gave a token at a time is what a pass over all 40 tokens gives at once."""
    given = make_input("random", 40, SMALL.dim, seed=5)
    picture = look(name, SMALL, given, seed=5)
    layer = fresh_layer(name, SMALL, seed=5)
    with torch.no_grad(), record_bias(layer.bias) as whole:
        layer(given.x)
    assert [row.position for row in picture.rows] == list(range(40))
    for row, wanted in zip(picture.rows, whole, strict=True):
        assert row.keys.tolist() == wanted.keys.tolist()
        assert row.keys.tolist() == [j for j in range(row.position + 1) if row.position - j < 9 or j < 2]
        torch.testing.assert_close(row.bias, wanted.bias, atol=1e-5, rtol=1e-5)
    assert max(float(row.bias.abs().max()) for row in picture.rows) > 0.1, "there is nothing to see"


def test_the_same_seed_draws_the_same(invoke, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        html = tmp_path / f"{name}.html"
        outcome = invoke("bias-view", "forget", "--html", html, "--tokens", 30, "--window", 9, "--seed", seed)
        assert outcome.code == 0, outcome.err
    a, b, c = (numbers_of((tmp_path / f"{name}.html").read_text(encoding="utf-8"))["rows"] for name in "abc")
    assert a == b
    assert a != c


def test_repeated_tokens_repeat_their_bias() -> None:
    given = make_input("repeat", 60, SMALL.dim, seed=0)
    rows = look("forget", SMALL, given, seed=0).rows
    torch.testing.assert_close(rows[58].bias[:, 2:], rows[34].bias[:, 2:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(rows[58].bias[:, 2:], rows[57].bias[:, 2:], atol=1e-2)


def test_a_text_is_read_through_the_embedding() -> None:
    given = read_text("The sea was calm, and the sea was grey.", 100)
    assert "".join(given.labels) == "The sea was calm, and the sea was grey."
    assert given.x.shape[:2] == (1, len(given.labels))
    first, second = (i for i, label in enumerate(given.labels) if label == " sea")
    assert torch.equal(given.x[0, first], given.x[0, second])
    torch.testing.assert_close(given.x.square().mean(-1), torch.ones(given.x.shape[:2]))
    assert len(read_text("one two three four five six", 3).labels) == 3


# --- what is written -------------------------------------------------------------------------------------------------


def test_both_files_by_default(invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = invoke("bias-view", "alibi", "--tokens", 40, "--window", 9, "--sink-tokens", 2, "--heads", 5)
    assert (outcome.code, outcome.err) == (0, "")
    assert re.fullmatch(r"bias-alibi\.html: 40 queries, 5 heads, .*\nbias-alibi\.png: .*\n", outcome.out)
    data = numbers_of(Path("bias-alibi.html").read_text(encoding="utf-8"))
    assert len(data["rows"]) == 40
    for row in data["rows"]:
        for slope, line in zip(alibi_slopes(5).tolist(), row["bias"], strict=True):
            assert line == pytest.approx([-slope * (row["position"] - key) for key in row["keys"]], rel=1e-3)
    png = Path("bias-alibi.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) > (800, 800)
    assert any("random tokens" in note for note in data["notes"])


def test_the_page_stays_within_its_bound(invoke, tmp_path: Path) -> None:
    html = tmp_path / "page.html"
    outcome = invoke("bias-view", "alibi", "--html", html, "--tokens", 700, "--heads", 16, "--window", 128)
    assert outcome.code == 0, outcome.err
    data = numbers_of(html.read_text(encoding="utf-8"))
    drawn = sum(len(row["keys"]) * 17 for row in data["rows"])
    assert PAGE_NUMBERS / 3 < drawn <= PAGE_NUMBERS
    assert html.stat().st_size < 8 * PAGE_NUMBERS + 40_000
    positions = [row["position"] for row in data["rows"]]
    assert positions[-1] == 699
    assert len({b - a for a, b in pairwise(positions)}) == 1
    assert "query is drawn" in data["notes"][0]
    assert f"at most {PAGE_NUMBERS:,}" in data["bound"]


@pytest.mark.parametrize("tokens", [2, 50, 51, 999, 65536])
@pytest.mark.parametrize("heads", [1, 8, 64])
@pytest.mark.parametrize("window", [1, 64, 1000])
def test_how_many_queries_fit(tokens: int, heads: int, window: int) -> None:
    layer = Layer(32, heads, 8, window, 4)
    step = every(tokens, layer)
    keys = [min(p + 1, window + 4) for p in range((tokens - 1) % step, tokens, step)]
    assert sum(keys) * (heads + 1) <= PAGE_NUMBERS
    assert len(keys) >= 2


def test_text_cannot_leave_its_place() -> None:
    """Titles, notes and tokens that look like markup stay text."""
    bad = "</script><script>alert(1)</script><!--"
    row = BiasRow(0, torch.tensor([0]), torch.zeros(1, 1))
    content = page(BiasPicture(bad, (bad,), (row,), labels=(bad,)))
    scripts = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "script":
                scripts.append(dict(attrs))

    Reader().feed(content)
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    data = numbers_of(content)
    assert (data["title"], data["notes"], data["labels"]) == (bad, [bad], [bad])


def test_the_page_names_no_other_place(tmp_path: Path) -> None:
    row = BiasRow(0, torch.tensor([0]), torch.zeros(1, 1))
    content = page(BiasPicture("t", (), (row,)))
    assert re.findall(r"https?:|//[a-z]|src=|@import|url\(", content.replace("// ", "")) == []


def test_too_many_numbers_are_refused() -> None:
    row = BiasRow(0, torch.arange(1000), torch.zeros(10, 1000))
    with pytest.raises(ValueError, match="220,000 numbers, wanted at most 200,000"):
        page(BiasPicture("t", (), (row,) * 20))


def test_columns_and_range_of_both_directions() -> None:
    """Later keys have negative distances; sink tokens stand apart and do not stretch the scale."""
    rows = (
        BiasRow(3, torch.arange(6), torch.tensor([[-90.0, -2.0, -1.0, 0.0, 1.0, 2.0]])),
        BiasRow(5, torch.tensor([0, 4, 5]), torch.tensor([[-99.0, -1.0, 0.0]])),
    )
    picture = BiasPicture("t", (), rows, sink_tokens=1)
    columns = Columns(picture)
    assert (columns.distances, columns.key_span) == ((-2, 2), (0, 5))
    assert columns.of(3, rows[0].keys).tolist() == [0, 4, 5, 6, 7, 8]
    assert columns.of(5, rows[1].keys).tolist() == [0, 5, 6]
    assert columns.size == 9
    assert near_range(picture) == (-2.0, 2.0)
    assert near_range(BiasPicture("t", (), rows[1:], sink_tokens=9)) == (-99.0, 0.0)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "policy"),
        (("rope",), "'rope'"),
        (("alibi", "--heads", "0"), "0"),
        (("alibi", "--tokens", "1"), "1"),
        (("alibi", "--input", "sine"), "sine"),
    ],
)
def test_wrong_usage(invoke, arguments: tuple[str, ...], message: str) -> None:
    outcome = invoke("bias-view", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("alibi", "--text", ""), "--text: the text is empty"),
        (("alibi", "--heads", "64", "--window", "16384", "--tokens", "20000"), "fewer --heads or a smaller --window"),
        (("alibi", "--html", "missing/page.html"), "there is no directory"),
        (("relative", "--heads", "3", "--head-dim", "3"), "even dim"),
    ],
)
def test_what_cannot_be_drawn(
    invoke, arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = invoke("bias-view", *arguments)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG is refused before anything is computed or written; a page does not need it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = invoke("bias-view", "alibi", "--tokens", 12)
    assert outcome.code == 1
    assert "pip install 'longburn[plot]'" in outcome.err
    assert list(tmp_path.iterdir()) == []
    assert invoke("bias-view", "alibi", "--tokens", 12, "--html", "page.html").code == 0
