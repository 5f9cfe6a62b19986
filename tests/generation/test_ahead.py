"""Decoding that runs ahead of the host leaves what decoding on it leaves, however it ends; here without a graph."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import pytest
import torch
from test_loop import Script, Spelling, llama, prompts

from longburn import AttnWindow, CacheManager
from longburn.generation import GenerationConfig, GenerationError, TokenEvent, generate
from longburn.generation.ahead import DeviceStep
from longburn.models.llama import Llama
from longburn.sampling import SamplerConfig

WINDOWS = [None, AttnWindow(9), AttnWindow(9, sink_tokens=2), AttnWindow(9, sink_tokens=2, relative_sinks=True)]
Clock = tuple[int, ...]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Chooses where the next streams are decoded: ahead of the host, or on it."""

    def choose(wanted: bool) -> None:
        monkeypatch.setattr("longburn.generation.loop.runs_ahead", lambda cache: wanted)

    return choose


@pytest.fixture(scope="module", params=WINDOWS, ids=str)
def model(request: pytest.FixtureRequest) -> Llama:
    return llama(request.param)


def watched(events: Iterator[TokenEvent], cache: CacheManager) -> Iterator[tuple[TokenEvent, Clock]]:
    """The events, and the cache's clock at the time of each."""
    return ((event, cache.row_positions) for event in events)


def held(cache: CacheManager) -> list[list[list[int]]]:
    """The positions that every row of every layer holds, in order."""
    rows = [[sorted(p for p in row if p >= 0) for row in layer.positions.tolist()] for layer in cache]
    return [layer * cache.batch if len(layer) == 1 else layer for layer in rows]


SPELLING = Spelling(*[chr(65 + n) for n in range(97)])
ENDS: dict[str, dict] = {
    "length": {},
    "stop tokens": {"stop_tokens": frozenset(range(0, 97, 7))},
    "stop strings": {"stop_strings": tuple(chr(65 + n) for n in range(3, 97, 9))},
    "both": {"stop_tokens": frozenset(range(0, 97, 11)), "stop_strings": tuple(chr(65 + n) for n in range(3, 97, 13))},
}


@pytest.mark.parametrize("lengths", [(13,), (13, 13, 13), (30, 1, 8)], ids=str)
@pytest.mark.parametrize("end", ENDS)
def test_the_same_events_and_the_same_cache_however_rows_end(
    model: Llama, ahead: Callable[[bool], None], end: str, lengths: tuple[int, ...]
) -> None:
    config = GenerationConfig(max_new_tokens=24, chunk_size=7, **ENDS[end])
    sampler = [SamplerConfig(temperature=1.5, presence_penalty=0.3, seed=row) for row in range(len(lengths))]
    results = []
    for wanted in (False, True):
        ahead(wanted)
        cache = model.init_cache(len(lengths))
        first = list(
            watched(
                generate(model, prompts(*lengths), config=config, sampler=sampler, cache=cache, tokenizer=SPELLING),
                cache,
            )
        )
        positions = held(cache)
        # What it leaves can be gone on from: a row that ended goes on too.
        more = generate(
            model, prompts(*(3 for _ in lengths)), config=config, sampler=sampler, cache=cache, tokenizer=SPELLING
        )
        second = list(more)
        results.append((first, cache.row_positions, second))
        if end in ("length", "stop tokens"):  # nothing was taken back, so a ring has nothing to miss
            results[-1] += (positions,)  # type: ignore[assignment]
        else:
            assert all(row == sorted(set(row)) for layer in positions for row in layer)
    assert results[0] == results[1]
    assert isinstance(cache.recorded, DeviceStep)  # or else this has compared the host with itself


def test_a_consumer_that_leaves_at_any_time(model: Llama, ahead: Callable[[bool], None]) -> None:
    for count in range(1, 8):
        results = []
        for wanted in (False, True):
            ahead(wanted)
            cache = model.init_cache(2)
            stream = generate(model, prompts(20, 6), cache=cache)
            seen = list(islice(watched(stream, cache), count))
            stream.close()  # type: ignore[attr-defined]
            more = list(generate(model, prompts(4, 2), config=GenerationConfig(max_new_tokens=12), cache=cache))
            results.append((seen, more, cache.row_positions))
        assert results[0] == results[1]


def test_cancelled_streams_hold_every_token_that_was_told(model: Llama, ahead: Callable[[bool], None]) -> None:
    results = []
    for wanted in (False, True):
        ahead(wanted)
        cache, seen = model.init_cache(2), []
        seen.extend(generate(model, prompts(20, 6), cache=cache, cancelled=lambda cache=cache: cache.position >= 25))
        assert [event.finish for event in seen[-2:]] == ["cancelled"] * 2
        assert cache.row_positions == tuple(event.position for event in seen[-2:])
        results.append((seen, cache.row_positions, held(cache), list(generate(model, prompts(2, 2), cache=cache))))
    assert results[0] == results[1]


@pytest.mark.parametrize("slack", [0, 3])
def test_what_was_taken_back_limits_rewinds_and_never_breaks_them(ahead: Callable[[bool], None], slack: int) -> None:
    """A late stop wrote one slot of the ring more: whoever goes back that far is told so, or gets the right numbers."""
    model = llama(AttnWindow(9, sink_tokens=2))
    config = GenerationConfig(max_new_tokens=40, stop_strings=tuple(chr(65 + n) for n in range(3, 97, 9)))
    (prompt,) = prompts(30)
    refused = []
    for back in range(1, slack + 3):
        results = []
        for wanted in (False, True):
            ahead(wanted)
            cache = model.init_cache(1, slack=slack)
            events = list(generate(model, [prompt], config=config, cache=cache, tokenizer=SPELLING))
            assert events[-1].finish == "stop_string"
            try:
                cache.rewind(back)
            except ValueError:
                results.append(None)
            else:
                results.append(list(generate(model, [[5]], config=GenerationConfig(max_new_tokens=9), cache=cache)))
        assert results[1] in (results[0], None)
        refused.append(results[1] is None)
    assert refused == [False] * slack + [True, True]


def test_a_cache_that_grows_while_the_device_runs_ahead(
    ahead: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longburn.generation.ahead.ROOM", 8)
    model = llama()
    config, results = GenerationConfig(max_new_tokens=600), []
    for wanted in (False, True):
        ahead(wanted)
        cache = model.init_cache(2)
        results.append((list(generate(model, prompts(3, 9), config=config, cache=cache)), held(cache)))
    assert results[0] == results[1]
    assert cache[0].slots > 256


def test_a_step_is_forgotten_only_when_buffers_move(
    ahead: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is captured over them, on a GPU, is captured again after that."""
    forgotten: list[int] = []
    forget = DeviceStep.forget
    monkeypatch.setattr(DeviceStep, "forget", lambda step: (forgotten.append(1), forget(step)))
    monkeypatch.setattr("longburn.generation.ahead.ROOM", 200)
    ahead(True)
    for model in (llama(), llama(AttnWindow(9, sink_tokens=2))):
        cache = model.init_cache(2)
        for count, wanted in ((40, 1), (40, 0), (600, 1 if model.attentions[0].window.size is None else 0), (9, 0)):
            list(generate(model, prompts(3, 9), config=GenerationConfig(max_new_tokens=count), cache=cache))
            assert len(forgotten) == wanted
            forgotten.clear()


def test_the_step_stays_with_its_cache(ahead: Callable[[bool], None]) -> None:
    """Another seed is no other step; other settings, another model or another batch are."""
    ahead(True)
    model, other = llama(), llama()
    cache, config, steps = model.init_cache(1, max_length=400), GenerationConfig(max_new_tokens=12), []
    for sampler in (SamplerConfig(seed=1), SamplerConfig(seed=2), SamplerConfig(), SamplerConfig(temperature=0.5)):
        cache.reset()
        said = [event.token for event in generate(model, prompts(5), config=config, sampler=sampler, cache=cache)]
        steps.append(cache.recorded)
        if sampler.seed is not None:  # the seed that is in force is the one that was asked for
            ahead(False)
            assert said == [e.token for e in generate(model, prompts(5), config=config, sampler=sampler)]
            ahead(True)
    assert steps[0] is steps[1] is steps[2]
    assert steps[3] is not steps[2]
    list(generate(other, prompts(5), config=config, sampler=SamplerConfig(temperature=0.5), cache=cache))
    assert cache.recorded is not steps[3]


def test_a_cache_that_is_touched_meanwhile_is_noticed(ahead: Callable[[bool], None]) -> None:
    ahead(True)
    model = llama()
    cache = model.init_cache(1)
    stream = generate(model, prompts(5), cache=cache)
    next(stream)
    cache.rewind(1)
    with pytest.raises(RuntimeError, match="the cache was rewound"):
        next(stream)


def test_no_candidate_leaves_the_cache_as_on_the_host(ahead: Callable[[bool], None]) -> None:
    """The second row runs out of tokens at its third; the first one's step after that is taken back."""
    for wanted in (False, True):
        ahead(wanted)
        script = Script([[5, 6, 7, 8], [5, 6, 96, 5]])
        cache = script.init_cache(2)
        sampler = [SamplerConfig(temperature=0), SamplerConfig(temperature=0)]
        banned = _Silent(script)
        with pytest.raises(GenerationError, match="row 1, position 5"):
            list(generate(banned, [[1] * 3] * 2, cache=cache, sampler=sampler))
        assert cache.row_positions == (5, 5)
        assert held(cache) == [[[0, 1, 2, 3, 4]] * 2]


class _Silent:
    """A script that leaves no candidate where it would say 96."""

    def __init__(self, script: Script) -> None:
        self.script, self.vocab_size, self.init_cache = script, script.vocab_size, script.init_cache

    def forward_logits(self, tokens: torch.Tensor, cache: CacheManager, **options: bool) -> torch.Tensor:
        logits = self.script.forward_logits(tokens, cache, **options)
        return logits.masked_fill(logits[:, 96:] > 0, -torch.inf)


def test_logprobs_and_all_settings_come_from_the_device(model: Llama, ahead: Callable[[bool], None]) -> None:
    config = GenerationConfig(max_new_tokens=15, logprobs=4)
    samplers: Sequence[SamplerConfig] = [
        SamplerConfig(temperature=1.3, top_p=0.9, seed=7, logit_bias={3: 2.0}, banned_tokens=(1, 2)),
        SamplerConfig(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=8),
        SamplerConfig(temperature=0, frequency_penalty=0.4),
    ]
    results = []
    for wanted in (False, True):
        ahead(wanted)
        results.append(list(generate(model, prompts(9, 4, 30), config=config, sampler=samplers)))
    for host, device in zip(*results, strict=True):
        assert (host.row, host.token, host.position) == (device.row, device.token, device.position)
        assert device.logprob == pytest.approx(host.logprob)
        assert dict(device.top) == pytest.approx(dict(host.top))
