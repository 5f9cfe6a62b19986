"""The GPT-OSS example: every option does what it says, on a checkpoint made here."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

import gpt_oss as example  # noqa: E402
from longburn.cache import AttnWindow  # noqa: E402
from longburn.models.gpt_oss import GptOss  # noqa: E402
from tiny_training.checkpoint import save  # noqa: E402
from tiny_training.corpus import train_tokenizer  # noqa: E402
from tiny_training.training import tiny_config  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with a window of 16 in the first; sinks and biases far from zero, so that every option shows."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(["the old house and the quiet garden by the river " * 20], 280)
    config = replace(tiny_config(280), hidden_size=64, intermediate_size=32, num_hidden_layers=2, layer_types=None)
    config = replace(config, num_attention_heads=6, num_key_value_heads=2, sliding_window=16)
    generator = torch.Generator().manual_seed(0)
    model = GptOss(config)
    weights = {
        name: p.detach() + 0.3 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()
    }
    save(weights, config, folder)
    assert tokenizer.get_vocab_size() == 280
    tokenizer.save(str(folder / "mxfp4" / "tokenizer.json"))
    return folder / "mxfp4"


TOKENS = torch.randint(280, (1, 80), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: GptOss) -> torch.Tensor:
    return model(TOKENS)


def test_windows_are_the_ones_asked_for(checkpoint: Path) -> None:
    full = AttnWindow(30, sink_tokens=4, relative_sinks=True)
    model = example.load(checkpoint, 9, full)
    assert [a.window for a in model.attentions] == [AttnWindow(9), full]
    plain = example.load(checkpoint)
    assert [a.window for a in plain.attentions] == [AttnWindow(16), AttnWindow()]


def test_sinks_and_yarn_change_what_the_model_computes(checkpoint: Path) -> None:
    plain = logits(example.load(checkpoint))
    assert not torch.allclose(logits(example.load(checkpoint, sinks=False)), plain, atol=1e-2)
    assert not torch.allclose(logits(example.load(checkpoint, yarn=16.0)), plain, atol=1e-2)
    torch.testing.assert_close(logits(example.load(checkpoint, yarn=4.0)), plain)  # as trained


def test_yarn_concentrates_as_the_paper_says(checkpoint: Path) -> None:
    model = example.load(checkpoint, yarn=16.0)
    angles = model.attentions[0].rope.angles(torch.zeros(1, 1, dtype=torch.int64))
    assert angles.cos[0, 0, 0, 0].item() == pytest.approx(0.1 * math.log(16.0) + 1)


def test_spans_are_stretches_without_a_gap() -> None:
    assert example.spans([0, 1, 2, 3, 96, 97, 99]) == "0-3, 96-97, 99-99"
    assert example.spans([]) == ""


def test_the_chunk_does_not_change_the_text(checkpoint: Path) -> None:
    app = Typer()
    app.command()(example.main)
    texts = set()
    for chunk in ("1", "17", "500"):
        options = ["--checkpoint", str(checkpoint), "--full-window", "20", "--max-new-tokens", "40", "--chunk", chunk]
        ran = CliRunner().invoke(app, [*options, "--prompt", "the old house and the quiet garden " * 3])
        assert ran.exit_code == 0, ran.output
        texts.add(ran.stdout.split(" tokens, ")[0])
        assert "0-3, " in ran.stdout  # the kept tokens of the full layer
    assert len(texts) == 1
