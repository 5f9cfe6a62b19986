"""The whole pipeline: its order, its ties and odd values, and every draw against a plain-Python account of it."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling_oracle import probabilities
from scipy import stats

from longburn.sampling import Sampler, SamplerConfig, TokenCounts, sample
from longburn.sampling.uniform import streams, uniform

INF, NAN = math.inf, math.nan


def counts_of(prompt: list[int], generated: list[int], vocab_size: int) -> TokenCounts:
    counts = TokenCounts.zeros(1, vocab_size)
    counts.add_prompt(torch.tensor([prompt], dtype=torch.int64))
    counts.add_generated(torch.tensor([generated], dtype=torch.int64))
    return counts


def drawn(logits: list[float], draws: int = 2000, **settings) -> list[int]:
    """The set of tokens that many draws give, in order."""
    sampler = Sampler(SamplerConfig(seed=7, **settings), batch=draws, vocab_size=len(logits))
    return sampler(torch.tensor([logits]).expand(draws, -1), draw=torch.arange(draws)).tokens.unique().tolist()


# Every setting and logit is a small dyadic fraction, so that float32 and the oracle's float64 agree to the last bit on
# scores and ties; top_p and min_p are odd enough never to fall on a border.
configs = st.builds(
    SamplerConfig,
    temperature=st.sampled_from([0, 0.5, 1, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 30]),
    top_p=st.sampled_from([1, 1, 0.0123, 0.377, 0.7321, 0.98765]),
    min_p=st.sampled_from([0, 0, 0.0123, 0.4321]),
    temperature_last=st.booleans(),
    repetition_penalty=st.sampled_from([1, 0.5, 2.0]),
    frequency_penalty=st.sampled_from([0, 0.25, -0.5]),
    presence_penalty=st.sampled_from([0, 0.5, -0.25]),
    logit_bias=st.dictionaries(st.integers(0, 4), st.sampled_from([-2.0, 0.5, 3.0]), max_size=3),
    banned_tokens=st.lists(st.integers(0, 4), max_size=2),
    seed=st.integers(0, 2**64 - 1),
)
logit = st.one_of(st.integers(-16, 16).map(lambda n: n / 8), st.sampled_from([-INF, NAN]))
tokens = st.lists(st.integers(0, 4), max_size=6)


@given(st.lists(logit, min_size=5, max_size=24), configs, tokens, tokens, st.integers(0, 2**40))
def test_every_draw_is_the_oracles(logits, config, prompt, generated, draw):
    counts = counts_of(prompt, generated, len(logits))
    got = sample(torch.tensor([logits]), config, counts=counts, draw=draw).tokens.item()
    p = probabilities(logits, config, prompt, generated)
    if not any(p):
        assert got == -1
        return
    order = range(len(logits))
    if 0 < config.top_k < len(logits):
        order = sorted(order, key=lambda t: (-p[t], t))
    u = 0.0 if config.greedy else uniform(streams([config.seed]), draw).item()
    below = math.fsum(p[t] for t in order[: list(order).index(got)])
    assert below - 1e-9 <= u < below + p[got] + 1e-9
    assert p[got] > 0


N = 2**18
LOGITS = [0.3, 2.0, -1.0, 1.5, 0.3, -4.0, 0.0, 1.5, -0.5, 1.9, -2.5]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.15},
        {"top_k": 6, "top_p": 0.7, "min_p": 0.2, "temperature": 1.3},
        {"top_p": 0.8, "min_p": 0.1, "temperature": 2.5, "temperature_last": True},
        {"logit_bias": {5: 5.0, 1: -1.0}, "banned_tokens": (3,)},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_the_drawn_frequencies(settings):
    config = SamplerConfig(seed=2024, **settings)
    prompt, generated = [0, 1, 5], [1, 2, 2, 9]
    expected = torch.tensor(probabilities(LOGITS, config, prompt, generated), dtype=torch.float64)
    batch = 2**14
    one = counts_of(prompt, generated, len(LOGITS))
    counts = TokenCounts(one.prompt.expand(batch, -1), one.generated.expand(batch, -1))
    sampler = Sampler(config, batch=batch, vocab_size=len(LOGITS))
    logits = torch.tensor([LOGITS]).expand(batch, -1)
    seen = torch.zeros(len(LOGITS), dtype=torch.int64)
    for first in range(0, N, batch):
        drawn = sampler(logits, draw=torch.arange(first, first + batch), counts=counts).tokens
        seen += torch.bincount(drawn, minlength=len(LOGITS))
    assert seen[expected == 0].sum() == 0
    kept = expected > 0
    assert stats.chisquare(seen[kept].numpy(), (expected[kept] * N).numpy()).pvalue > 1e-4


# --- order -----------------------------------------------------------------------------------------------------------


def test_bias_comes_before_repetition():
    # Token 0: (-1 + 2) / 2 = 0.5 against 0.25; the other order gives -1 * 2 + 2 = 0.
    config = SamplerConfig(temperature=0, logit_bias={0: 2.0}, repetition_penalty=2.0)
    assert sample(torch.tensor([[-1.0, 0.25]]), config, counts=counts_of([0], [], 2)).tokens.item() == 0


def test_repetition_comes_before_frequency():
    # Token 0: 2 / 2 - 1 = 0 against 0.25; the other order gives (2 - 1) / 2 = 0.5.
    config = SamplerConfig(temperature=0, repetition_penalty=2.0, frequency_penalty=1.0)
    assert sample(torch.tensor([[2.0, 0.25]]), config, counts=counts_of([], [0], 2)).tokens.item() == 1


def test_a_ban_wins_over_a_bias():
    config = SamplerConfig(temperature=0, logit_bias={0: 100.0}, banned_tokens=(0,))
    assert sample(torch.tensor([[INF, 0.0]]), config).tokens.item() == 1


P = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]


def test_temperature_comes_before_top_p_and_min_p():
    assert drawn(P, top_p=0.41) == [0, 1]
    assert drawn(P, top_p=0.41, temperature=0.25) == [0]
    assert drawn(P, min_p=0.7) == [0, 1]
    assert drawn(P, min_p=0.7, temperature=0.25) == [0]


def test_temperature_last_comes_after_them():
    for temperature in (0.25, 4.0):
        assert drawn(P, top_p=0.41, temperature=temperature, temperature_last=True) == [0, 1]
        assert drawn(P, min_p=0.7, temperature=temperature, temperature_last=True) == [0, 1]
        assert drawn(P, top_k=3, top_p=0.5, temperature=temperature, temperature_last=True) == [0, 1]
    logits = torch.randn(9, 50)  # without a cut, when the temperature divides makes no difference
    first, last = (sample(logits, SamplerConfig(temperature=3, temperature_last=x, seed=1)) for x in (False, True))
    assert torch.equal(first.tokens, last.tokens)


def test_top_k_comes_before_top_p():
    # 0.4 / 0.7 is half the mass that top-k leaves; top-p of all four tokens would keep two.
    assert drawn(P, top_p=0.5) == [0, 1]
    assert drawn(P, top_p=0.5, top_k=2) == [0]


def test_top_p_comes_before_min_p():
    # min-p first would leave 0.4 and 0.3, of which 0.4 is more than half.
    assert drawn(P, top_p=0.5, min_p=0.6) == [0, 1]


def test_repetition_counts_the_prompt_and_the_other_penalties_do_not():
    logits, prompted = torch.tensor([[1.0, 0.9]]), counts_of([0, 0, 0], [], 2)
    for settings, want in (
        ({"repetition_penalty": 2.0}, 1),
        ({"frequency_penalty": 2.0}, 0),
        ({"presence_penalty": 2.0}, 0),
    ):
        config = SamplerConfig(temperature=0, **settings)
        assert sample(logits, config, counts=prompted).tokens.item() == want
        assert sample(logits, config, counts=counts_of([], [0], 2)).tokens.item() == 1


# --- ties, NaN, infinities -------------------------------------------------------------------------------------------


def test_greedy_is_argmax_with_the_lowest_id_first():
    torch.manual_seed(0)
    logits = torch.randn(20, 5003)
    greedy = SamplerConfig(temperature=0)
    assert torch.equal(sample(logits, greedy).tokens, logits.argmax(-1))
    tied = torch.zeros(3, 5003)
    tied[1, :4000], tied[2, 7] = -1.0, -0.0
    assert sample(tied, greedy).tokens.tolist() == [0, 4000, 0]


def test_top_k_keeps_exactly_k_of_equal_logits_and_the_lowest_ids():
    assert drawn([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], top_k=2) == [1, 3]
    assert drawn([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], top_k=4) == [0, 1, 3, 4]
    assert drawn([0.0] * 300, top_k=3) == [0, 1, 2]
    assert drawn([0.0, -0.0, 0.0], top_k=2) == [0, 1]


def test_top_p_keeps_the_lowest_ids_of_equal_logits():
    assert drawn([0.0] * 10, top_p=0.3) == [0, 1, 2]
    assert drawn([0.0] * 10, top_p=0.31) == [0, 1, 2, 3]


EVERY_PATH = [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9}, {"min_p": 0.1}]


@pytest.mark.parametrize("settings", EVERY_PATH)
class TestOddLogits:
    def test_nan_is_no_candidate(self, settings):
        assert set(drawn([NAN, 1.0, NAN, 1.0, -INF], **settings)) <= {1, 3}

    def test_a_row_without_candidate_gives_minus_one(self, settings):
        assert drawn([-INF, NAN, -INF, -INF], **settings) == [-1]
        assert drawn([5.0, -INF, NAN, 1.0], banned_tokens=(0, 3), **settings) == [-1]

    def test_one_candidate_is_taken(self, settings):
        assert drawn([-INF, -1e38, NAN, -INF], **settings) == [1]

    def test_plus_infinity_beats_every_number(self, settings):
        assert drawn([3e38, 1.0, INF, 2.0], **settings) == [2]

    def test_tokens_at_plus_infinity_share_the_probability(self, settings):
        greedy = settings.get("temperature") == 0
        assert drawn([0.0, INF, 7.0, INF], **settings) == ([1] if greedy else [1, 3])

    def test_extreme_temperatures(self, settings):
        if settings.get("temperature") != 0:
            assert drawn([0.0, 1e-6, -5.0, 0.0], **{**settings, "temperature": 1e-30}) == [1]
        if not settings:
            assert drawn([-100.0, 100.0, 0.0], temperature=1e30) == [0, 1, 2]

    def test_one_token_of_vocabulary(self, settings):
        assert drawn([-3.0], **settings) == [0]


def test_penalties_leave_infinities_alone():
    config = SamplerConfig(temperature=0, repetition_penalty=3.0, frequency_penalty=5.0, presence_penalty=5.0)
    for logits, want in (([INF, 3e38], 0), ([-INF, -3e38], 1), ([NAN, -3e38], 1)):
        assert sample(torch.tensor([logits]), config, counts=counts_of([0], [0, 0], 2)).tokens.item() == want


# --- the call --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_of_any_dtype_are_left_unchanged(dtype):
    logits = torch.linspace(-3, 3, 50, dtype=dtype).repeat(2, 1)
    before = logits.clone()
    config = SamplerConfig(seed=1, logit_bias={3: 2.0}, banned_tokens=(1,), repetition_penalty=2.0, top_p=0.9)
    sample(logits, config, counts=TokenCounts.zeros(2, 50), logprobs=2)
    assert torch.equal(logits, before)


def test_no_global_generator_is_touched():
    before = torch.random.get_rng_state()
    sample(torch.zeros(4, 9), SamplerConfig())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_seed_rows_and_samplers_differ_and_can_be_repeated():
    logits = torch.zeros(64, 1000)
    first = Sampler(SamplerConfig(), batch=64, vocab_size=1000)
    second = Sampler(SamplerConfig(), batch=64, vocab_size=1000)
    tokens = first(logits, draw=0).tokens
    assert len(set(tokens.tolist())) > 32
    assert not torch.equal(tokens, second(logits, draw=0).tokens)
    assert not torch.equal(tokens, first(logits, draw=1).tokens)
    assert torch.equal(tokens, sample(logits, first.configs, draw=0).tokens)


def test_equal_seeds_draw_alike():
    tokens = sample(torch.zeros(5, 1000), SamplerConfig(seed=3)).tokens
    assert len(set(tokens.tolist())) == 1


def test_wrong_calls_say_what_is_wanted():
    config = SamplerConfig()
    with pytest.raises(ValueError, match="2 configurations for 3 rows"):
        sample(torch.zeros(3, 4), [config, config])
    with pytest.raises(ValueError, match=r"must be \[B, V\]"):
        sample(torch.zeros(4), config)
    with pytest.raises(ValueError, match="vocab_size"):
        Sampler(config, batch=1, vocab_size=2**21)
    sampler = Sampler(config, batch=3, vocab_size=4)
    with pytest.raises(ValueError, match=r"\(3, 5\), was built for \(3, 4\)"):
        sampler(torch.zeros(3, 5), draw=0)
    for draw in (torch.tensor(0), torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="draw must be an int or int64"):
            sampler(torch.zeros(3, 4), draw=draw)
    with pytest.raises(ValueError, match="needs TokenCounts"):
        sample(torch.zeros(1, 4), SamplerConfig(presence_penalty=1.0))
    with pytest.raises(ValueError, match="needs TokenCounts"):
        sample(torch.zeros(1, 4), SamplerConfig(presence_penalty=1.0), counts=TokenCounts.zeros(1, 5))
    with pytest.raises(ValueError, match="logprobs"):
        sample(torch.zeros(1, 4), config, logprobs=5)


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 7, 5003])
def test_logprobs_are_those_of_the_raw_logits(vocab_size):
    torch.manual_seed(0)
    logits = torch.randn(6, vocab_size) * 4
    want = logits.double().log_softmax(-1)
    config = SamplerConfig(seed=1, temperature=0.3, top_k=3, logit_bias={0: -2.0}, frequency_penalty=2.0)
    n = min(5, vocab_size)
    got = sample(logits, config, counts=TokenCounts.zeros(6, vocab_size), logprobs=n)
    torch.testing.assert_close(got.logprobs.double(), want.gather(-1, got.tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(got.top_tokens, want.topk(n).indices)
    torch.testing.assert_close(got.top_logprobs.double(), want.topk(n).values, rtol=1e-5, atol=1e-5)


def test_logprobs_only_as_asked():
    logits = torch.zeros(2, 4)
    assert sample(logits, SamplerConfig()).logprobs is None
    chosen_only = sample(logits, SamplerConfig(), logprobs=0)
    torch.testing.assert_close(chosen_only.logprobs, torch.full((2,), math.log(0.25)))
    assert chosen_only.top_tokens is None
    assert chosen_only.top_logprobs is None


def test_logprobs_of_ties_and_odd_values():
    logits = torch.tensor([[0.0, 0.0, NAN, 0.0], [INF, 1.0, INF, -INF], [-INF, NAN, -INF, -INF]])
    got = sample(logits, SamplerConfig(temperature=0), logprobs=3)
    assert got.tokens.tolist() == [0, 0, -1]
    assert got.top_tokens.tolist() == [[0, 1, 3], [0, 2, 1], [0, 1, 2]]
    torch.testing.assert_close(got.logprobs, torch.tensor([math.log(1 / 3), math.log(1 / 2), -INF]))
    assert got.top_logprobs[2].tolist() == [-INF] * 3


# --- rows do not depend on each other --------------------------------------------------------------------------------

SETTINGS = [
    {"temperature": 0},
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 40, "temperature": 1.4},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"top_p": 0.95, "min_p": 0.01},
    {"top_k": 20, "top_p": 0.8},
    {"min_p": 0.05},
    {"repetition_penalty": 1.3, "top_k": 50},
    {"frequency_penalty": 0.7, "presence_penalty": -0.2},
    {"temperature": 0, "presence_penalty": 0.9},
    {"logit_bias": {2: 9.0, 11: -3.0}, "banned_tokens": (0, 3), "top_p": 0.9},
    {"repetition_penalty": 0.8, "banned_tokens": (5,), "temperature": 2.0},
]


@pytest.mark.parametrize("vocab_size", [13, 20011])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_a_row_is_bit_for_bit_what_it_is_alone(vocab_size, scale):
    torch.manual_seed(vocab_size)
    batch = len(SETTINGS)
    logits = torch.randn(batch, vocab_size) * scale
    logits[4, 1], logits[5, 2], logits[6] = NAN, INF, -INF
    rows = [SamplerConfig(seed=100 + i, **settings) for i, settings in enumerate(SETTINGS)]
    draw = torch.randint(0, 2**40, (batch,))
    counts = TokenCounts.zeros(batch, vocab_size)
    counts.add_prompt(torch.randint(0, vocab_size, (batch, 30)))
    counts.add_generated(torch.randint(0, vocab_size, (batch, 30)))

    def take(chosen: torch.Tensor):
        mates = TokenCounts(counts.prompt[chosen], counts.generated[chosen])
        configs = [rows[i] for i in chosen.tolist()]
        return sample(logits[chosen], configs, draw=draw[chosen], counts=mates, logprobs=4)

    alone = [take(torch.tensor([i])) for i in range(batch)]
    for size in (batch, 7, 2, 2):
        chosen = torch.randperm(batch)[:size]
        together = take(chosen)
        for place, i in enumerate(chosen.tolist()):
            for field in dataclasses.fields(together):
                got, want = getattr(together, field.name)[place], getattr(alone[i], field.name)[0]
                assert torch.equal(got, want), (rows[i], field.name)


# --- graphs ----------------------------------------------------------------------------------------------------------

MIXED = [SamplerConfig(seed=i, **settings) for i, settings in enumerate(SETTINGS)]


def test_a_call_is_one_graph_without_host_reads():
    logits = torch.randn(len(MIXED), 4099, generator=torch.Generator().manual_seed(0))
    counts, draw = TokenCounts.zeros(*logits.shape), torch.arange(len(MIXED))
    sampler = Sampler(MIXED, batch=len(MIXED), vocab_size=4099)
    traced = torch.compile(sampler.__call__, backend="eager", fullgraph=True, dynamic=False)
    got, want = (f(logits, draw=draw, counts=counts, logprobs=3) for f in (traced, sampler))
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.top_tokens, want.top_tokens)


@pytest.mark.cuda
def test_a_cuda_graph_replays_what_the_cpu_draws():
    generator = torch.Generator().manual_seed(0)
    batch, vocab_size = len(MIXED), 50001
    here, there = (Sampler(MIXED, batch=batch, vocab_size=vocab_size, device=device) for device in ("cpu", "cuda"))
    logits = torch.zeros(batch, vocab_size, device="cuda")
    draw = torch.zeros(batch, dtype=torch.int64, device="cuda")
    cpu_counts, counts = (TokenCounts.zeros(batch, vocab_size, device) for device in ("cpu", "cuda"))

    def step() -> torch.Tensor:
        tokens = there(logits, draw=draw, counts=counts).tokens
        counts.add_generated(tokens)
        draw.add_(1)
        return tokens

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = step()
    counts.generated.zero_()
    draw.zero_()
    for n in range(20):
        fresh = torch.randn(batch, vocab_size, generator=generator) * 3
        logits.copy_(fresh)
        graph.replay()
        want = here(fresh, draw=n, counts=cpu_counts).tokens
        cpu_counts.add_generated(want)
        # The two devices' exponentials differ in the last bit, a share of 2**-52 of all draws.
        assert torch.equal(tokens.cpu(), want)
