"""The training of the small GPT-OSS, at a size that takes seconds: texts, tokens, the loop, what is written."""

import json
import math
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

import train_tiny_gpt_oss as script  # noqa: E402
from longburn.kernels.mxfp4 import dequantize, quantize  # noqa: E402
from longburn.models.gpt_oss import GptOss, GptOssConfig  # noqa: E402
from longburn.text import Tokenizer  # noqa: E402
from tiny_training.corpus import Corpus, Part, prepare  # noqa: E402
from tiny_training.texts import Source, _sword, prose, verse  # noqa: E402
from tiny_training.training import (  # noqa: E402
    Balance,
    Master,
    Recipe,
    batches,
    bits_per_byte,
    initialise,
    tiny_config,
    train,
)

RECIPE = Recipe(epochs=3, seconds=60, context=48, batch=4, evaluations=4, weight_decay=0.0)
CPU = torch.device("cpu")
WORDS = "old grey cat dog bird seen heard lost found small large quiet lady captain garden letter river storm"


def small(vocabulary: int) -> GptOssConfig:
    """More tokens than two windows, groups that differ from kv heads, another intermediate than hidden size."""
    return replace(
        tiny_config(vocabulary),
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        sliding_window=16,
        layer_types=None,
    )


def source(*works: tuple[str, str]) -> Source:
    return Source("a source", "a package 1.0", "public domain", lambda _: {}, lambda _: iter(works))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    words = [
        "old",
        "grey",
        "cat",
        "dog",
        "bird",
        "seen",
        "heard",
        "lost",
        "found",
        "small",
        "large",
        "quiet",
        "lady",
        "captain",
        "garden",
        "letter",
        "river",
        "storm",
    ]
    four = zip(words, words[1:], words[2:], words[3:], strict=False)
    paragraphs = [f"The {a} {b} was {c} in the {d} house." for a, b, c, d in four]
    works = [("a book", "\n\n".join(paragraphs * 20)), ("Emma", "\n\n".join(paragraphs[::-1]))]
    prepare(folder, 300, [source(*works)])
    return Corpus.load(folder)


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("results")
    with torch.random.fork_rng():
        return script.run(small(300), corpus, [RECIPE, replace(RECIPE, epochs=0.2)], 60.0, CPU, out), out


def test_prose_has_one_line_a_paragraph() -> None:
    assert prose("\ufeffIt  was\r\n_late_.\r\n \r\n\r\n“I\u00a0know” — he\nsaid") == 'It was late.\n\n"I know"--he said'


def test_verse_keeps_its_lines() -> None:
    assert verse("  Who's there?\n\n\n\n\tNay, _answer_ me ") == "Who's there?\n\nNay, answer me"


def test_a_sword_module_gives_its_text() -> None:
    blocks = [
        "<title>T</title>In <w lemma='x'>the</w> beginning<note>n</note>, <hi>God</hi>",
        '<l sID="1"/>A &amp; b<l eID="1"/><l sID="2"/>c',
    ]
    packed = [zlib.compress(block.encode()) for block in blocks]
    index = struct.pack("<3I", 0, len(packed[0]), len(blocks[0])) + struct.pack(
        "<3I", len(packed[0]), len(packed[1]), len(blocks[1])
    )
    assert _sword(index, b"".join(packed)) == "In the beginning, God\n\nA & b\nc"


def test_nothing_held_out_is_trained_on(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(corpus.tokenizer, encoding="utf-8")
    tokenizer = Tokenizer.from_file(path)
    texts = {name: tokenizer.decode(getattr(corpus, name).tokens.tolist()) for name in ("train", "validation", "test")}
    for name, text in texts.items():
        assert len(text.encode()) == getattr(corpus, name).size, name
    first = texts["test"].split("\n\n")[0]
    assert first.startswith("The ")
    book = corpus.provenance["sources"][0]
    assert book["works"] == 2
    assert book["bytes"] == sum(len(text.encode()) for text in texts.values()) + 2  # the break at the cut
    assert 0.01 < len(texts["validation"]) / len(texts["train"]) < 0.05


def test_batches_are_the_text_and_what_follows() -> None:
    tokens = torch.arange(1000)
    seen = []
    for _, (x, y) in zip(range(12), batches(tokens, RECIPE, torch.Generator().manual_seed(0)), strict=False):
        assert x.shape == y.shape == (RECIPE.batch, RECIPE.context)
        assert torch.equal(y, x + 1)
        seen += x[:, 0].tolist()
    assert len(set(seen)) > 24  # 20 stretches an epoch, cut elsewhere in the next


def test_training_lowers_the_loss_and_keeps_the_best(trained: tuple[dict[str, Any], Path], corpus: Corpus) -> None:
    log, _ = trained
    entries = log["training"]["entries"]
    bits = [entry["validation_bits_per_byte"] for entry in entries]
    assert bits[-1] < 0.6 * bits[0]
    assert log["training"]["best"] == min(bits[i] for i, entry in enumerate(entries) if entry["rounded"])
    assert log["training"]["recipe"]["epochs"] == 3
    assert [other["epochs"] for other in log["others"]] == [0.2]
    assert log["others"][0]["best"] > log["training"]["best"]
    assert entries[-1]["tokens"] == log["training"]["steps"] * RECIPE.batch * RECIPE.context
    assert entries[-1]["tokens"] >= 2.9 * len(corpus.train.tokens)


def test_what_is_written_is_what_was_measured(trained: tuple[dict[str, Any], Path], corpus: Corpus) -> None:
    log, out = trained
    for storage in ("mxfp4", "dense"):
        model = GptOss.from_checkpoint(out / "mxfp4", experts=storage, dtype=torch.float32)
        found = bits_per_byte(model, corpus.validation, RECIPE.context, RECIPE.batch)
        assert found == pytest.approx(log["training"]["best"], rel=2e-3)  # the rest was rounded to bf16
        assert found == pytest.approx(log["bits_per_byte"]["mxfp4"]["validation"], rel=1e-5)
    dense = GptOss.from_checkpoint(out / "bf16", dtype=torch.float32)
    packed = GptOss.from_checkpoint(out / "mxfp4", experts="dense", dtype=torch.float32)
    for name, weight in dense.named_parameters():
        shipped = packed.get_parameter(name)
        if name.endswith(("experts.gate_up", "experts.down")):
            assert 0 < (weight - shipped).norm() / weight.norm() < 0.2
        else:
            assert torch.equal(weight, shipped), name


def test_bits_per_byte_by_hand(corpus: Corpus) -> None:
    """An untrained model whose head is 0 gives every token the same probability."""
    model = GptOss(small(300))
    torch.nn.init.zeros_(model.head.weight)
    part = Part(corpus.test.tokens[:131], 400)  # a rest beyond whole stretches
    assert bits_per_byte(model, part, 48, 2) == pytest.approx(130 * math.log2(300) / 400)


def test_training_ends_in_time(corpus: Corpus) -> None:
    kept: list[float] = []
    recipe = replace(RECIPE, epochs=1e6, seconds=1.5)
    log = train(small(300), corpus, recipe, CPU, lambda _, entry: kept.append(entry["seconds"]), lambda _: None)
    assert log["entries"][-1]["seconds"] < 10
    assert log["entries"][-1]["learning_rate"] == 0
    assert kept


def test_a_training_of_one_step_keeps_something(corpus: Corpus) -> None:
    kept: list[Any] = []
    train(small(300), corpus, replace(RECIPE, epochs=1e-9), CPU, lambda _, entry: kept.append(entry), lambda _: None)
    assert [entry["step"] for entry in kept] == [1]


def test_the_model_holds_rounded_experts_and_the_master_exact_ones() -> None:
    model = GptOss(small(300))
    initialise(model)
    exact = model.get_parameter("layers.1.mlp.experts.down").detach().clone()
    master = Master(model)
    master.write(rounded=True)
    assert torch.equal(model.get_parameter("layers.1.mlp.experts.down"), dequantize(quantize(exact), torch.float32))
    assert torch.equal(master.weights["layers.1.mlp.experts.down"], exact)
    model(torch.arange(40)[None]).square().mean().backward()
    gradient = model.get_parameter("layers.1.mlp.experts.down").grad
    assert gradient is not None
    master.take_gradients()
    assert torch.equal(master.weights["layers.1.mlp.experts.down"].grad, gradient)
    master.write(rounded=False)
    assert torch.equal(model.get_parameter("layers.1.mlp.experts.down"), exact)


def test_balance_is_one_for_an_even_router_and_more_for_a_lopsided_one() -> None:
    model = GptOss(small(300))
    balance = Balance(model)
    tokens = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    for layer in model.layers:
        torch.nn.init.zeros_(layer.mlp.router.weight)
        torch.nn.init.zeros_(layer.mlp.router.bias)
    model(tokens)
    assert balance.loss().item() == pytest.approx(1.0)
    for layer in model.layers:
        with torch.no_grad():
            layer.mlp.router.bias[:4] = 30.0
    model(tokens)
    assert balance.loss().item() == pytest.approx(2.0)  # 4 of 8 experts do it all


def test_the_rate_rises_stays_and_falls() -> None:
    recipe = Recipe(epochs=1, seconds=1, learning_rate=1.0, warmup=0.1, decay=0.6)
    assert [recipe.rate(p) for p in (0.0, 0.05, 0.1, 0.6, 0.8, 1.0)] == pytest.approx([0, 0.5, 1, 1, 0.5, 0])


def test_export_refuses_what_is_too_large(
    trained: tuple[dict[str, Any], Path], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_training import checkpoint

    _, out = trained
    (tmp_path / "tokenizer.json").write_text(corpus.tokenizer, encoding="utf-8")
    (tmp_path / "provenance.json").write_text(json.dumps(corpus.provenance), encoding="utf-8")
    target = tmp_path / "shipped" / "model"
    size = checkpoint.export(out, tmp_path, ROOT / "LICENSE", target)
    assert size == sum(file.stat().st_size for file in target.iterdir())
    assert Tokenizer.from_file(target).eos == 0
    before = sorted(target.iterdir())
    monkeypatch.setattr(checkpoint, "LIMIT", size - 1)
    with pytest.raises(ValueError, match="at most"):
        checkpoint.export(out, tmp_path, ROOT / "LICENSE", target)
    assert sorted(target.iterdir()) == before
    assert [path.name for path in target.parent.iterdir()] == ["model"]
