"""`longburn models`: the list, and getting one."""

from pathlib import Path

import pytest

from longburn.weights import store


def test_lists_name_size_licence_and_place(invoke) -> None:
    outcome = invoke("models")
    assert outcome.code == 0
    head, *rows = outcome.out.splitlines()
    assert head.split() == ["name", "model", "size", "licence", "where"]
    assert len(rows) == len(store.available())
    for row, model in zip(rows, store.available(), strict=True):
        assert row.startswith(f"{model.name} ")
        assert f" {model.licence} " in row
        assert row.rstrip().endswith((str(model.filename), f"longburn models get {model.name}"))


def test_says_what_is_not_here(invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGBURN_CACHE", str(tmp_path))
    assert "not here (93 MB to fetch): longburn models get smollm2" in invoke("models").out


def test_get_prints_where_it_lies(invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, progress) -> Path:
        progress(5, 10)
        return tmp_path / name

    monkeypatch.setattr(store, "fetch", fetch)
    outcome = invoke("models", "get", "smollm2")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'smollm2'}\n")


def test_get_of_an_unknown_name_names_the_known(invoke) -> None:
    outcome = invoke("models", "get", "smollm3")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "longburn: error: no model 'smollm3'; available: smollm2, o200k, tiny-gpt-oss\n"


def test_a_failed_fetch_is_one_line(invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LONGBURN_CACHE", str(tmp_path / "file" / "below"))
    outcome = invoke("models", "get", "smollm2")
    assert outcome.code == 1
    assert outcome.err.startswith("longburn: error: model smollm2 cannot be put into ")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [("models", "get"), ("models", "fetch"), ("model",), ("--verbose",)])
def test_wrong_usage(invoke, arguments) -> None:
    outcome = invoke(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("longburn: error: ")
    assert outcome.err.count("\n") == 1
