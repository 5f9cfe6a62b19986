"""The decode step as one CUDA graph: the bits of the same step without a graph, however rows end and caches wrap."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import Spelling, prompts
from torch import Tensor

from longburn import AttnWindow, CacheManager, RotaryEncoding, WindowPolicy
from longburn.generation import AutoregressiveModel, GenerationConfig, TokenEvent, generate
from longburn.generation import ahead as module
from longburn.generation.ahead import AheadSteps, DeviceStep
from longburn.models.gpt_oss import GptOss
from longburn.models.llama import Llama, LlamaConfig
from longburn.sampling import SamplerConfig

pytestmark = pytest.mark.cuda

GOLDEN = Path(__file__).parent.parent / "models" / "data" / "gpt_oss_tiny_original"
VOCAB = 97
SPELLING = Spelling(*[chr(65 + n) for n in range(VOCAB)])
POLICIES = {
    "full": WindowPolicy.full(),
    "window": WindowPolicy.uniform(AttnWindow(19)),
    "sinks": WindowPolicy.uniform(AttnWindow(19, sink_tokens=3)),
    "relative": WindowPolicy.uniform(AttnWindow(19, sink_tokens=3, relative_sinks=True)),
    "every other": WindowPolicy.every_other(17, full_on_even=False),
}


def llama(policy: WindowPolicy | None = None, dtype: torch.dtype = torch.float32) -> Llama:
    """Random weights, wide enough that greedy text wanders and no two logits are near each other."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        rope=RotaryEncoding(32),
    )
    model = Llama(config, policy=policy, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model.eval().cuda()


@contextmanager
def patched(owner: object, name: str, value: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


def stream(
    model: AutoregressiveModel, batch: Sequence[Sequence[int]], *, graph: bool = True, **settings: Any
) -> tuple[list[TokenEvent], list[Tensor]]:
    """The events, and the logits of every step."""
    seen: list[Tensor] = []
    step, capture = DeviceStep.__call__, DeviceStep._capture

    def recording(self: DeviceStep, cache: CacheManager) -> Any:
        result = step(self, cache)
        seen.append(self.logits.clone())
        return result

    with (
        patched(DeviceStep, "__call__", recording),
        patched(DeviceStep, "_capture", capture if graph else lambda self, cache: None),
    ):
        return list(generate(model, batch, **settings)), seen


def on_the_host(model: AutoregressiveModel, batch: Sequence[Sequence[int]], **settings: Any) -> list[TokenEvent]:
    with patched(module_of_loop(), "runs_ahead", lambda cache: False):
        return list(generate(model, batch, **settings))


def module_of_loop() -> Any:
    from longburn.generation import loop

    return loop


def kept(cache: CacheManager) -> DeviceStep:
    assert isinstance(cache.recorded, DeviceStep)
    return cache.recorded


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("lengths", [(5,), (11, 11), (30, 1, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_bits_of_the_step_without_a_graph(policy: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    """Before, at and after the ring's wrap, from one capture."""
    model, config = llama(POLICIES[policy], dtype), GenerationConfig(max_new_tokens=60)
    caches = [model.init_cache(len(lengths), max_length=128) for _ in range(2)]
    with_graph, bits = stream(model, prompts(*lengths), config=config, cache=caches[0])
    without, wanted = stream(model, prompts(*lengths), config=config, cache=caches[1], graph=False)
    assert with_graph == without
    assert same_bits(bits, wanted)
    assert [kept(cache).captures for cache in caches] == [1, 0]
    assert caches[0].row_positions == caches[1].row_positions == tuple(length + 59 for length in lengths)
    assert all(torch.equal(a.positions, b.positions) for a, b in zip(*caches, strict=True))
    assert len({event.token for event in with_graph}) > 5
    if dtype == torch.float32:
        assert with_graph == on_the_host(model, prompts(*lengths), config=config)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_gpt_oss(experts: Any, rows: int) -> None:
    model = GptOss.from_checkpoint(GOLDEN, experts=experts, device="cuda")
    batch = [[token % model.vocab_size for token in prompt] for prompt in prompts(*[9, 30, 2][:rows])]
    config = GenerationConfig(max_new_tokens=50)
    cache = model.init_cache(rows)
    with_graph, bits = stream(model, batch, config=config, cache=cache)
    without, wanted = stream(model, batch, config=config, graph=False)
    assert with_graph == without
    assert same_bits(bits, wanted)
    assert kept(cache).captures == 1


ENDS: dict[str, dict[str, Any]] = {
    "stop tokens": {"stop_tokens": frozenset(range(0, VOCAB, 11))},
    "stop strings": {"stop_strings": tuple(chr(65 + n) for n in range(3, VOCAB, 13))},
    "length": {},
}


@pytest.mark.parametrize("end", ENDS)
def test_rows_that_end_at_different_times_and_go_on_in_a_second_turn(end: str) -> None:
    model = llama(POLICIES["sinks"])
    config = GenerationConfig(max_new_tokens=40, **ENDS[end])
    results = []
    for run in (lambda *a, **s: stream(model, *a, **s)[0], lambda *a, **s: on_the_host(model, *a, **s)):
        cache, turns = model.init_cache(4), []
        for turn in range(3):
            batch = prompts(*[5 + turn, 3, 20, 9])
            turns.append(run(batch, config=config, cache=cache, tokenizer=SPELLING))
            turns.append(cache.row_positions)
        results.append(turns)
        if len(results) == 1:
            assert kept(cache).captures == 1
    assert results[0] == results[1]
    if end != "length":
        assert len({event.position for event in results[0][0] if event.finish}) > 1


def test_settings_of_every_kind_and_logprobs() -> None:
    model = llama(POLICIES["window"])
    samplers = [
        SamplerConfig(temperature=1.3, top_p=0.9, seed=7, logit_bias={3: 2.0}, banned_tokens=(1, 2)),
        SamplerConfig(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=8),
        SamplerConfig(temperature=0, frequency_penalty=0.4),
        SamplerConfig(temperature=1.5, min_p=0.05, presence_penalty=0.2, seed=9),
    ]
    config = GenerationConfig(max_new_tokens=40, logprobs=4)
    cache = model.init_cache(4)
    got = stream(model, prompts(9, 4, 30, 4), config=config, sampler=samplers, cache=cache)[0]
    wanted = on_the_host(model, prompts(9, 4, 30, 4), config=config, sampler=samplers)
    for a, b in zip(got, wanted, strict=True):
        assert (a.row, a.token, a.position) == (b.row, b.token, b.position)
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
        assert dict(a.top) == pytest.approx(dict(b.top), abs=1e-3)
    assert kept(cache).captures == 1


def test_another_seed_is_no_other_capture() -> None:
    model, config = llama(), GenerationConfig(max_new_tokens=30)
    cache = model.init_cache(1, max_length=64)
    said = []
    for seed in (1, 2, 1):
        cache.reset()
        sampler = SamplerConfig(seed=seed, top_p=0.8)
        said.append([event.token for event in generate(model, prompts(5), config=config, sampler=sampler, cache=cache)])
        assert said[-1] == [e.token for e in on_the_host(model, prompts(5), config=config, sampler=sampler)]
    assert said[0] == said[2] != said[1]
    assert kept(cache).captures == 1


def test_a_growing_cache_is_captured_again_only_when_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOM", 200)
    monkeypatch.setattr(module_of_loop(), "ROOM", 200)
    model, config = llama(), GenerationConfig(max_new_tokens=600)
    cache = model.init_cache(1)
    got = stream(model, prompts(5), config=config, cache=cache)[0]
    assert got == on_the_host(model, prompts(5), config=config)
    assert kept(cache).captures == 2
    again = stream(model, [[3, 4]], config=GenerationConfig(max_new_tokens=20), cache=cache)[0]
    assert kept(cache).captures == 2
    assert [event.position for event in again] == list(range(606, 626))


def test_leaving_and_cancelling() -> None:
    model = llama(POLICIES["relative"])
    for count in (1, 2, 5):
        results = []
        for ahead in (True, False):
            with patched(module_of_loop(), "runs_ahead", (lambda cache: True) if ahead else (lambda cache: False)):
                cache, seen = model.init_cache(2), []
                events = generate(model, prompts(20, 6), cache=cache)
                seen += [next(events) for _ in range(count)]
                events.close()  # type: ignore[attr-defined]
                seen += generate(model, prompts(4, 2), cache=cache, cancelled=lambda c=cache: c.position > 40)
                results.append((seen, cache.row_positions))
        assert results[0] == results[1]


class Peeking(Llama):
    """Reads its tokens with Python, which no graph can hold."""

    def forward_logits(self, tokens: Tensor, cache: CacheManager, **options: bool) -> Tensor:
        return super().forward_logits(tokens, cache, **options) * (1.0 + float(tokens[0, 0]) * 0.01)


def test_what_cannot_be_captured_is_run_as_usual() -> None:
    model, config = llama(POLICIES["window"]), GenerationConfig(max_new_tokens=30)
    model.__class__ = Peeking
    cache = model.init_cache(2)
    got = list(generate(model, prompts(5, 9), config=config, cache=cache))
    assert got == on_the_host(model, prompts(5, 9), config=config)
    assert kept(cache).captures == 0
    assert "captur" in (kept(cache).why_not or "")
    # The device is as well as before.
    model.__class__ = Llama
    assert len(stream(model, prompts(5), config=config)[0]) == 30


def test_a_step_waits_for_nothing_and_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is captured; the one wait is for the token that is read."""
    model = llama(POLICIES["every other"])
    counts: list[int] = []

    def strictly(function: Any) -> Any:
        def run(self: AheadSteps, *args: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(self, *args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])

        return run

    monkeypatch.setattr(AheadSteps, "ahead", strictly(AheadSteps.ahead))
    monkeypatch.setattr(AheadSteps, "go_on", strictly(AheadSteps.go_on))
    sampler = SamplerConfig(temperature=0.9, top_p=0.9, presence_penalty=0.1, seed=1)
    config = GenerationConfig(max_new_tokens=30, logprobs=2)
    list(generate(model, prompts(5, 7), config=config, sampler=sampler))
    assert len(counts) > 50
    assert len(set(counts)) == 1
