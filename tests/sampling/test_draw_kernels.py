"""The kernels that choose tokens on a GPU take what the plain arithmetic takes, whatever the logits hold."""

from itertools import product

import pytest
import torch
from torch import Tensor

from longburn import use_impl
from longburn.kernels.triton import interprets
from longburn.sampling import Sampled, Sampler, SamplerConfig

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(not CUDA and not interprets(), reason="Triton interprets or compiles; here neither")

SIZES = [201_088, 6001, 100] if CUDA else [2500]
KINDS = ["fp32", "bf16", "fp16", "flat", "sharp", "ties", "broken"] if CUDA else ["bf16", "broken"]  # slow elsewhere


def logits_of(kind: str, rows: int, size: int) -> Tensor:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(rows, size, generator=g)
    match kind:
        case "flat":
            return 0.01 * x
        case "sharp":
            return 9 * x
        case "ties":
            return (3 * x).round().bfloat16()
        case "broken":
            x = (4 * x).round() / 4
            x[0, 7], x[1, 3], x[1, 9], x[2], x[3, 5:] = torch.nan, torch.inf, torch.inf, -torch.inf, -torch.inf
            return x
    return (3 * x).to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32))


def both(logits: Tensor, configs: list[SamplerConfig]) -> tuple[Sampled, Sampled]:
    draw = torch.arange(5, 5 + len(configs))
    sampler = Sampler(configs, batch=len(configs), vocab_size=logits.shape[1], device=DEVICE)
    results = []
    for name in ("triton", "reference"):
        with use_impl(name):
            results.append(sampler(logits.to(DEVICE), draw=draw.to(DEVICE)))
    return results[0], results[1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens(kind: str, size: int) -> None:
    """Rows of different settings at once: alone, with top-p, with top-k, with both; greedy ones between them."""
    logits = logits_of(kind, 5, size)
    greedy = SamplerConfig(temperature=0, seed=0)
    groups = {
        "greedy": [{"temperature": 0.0}] * 5,
        "free": [
            {"temperature": t, "min_p": m} for t, m in zip((0.7, 1.0, 1.9, 0.3, 5.0), (0, 0, 0.1, 0, 0), strict=True)
        ],
        "top-p": [
            {"temperature": t, "top_p": p}
            for t, p in zip((0.7, 1.0, 1.9, 1.0, 5.0), (0.95, 0.3, 0.999, 1.0, 0.5), strict=True)
        ],
        "top-k": [
            {"top_k": k, "top_p": p} for k, p in zip((2, 7, 50, 33, 16), (1.0, 0.9, 0.5, 1.0, 0.97), strict=True)
        ],
        "temperature last": [
            {"temperature": t, "top_p": p, "min_p": m, "temperature_last": last}
            for t, p, m, last in (
                *((0.7, 0.95, 0.0, True), (3.0, 0.3, 0.0, True), (1.9, 1.0, 0.1, True)),
                *((1.5, 0.9, 0.0, False), (5.0, 0.9, 0.05, True)),
            )
        ],
        "top-k, temperature last": [
            {"top_k": k, "top_p": 0.8, "temperature": t, "temperature_last": True}
            for k, t in ((2, 3.0), (7, 0.4), (50, 1.0), (33, 9.0), (16, 0.7))
        ],
    }
    for name, settings in groups.items():
        rows = [SamplerConfig(seed=row, **given) for row, given in enumerate(settings)]
        mixed = [rows[0], greedy, *rows[2:4], greedy]
        for configs in (rows, mixed) if CUDA else (mixed,):
            got, wanted = both(logits, configs)
            assert torch.equal(got.tokens, wanted.tokens), (name, configs)


def test_every_draw_of_a_distribution() -> None:
    """Many seeds over a few tokens, so that every token that may be drawn is, at its own share."""
    rows = 4096 if CUDA else 8
    logits = torch.tensor([[0.0, -1.0, 1.0, 1.0, -torch.inf, 0.5, 1.0]]).repeat(rows, 1)
    for top_p, top_k in product((1.0, 0.8) if CUDA else (0.8,), (0, 3)):
        configs = [SamplerConfig(top_p=top_p, top_k=top_k, seed=seed) for seed in range(rows)]
        got, wanted = both(logits, configs)
        assert torch.equal(got.tokens, wanted.tokens)
        assert len(got.tokens.unique()) > 1


def test_more_candidates_than_a_program_sorts_are_left_to_the_plain_arithmetic() -> None:
    logits = logits_of("fp32", 1, 3000).to(DEVICE)
    sampler = Sampler(SamplerConfig(top_k=1500, seed=1), batch=1, vocab_size=3000, device=DEVICE)
    with use_impl("triton"), pytest.raises(ValueError, match="sorts 1024 candidates at most, got 1500"):
        sampler(logits, draw=3)
    assert int(sampler(logits, draw=3).tokens) >= 0
