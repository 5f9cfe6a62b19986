"""Attention sinks on a real model (StreamingLLM, arXiv 2309.17453), at a size for every run: a cache of 64 tokens.

The model was trained to see all of a text. A window alone takes the first token away, on which many heads rest; a few
kept tokens give it back.
"""

import pytest
import torch
from emma import TEXT
from torch import Tensor

from longburn import AttnWindow, WindowPolicy
from longburn.models import LoadedModel
from longburn.models.llama import Llama

WINDOW, PREDICTIONS = 64, 304


def windowed(model: Llama, window: AttnWindow) -> Llama:
    """The same weights under another window."""
    with torch.device("meta"):
        other = Llama(model.config, policy=WindowPolicy.uniform(window))
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


@pytest.fixture(scope="module")
def tokens(smollm2: LoadedModel) -> Tensor:
    return torch.tensor([smollm2.tokenizer.encode(TEXT)[: PREDICTIONS + 1]])


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def streamed(model: Llama, tokens: Tensor, chunk: int) -> Tensor:
    """Logits of every prediction, through a cache of constant size."""
    cache = model.init_cache(1)
    with torch.no_grad():
        parts = [model.forward_logits(part, cache, all_positions=True)[0] for part in tokens[:, :-1].split(chunk, 1)]
    assert all(layer.slots <= WINDOW for layer in cache)
    return torch.cat(parts)


def perplexity(model: Llama, tokens: Tensor) -> float:
    return losses(streamed(model, tokens, 32), tokens[0, 1:]).mean().exp().item()


def test_a_few_kept_tokens_hold_the_quality(smollm2: LoadedModel, tokens: Tensor) -> None:
    with torch.no_grad():
        dense = losses(smollm2.model(tokens[:, :-1])[0], tokens[0, 1:]).mean().exp().item()
    none = perplexity(windowed(smollm2.model, AttnWindow(WINDOW)), tokens)
    kept = AttnWindow(WINDOW - 4, sink_tokens=4)
    relative = AttnWindow(WINDOW - 4, sink_tokens=4, relative_sinks=True)
    absolute_4, relative_4 = (perplexity(windowed(smollm2.model, window), tokens) for window in (kept, relative))
    assert dense < relative_4 < 1.3 * dense
    assert dense < absolute_4 < 1.3 * dense  # so near to the start, both positions are ones that it was trained on
    assert none > 3 * relative_4


def test_relative_sinks_are_as_good_as_reading_the_window_again(smollm2: LoadedModel, tokens: Tensor) -> None:
    """The expensive truth: before every eighth prediction, the last 64 tokens are read from scratch."""
    window = AttnWindow(WINDOW - 4, sink_tokens=4, relative_sinks=True)
    logits = streamed(windowed(smollm2.model, window), tokens, 32)[WINDOW:]
    starts = range(WINDOW, PREDICTIONS, 8)
    again = torch.stack([tokens[0, p + 8 - WINDOW : p + 8] for p in starts])
    with torch.no_grad():
        truth = torch.cat([smollm2.model(part)[:, -8:].flatten(0, 1) for part in again.split(15)])
    targets = tokens[0, WINDOW + 1 :]
    assert losses(logits, targets).mean().exp() <= 1.03 * losses(truth, targets).mean().exp()


@pytest.mark.parametrize("relative", [False, True])
def test_the_stream_equals_the_law_without_a_cache(smollm2: LoadedModel, tokens: Tensor, relative: bool) -> None:
    """The same windows over the whole text at once: no cache, no chunks, no ring."""
    model = windowed(smollm2.model, AttnWindow(WINDOW - 4, sink_tokens=4, relative_sinks=relative))
    with torch.no_grad():
        wanted = model(tokens[:, :-1])[0]
    assert (streamed(model, tokens, 45) - wanted).abs().max() < 1e-3
