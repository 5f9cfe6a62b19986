"""The model that travels with the package: what its files say is so, on text that it never saw."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from emma import TEXT

from longburn.cache import AttnWindow
from longburn.models import data
from longburn.models.gpt_oss import GptOss
from longburn.text import Tokenizer

SHIPPED = Path(data.__path__[0]) / "tiny_gpt_oss"


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    tokenizer = Tokenizer.from_file(SHIPPED)
    return torch.tensor([[tokenizer.eos, *tokenizer.encode(TEXT)]])


@pytest.fixture(scope="module")
def model() -> GptOss:
    return GptOss.from_checkpoint(SHIPPED, dtype=torch.float32)


def bits(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    nll = F.cross_entropy(logits[0, : tokens.shape[1] - 1], tokens[0, 1:], reduction="sum")
    return nll.item() / math.log(2) / len(TEXT.encode())


def test_the_files_are_complete_and_small() -> None:
    names = {file.name for file in SHIPPED.iterdir()}
    wanted = {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "log.json",
        "provenance.json",
        "LICENSE",
        "README.md",
    }
    assert wanted <= names
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 12_000_000


@torch.no_grad()
def test_it_reads_a_book_it_never_saw_as_well_as_its_log_says(model: GptOss, tokens: torch.Tensor) -> None:
    log = json.loads((SHIPPED / "log.json").read_text(encoding="utf-8"))
    # A page of the book, from its very beginning: within a fifth of the whole.
    assert bits(model(tokens), tokens) == pytest.approx(log["bits_per_byte"]["mxfp4"]["test"], rel=0.2)
    assert log["bits_per_byte"]["mxfp4"]["test"] < 1.6
    assert log["seconds"] < 600


@torch.no_grad()
def test_the_loss_is_the_same_in_any_cut(model: GptOss, tokens: torch.Tensor) -> None:
    whole = bits(model(tokens), tokens)
    for chunk in (1, 100, 129):
        cache = model.init_cache(1)
        logits = [model.forward_logits(part, cache, all_positions=True) for part in tokens.split(chunk, 1)]
        assert bits(torch.cat(logits, 1), tokens) == pytest.approx(whole, abs=1e-5)
    assert tokens.shape[1] > 3 * 128


@torch.no_grad()
def test_its_sinks_count(model: GptOss, tokens: torch.Tensor) -> None:
    without = GptOss.from_checkpoint(SHIPPED, dtype=torch.float32)
    for attention in without.attentions:
        torch.nn.init.constant_(attention.sinks, -torch.inf)
    assert bits(without(tokens), tokens) > bits(model(tokens), tokens) + 1e-3


@torch.no_grad()
def test_a_rolling_cache_on_every_layer_keeps_its_size(model: GptOss, tokens: torch.Tensor) -> None:
    rolling = model.config.policy(AttnWindow(60, sink_tokens=4, relative_sinks=True))
    streaming = GptOss.from_checkpoint(SHIPPED, dtype=torch.float32, policy=rolling)
    cache = streaming.init_cache(1)
    size = cache.nbytes
    for part in tokens.split(50, 1):
        assert streaming.forward_logits(part, cache).isfinite().all()
        assert cache.nbytes == size
