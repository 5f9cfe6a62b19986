"""A tiny checkpoint in OpenAI's original format, against the logits of the original implementation in fp32."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longburn.models.gpt_oss import GptOss
from longburn.nn import ExpertStorage

DATA = Path(__file__).parent / "data"
CHECKPOINT = DATA / "gpt_oss_tiny_original"
WINDOW = 16


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(DATA / "gpt_oss_tiny_expected.safetensors")


@pytest.fixture(scope="module", params=["mxfp4", "dense"])
def model(request: pytest.FixtureRequest) -> GptOss:
    storage: ExpertStorage = request.param
    return GptOss.from_checkpoint(CHECKPOINT, dtype=torch.float32, experts=storage)


@pytest.mark.parametrize("chunk", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, 100])
def test_logits(model: GptOss, expected: dict[str, Tensor], chunk: int) -> None:
    """Six windows of tokens, in chunks; the full forward has no cache."""
    tokens, wanted = expected["tokens"].long(), expected["logits_fp32"]
    assert wanted.std() > 0.9
    cache = model.init_cache(2)
    with torch.no_grad():
        parts = [model.forward_logits(part, cache, all_positions=True) for part in tokens.split(chunk, 1)]
        assert (model(tokens) - wanted).abs().max() <= 2e-4
    assert (torch.cat(parts, 1) - wanted).abs().max() <= 2e-4
    assert [layer.slots for layer in cache][::2] == [WINDOW, WINDOW]
    assert all(layer.slots >= tokens.shape[1] for layer in cache[1::2])


def test_greedy_tokens(model: GptOss, expected: dict[str, Tensor]) -> None:
    cache, out = model.init_cache(1), []
    with torch.no_grad():
        logits = model.forward_logits(expected["greedy_prompt"].long()[None], cache)
        for _ in expected["greedy_tokens"]:
            out.append(int(logits.argmax()))
            logits = model.forward_logits(torch.tensor([out[-1:]]), cache)
    assert out == expected["greedy_tokens"].tolist()
