"""The orders of the released backends, each written out in fp64, against what is drawn."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longburn.models.ace_step.planner import ORDERS, GuidedSampler, PlannerSampling
from longburn.models.ace_step.planner.sampling import CodeRules
from longburn.sampling import TokenCounts

V, DRAWS, G = 24, 8000, 1.7
SEEN = [1, 11, 5, 9]


def logits() -> Tensor:
    return 0.4 * torch.randn(2, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def free(scores: Tensor, at: Tensor) -> Tensor:
    """A rule that forbids token 3 and nothing else."""
    return scores.index_fill(-1, torch.tensor([3]), -torch.inf)


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def top_k(scores: list[float], k: int) -> list[float]:
    least = sorted(scores)[-k]
    return [score if score >= least else -math.inf for score in scores]


def top_p(scores: list[float], p: float) -> list[float]:
    """Tokens from the most likely one on, until their mass is p."""
    mass, kept = 0.0, list[int]()
    share = softmax(scores)
    for token in sorted(range(V), key=lambda token: -share[token]):
        if mass < p:
            kept.append(token)
        mass += share[token]
    return [score if token in kept else -math.inf for token, score in enumerate(scores)]


def penalise(scores: list[float], penalty: float) -> list[float]:
    change = [1.0 if token not in SEEN else 1 / penalty if scores[token] > 0 else penalty for token in range(V)]
    return [score * factor for score, factor in zip(scores, change, strict=True)]


def guide(asked: list[float], without: list[float]) -> list[float]:
    scores = [u + G * (c - u) for c, u in zip(asked, without, strict=True)]
    scores[3] = -math.inf
    return scores


def divided(scores: list[float], temperature: float) -> list[float]:
    return [score / temperature for score in scores]


def pytorch(asked: list[float], without: list[float]) -> list[float]:
    return divided(top_p(top_k(penalise(guide(asked, without), 1.4), 9), 0.8), 0.6)


def nano_vllm(asked: list[float], without: list[float]) -> list[float]:
    return top_p(top_k(divided(guide(asked, without), 0.6), 9), 0.8)


def comfyui(asked: list[float], without: list[float]) -> list[float]:
    return divided(top_p(top_k(guide(asked, without), 9), 0.8), 0.6)


def as_meant(asked: list[float], without: list[float]) -> list[float]:
    """nano-vllm's order, were its test for penalties not inverted."""
    return top_p(top_k(divided(guide(penalise(asked, 1.4), without), 0.6), 9), 0.8)


CASES: dict[str, tuple[Any, float, Callable[[list[float], list[float]], list[float]]]] = {
    "pytorch": ("pytorch", 1.4, pytorch),
    "nano-vllm": ("nano-vllm", 1.0, nano_vllm),
    "comfyui": ("comfyui", 1.0, comfyui),
    "stages": (("repetition", *ORDERS["nano-vllm"]), 1.4, as_meant),
}


@pytest.mark.parametrize(("order", "penalty", "written_out"), CASES.values(), ids=CASES)
def test_orders(order: Any, penalty: float, written_out: Callable[[list[float], list[float]], list[float]]) -> None:
    """Every token that may come does, none that may not, and as often as it should (5 sigma)."""
    share = softmax(written_out(*logits().tolist()))
    others = [softmax(case[2](*logits().tolist())) for case in CASES.values()]
    assert sum(other == share for other in others) == 1, "the cases must differ for this to prove anything"
    sampling = PlannerSampling(0.6, 0.8, 9, penalty, G, order, seed=1)
    sampler = GuidedSampler(sampling, songs=DRAWS, vocab_size=V, rules=free, device="cpu")
    counts = TokenCounts.zeros(2 * DRAWS, V)
    counts.add_prompt(torch.tensor([SEEN[:2]] * DRAWS + [[0, 0]] * DRAWS))
    counts.add_generated(torch.tensor([SEEN[2:]] * DRAWS + [[7, 8]] * DRAWS))
    tokens = sampler(logits().repeat_interleave(DRAWS, 0), draw=torch.arange(2 * DRAWS), counts=counts).tokens
    assert torch.equal(tokens[:DRAWS], tokens[DRAWS:])
    found = torch.bincount(tokens[:DRAWS], minlength=V) / DRAWS
    for token in range(V):
        assert abs(found[token] - share[token]) <= 5 * math.sqrt(share[token] / DRAWS), token
        assert (found[token] > 0) == (share[token] > 0) or share[token] < 20 / DRAWS


def test_a_draw_belongs_to_its_seed_and_position() -> None:
    """Not to the row of the batch, nor to the position in the row without what was asked for."""
    sampling = PlannerSampling(seed=2**64 - 1)
    two = GuidedSampler(sampling, songs=2, vocab_size=V, rules=free, device="cpu")
    assert [config.seed for config in two.configs] == [2**64 - 1, 0]
    second = GuidedSampler(PlannerSampling(seed=0), songs=1, vocab_size=V, rules=free, device="cpu")
    rows = 0.2 * torch.randn(4, V, generator=torch.Generator().manual_seed(3))
    for at in range(40):
        pair = two(rows, draw=torch.tensor([at, at + 7, 1, 2])).tokens
        assert pair[1] == second(rows[[1, 3]], draw=torch.tensor([at + 7, 50])).tokens[0]
        assert torch.equal(pair[:2], pair[2:])


def test_codes_end_where_they_must() -> None:
    """Before `least` codes the end is out of the question, after `most` it is the only one, between both may come."""
    rules = CodeRules([10, 20], [2, 0], [3, 3], "cpu")
    scores = torch.zeros(2, 5)
    blocked, forced = [True] * 4 + [False], [False] * 4 + [True]
    for made, first, second in ((0, blocked, [True] * 5), (1, blocked, [True] * 5), (2, [True] * 5, [True] * 5)):
        assert rules(scores, torch.tensor([10, 20]) + made).isfinite().tolist() == [first, second]
    worst = scores.index_fill(-1, torch.tensor([4]), torch.nan)
    assert rules(worst, torch.tensor([13, 23])).isfinite().tolist() == [forced, forced]


def test_nothing_is_read_back() -> None:
    """No number leaves the device in a draw, so that a graph can hold it."""

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default, "a read by the host"
            return func(*args, **(kwargs or {}))

    with pytest.raises(AssertionError, match="a read by the host"), NoReads():
        torch.zeros(1).item()
    for order, penalty in (("pytorch", 1.3), ("nano-vllm", 1.0), ("comfyui", 1.0)):
        sampling = PlannerSampling(top_k=5, repetition_penalty=penalty, order=order, seed=1)
        rules = CodeRules([3], [9], [9], "cpu")
        sampler = GuidedSampler(sampling, songs=1, vocab_size=5000, rules=rules, device="cpu")
        counts, at = TokenCounts.zeros(2, 5000), torch.tensor([5, 4])
        with NoReads():
            tokens = sampler(torch.randn(2, 5000), draw=at, counts=counts).tokens
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "vllm"}, "order 'vllm', wanted 'pytorch', 'nano-vllm', 'comfyui' or stages"),
        ({"order": ("guidance", "temperature")}, "with guidance and rules"),
        ({"order": ("guidance", "rules", "temperature", "top_p", "top_k")}, "after temperature nothing but"),
        ({"order": ("guidance", "rules", "rules", "temperature")}, "at most once"),
        ({"order": ("guidance", "rules", "beam", "temperature")}, "wanted each of"),
        ({"order": "nano-vllm", "repetition_penalty": 1.1}, "order 'nano-vllm' never applies one; set it to 1"),
        ({"guidance": 0.5}, "guidance 0.5, wanted a finite number of at least 1"),
        ({"guidance": math.nan}, "guidance nan"),
        ({"temperature": -1}, "temperature must be"),
        ({"top_p": 0}, "top_p must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlannerSampling(**settings)


def test_calls_that_are_refused() -> None:
    sampler = GuidedSampler(PlannerSampling(), songs=2, vocab_size=V, rules=free, device="cpu")
    with pytest.raises(ValueError, match=r"logits of shape \(2, 24\), logprobs None: wanted 4 rows"):
        sampler(torch.zeros(2, V), draw=0)
    penalised = GuidedSampler(PlannerSampling(repetition_penalty=2), songs=1, vocab_size=V, rules=free, device="cpu")
    with pytest.raises(ValueError, match="needs TokenCounts, got none"):
        penalised(torch.zeros(2, V), draw=0)
