"""The forgetting example: its streams against a reader in plain loops, its models, training and tests."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

import train_forgetting as example  # noqa: E402

RECIPE = replace(example.RECIPES["rehearsal"], steps=4, length=30)
CPU = torch.device("cpu")


def streams(batch: int, length: int, rates: example.Rates | None = None, seed: int = 0) -> example.Streams:
    return example.draw(batch, length, rates or example.Rates(), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rates", [example.Rates(), example.Rates(0.3, 0.5, 0.1), example.Rates().thinned(4)])
def test_the_answer_is_the_newest_value(rates: example.Rates) -> None:
    """By reading token after token, with a dictionary that a void token empties."""
    drawn = streams(20, 211, rates)
    answered = set()
    for tokens, answers in zip(drawn.tokens.tolist(), drawn.answers.tolist(), strict=True):
        known: dict[int, int] = {}
        for token, answer in zip(tokens, answers, strict=True):
            wanted = -100
            if token < example.VOID:
                key, value = divmod(token, example.VALUES)
                known[key] = value
            elif token == example.VOID:
                known.clear()
            elif token < example.NOISE:
                key = token - example.QUESTION
                wanted = example.ANSWER + known[key] if key in known else example.NONE
                answered.add(wanted)
            else:
                assert token < example.ANSWER
            assert answer == wanted
    assert answered == set(range(example.ANSWER, example.VOCABULARY))


def test_how_often_each_kind_comes() -> None:
    tokens = streams(40, 500).tokens
    rates = example.Rates()
    shares = [(tokens < example.VOID), (tokens == example.VOID), (tokens > example.VOID) & (tokens < example.NOISE)]
    found = [float(share.float().mean()) for share in shares]
    assert found == pytest.approx([rates.fact, rates.void, rates.question], abs=0.01)
    thin = streams(40, 500, rates.thinned(4)).tokens
    assert float((thin >= example.NOISE).float().mean()) == pytest.approx(1 - 0.5 / 4, abs=0.01)


def test_the_models_differ_in_nothing_else() -> None:
    models = {name: example.fresh(name, RECIPE, seed=3) for name in example.NAMES}
    plain = models["none"].state_dict()
    for name, model in models.items():
        extra = {key: value for key, value in model.state_dict().items() if key not in plain}
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.items())
        assert sorted(extra) == [
            f"layers.{i}.attention.bias.gate.{w}" for i in range(2) for w in ("bias", "weight")
        ] * (name == "fox")
    tokens = streams(2, 30).tokens
    outputs = [model(tokens) for model in models.values()]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("name", example.NAMES)
@pytest.mark.parametrize("chunk", [1, 7, 200])
def test_a_test_through_caches_is_the_whole_pass(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "CHUNK", chunk)
    model, drawn = example.fresh(name, RECIPE, seed=0), streams(3, 61)
    found = example.measure(model, drawn, CPU)
    with torch.no_grad():
        logits = model(drawn.tokens).flatten(0, 1)
    asked = drawn.answers.flatten()
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, asked)), abs=2e-5)
    right = [int(a) == int(b) for a, b in zip(logits.argmax(-1), asked, strict=True) if b >= 0]
    assert found["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-5)
    assert found["questions"] == len(right)


def test_training_is_repeatable_and_teaches() -> None:
    recipe = replace(RECIPE, steps=60, batch=8)
    losses = []
    for _ in range(2):
        model = example.fresh("fox", recipe, seed=1)
        before = example.measure(model, streams(8, 30, seed=9), CPU)["loss"]
        curve = example.train(model, recipe, 1, CPU)
        losses.append((curve, example.measure(model, streams(8, 30, seed=9), CPU)["loss"]))
        assert losses[-1][1] < before - 1
        assert [step for step, _ in curve] == list(range(2, 61, 2))
    assert losses[0] == losses[1]


def test_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    monkeypatch.setitem(example.RECIPES, "rehearsal", replace(RECIPE, seeds=2))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # of this process, for tests to come
    app = typer.Typer()
    app.command()(example.main)
    outcome = CliRunner().invoke(app, ["--out", str(tmp_path / "new")])
    assert outcome.exit_code == 0, outcome.output
    result = json.loads((tmp_path / "new" / "forgetting.json").read_text(encoding="utf-8"))
    assert list(result["models"]) == list(example.NAMES)
    for runs in result["models"].values():
        assert [run["seed"] for run in runs] == [0, 1]
        assert runs[0]["training_loss"] != runs[1]["training_loss"]
        for run in runs:
            assert list(run["test"]) == [f"{n} x length" for n in (1, 2, 4, 8)] + ["2 x noise", "4 x noise"]
            assert all(0 < test["loss"] < 20 for test in run["test"].values())
    assert result["recipe"]["steps"] == 4
    assert (tmp_path / "new" / "forgetting.png").read_bytes()[:4] == b"\x89PNG"
