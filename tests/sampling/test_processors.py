"""Each piece against transformers' processor of the same name and against a plain formula."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from longburn.sampling import processors as ours

NOTHING = torch.zeros(1, 1, dtype=torch.int64)  # input ids, where the processor does not look at them


def rows(vocab_size: int, count: int = 6) -> torch.Tensor:
    torch.manual_seed(vocab_size)
    return torch.randn(count, vocab_size) * torch.linspace(0.5, 3, count)[:, None]


def column(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def normalised(weights: torch.Tensor) -> torch.Tensor:
    return weights.double() / weights.sum(-1, keepdim=True).double()


def assert_same_distribution(weights: torch.Tensor, hf_scores: torch.Tensor) -> None:
    assert torch.equal(weights > 0, hf_scores > -torch.inf)
    torch.testing.assert_close(normalised(weights), hf_scores.double().softmax(-1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 333, 5003])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_temperature(vocab_size, temperature):
    logits = rows(vocab_size)
    want = hf.TemperatureLogitsWarper(temperature)(NOTHING, logits).double().softmax(-1)
    got = normalised(ours.weigh(logits, column(temperature)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def ranked(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids = ours.most_likely(logits, logits.shape[-1])
    return ids, ours.weigh(logits.gather(-1, ids))


def in_id_order(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weights).scatter(-1, ids, weights)


@pytest.mark.parametrize("vocab_size", [2, 7, 333])
@pytest.mark.parametrize("k", [1, 2, 5, 300])
def test_top_k(vocab_size, k):
    logits = rows(vocab_size)
    ids, weights = ranked(logits)
    got = in_id_order(ids, ours.keep_top_k(weights, torch.tensor([[k]])))
    assert_same_distribution(got, hf.TopKLogitsWarper(k)(NOTHING, logits))


@pytest.mark.parametrize("vocab_size", [2, 7, 333, 5003])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p(vocab_size, p):
    logits = rows(vocab_size)
    # float64: transformers' cumulative sum in float32 loses the tail.
    want = hf.TopPLogitsWarper(p)(NOTHING, logits.double())
    ids, weights = ranked(logits)
    assert_same_distribution(in_id_order(ids, ours.keep_top_p_ranked(weights, column(p))), want)
    assert_same_distribution(ours.keep_top_p(ours.weigh(logits), column(p), logits), want)


@pytest.mark.parametrize("vocab_size", [2, 7, 333, 5003])
@pytest.mark.parametrize("min_p", [1e-6, 0.05, 0.5, 1.0])
def test_min_p(vocab_size, min_p):
    logits = rows(vocab_size)
    want = hf.MinPLogitsWarper(min_p)(NOTHING, logits.double())
    assert_same_distribution(ours.keep_min_p(ours.weigh(logits), column(min_p)), want)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 4.0])
def test_repetition(penalty):
    logits = rows(333)
    tokens = torch.randint(0, 333, (len(logits), 50))
    want = hf.RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone())
    seen = torch.zeros(logits.shape, dtype=torch.bool).scatter(-1, tokens, True)
    got = ours.penalise_repetition(logits, seen, column(penalty).float())
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_repetition_keeps_infinities():
    logits = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0]])
    got = ours.penalise_repetition(logits, torch.ones_like(logits) > 0, column(1.5).float())
    torch.testing.assert_close(got, logits, equal_nan=True, rtol=0, atol=0)


def test_frequency_and_presence_are_the_formula_of_openai():
    # mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, in OpenAI's API reference.
    logits, counts = torch.zeros(1, 4), torch.tensor([[0, 1, 2, 30]], dtype=torch.int32)
    got = ours.penalise_frequency(logits, counts, torch.tensor([[0.5]]))
    got = ours.penalise_presence(got, counts, torch.tensor([[0.25]]))
    assert got.tolist() == [[0.0, -0.75, -1.25, -15.25]]


# Few distinct values make ties; the flat rows make totals beyond 2**53, where float64 no longer counts every unit.
values = st.sampled_from([-torch.inf, -3.0, -0.0, 0.0, 1.0, 1.5, 1e-40, 3.0e38])
tied_rows = st.lists(values, min_size=1, max_size=40).map(lambda row: torch.tensor([row]))


@given(tied_rows)
def test_most_likely_is_a_stable_sort(logits):
    want = sorted(range(logits.shape[-1]), key=lambda t: (-logits[0, t].item(), t))
    assert ours.most_likely(logits, logits.shape[-1])[0].tolist() == want


def test_most_likely_tells_neighbouring_floats_apart():
    steps = [torch.tensor(start) for start in (-7.0, -1e-38, 0.0, 1e-38, 7.0)]
    for start in list(steps):
        for _ in range(20):
            start = start.nextafter(torch.tensor(torch.inf))
            steps.append(start)
    logits = torch.stack(steps)[torch.randperm(len(steps), generator=torch.Generator().manual_seed(0))][None]
    want = logits.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(ours.most_likely(logits, logits.shape[-1]), want)


@pytest.mark.parametrize("vocab_size", [257, 4096, 49152, 50001])
@pytest.mark.parametrize("n", [1, 3, 50])
@pytest.mark.parametrize("distinct", [1, 2, 9, 1000, 10**6])
def test_the_few_most_likely_of_many_are_the_start_of_a_stable_sort(vocab_size, n, distinct):
    torch.manual_seed(n)
    logits = torch.randint(0, distinct, (3, vocab_size)).float()
    logits[1, 2:] = -torch.inf  # fewer candidates than are asked for
    want = logits.sort(dim=-1, descending=True, stable=True).indices[:, :n]
    assert torch.equal(ours.most_likely(logits, n), want)


@given(tied_rows, st.sampled_from([1e-9, 0.1, 0.25, 0.5, 0.75, 0.999, 1.0]), st.sampled_from([0, 3000]))
def test_both_forms_of_top_p_agree(logits, p, more):
    logits = torch.nn.functional.pad(logits, (more // 2, more), value=-torch.inf)
    ids, weights = ranked(logits)
    want = in_id_order(ids, ours.keep_top_p_ranked(weights, column(p)))
    assert torch.equal(ours.keep_top_p(ours.weigh(logits), column(p), logits), want)


def at_digit_borders() -> torch.Tensor:
    """Positive and negative logits whose bits are all 0 or all 1 over long runs, where digits carry."""
    torch.manual_seed(0)
    ends = torch.tensor([0, 1, 2046, 2047])
    middle, low = ends[torch.randint(0, 4, (2, 6, 4099))]
    bits = 0x3F800000 + (middle << 11) + low
    return bits.int().view(torch.float32) * torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])[:, None]


LARGE = {
    "flat": torch.zeros(6, 20011),
    "narrow": rows(20011) * 1e-3,
    "wide": rows(20011) * 3,
    "tied": rows(20011).round(),
    "borders": at_digit_borders(),
}


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.3, 0.5, 0.7, 0.9, 0.999999])
@pytest.mark.parametrize("name", LARGE)
def test_both_forms_of_top_p_agree_on_large_vocabularies(p, name):
    logits = LARGE[name]
    ids, weights = ranked(logits)
    want = in_id_order(ids, ours.keep_top_p_ranked(weights, column(p)))
    assert torch.equal(ours.keep_top_p(ours.weigh(logits), column(p), logits), want)


@pytest.mark.parametrize("tail", [1, 2, 3, 5, 8])
def test_top_p_of_one_keeps_what_float64_would_round_away(tail):
    weights = torch.tensor([[ours.FULL_WEIGHT - 1] * 20011 + [1] * tail])
    logits = torch.where(weights > 1, 0.0, -29.0)
    assert torch.equal(ours.keep_top_p_ranked(weights, column(1.0)), weights)
    assert torch.equal(ours.keep_top_p(weights, column(1.0), logits), weights)


@given(st.lists(st.integers(0, 2**57), min_size=1, max_size=50), st.just(2**53 - 1) | st.integers(0, 2**53 - 1))
@example([0, 3, 0], 0)
@example([1, 1], 2**52)
def test_pick_is_the_inverse_of_the_cumulative_sum(weights, bits):
    total = sum(weights)
    got = ours.pick(torch.tensor([weights]), torch.tensor([bits / 2**53], dtype=torch.float64)).item()
    if total == 0:
        assert got == -1
        return
    target = int(bits / 2**53 * total)
    assert sum(weights[:got]) <= target < sum(weights[: got + 1])


def test_a_weight_is_the_same_wherever_it_stands():
    # Vectorised exponentials treat the last elements of a tensor apart; a row must not notice.
    logits = rows(10007, 1)
    temperature = column(0.7)
    whole = ours.weigh(logits, temperature)
    for start, length in ((0, 1), (1, 5), (3, 50), (9, 1023), (10, 9997)):
        part = torch.cat((logits.max(-1, keepdim=True).values, logits[:, start : start + length]), -1)
        assert torch.equal(ours.weigh(part, temperature)[:, 1:], whole[:, start : start + length])
