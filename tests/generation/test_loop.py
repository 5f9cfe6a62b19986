"""The generation loop: a random Llama for what depends on attention, a scripted model for everything about events."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from longburn import AttnWindow, CacheManager, RotaryEncoding, WindowPolicy
from longburn.generation import (
    AutoregressiveModel,
    GenerationConfig,
    GenerationError,
    TokenEvent,
    check_tokens,
    generate,
)
from longburn.models.llama import Llama, LlamaConfig
from longburn.sampling import SamplerConfig

VOCAB = 97


@pytest.fixture(params=["host", "ahead"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tokens made step by step on the host, and a step ahead of it, as on CUDA (the same code, without a graph)."""
    if request.param == "ahead":
        monkeypatch.setattr("longburn.generation.loop.runs_ahead", lambda cache: True)
    return request.param


def llama(window: AttnWindow | None = None) -> Llama:
    """Random weights, wide enough that greedy text wanders, in fp64 so that no tie depends on the shape of a call."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=128,
        rope=RotaryEncoding(6),
    )
    model = Llama(config, policy=WindowPolicy.uniform(window or AttnWindow()), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4)
    return model.eval()


def prompts(*lengths: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=g).tolist() for n in lengths]


def tokens_of(events: Sequence[TokenEvent], row: int = 0) -> list[int]:
    return [event.token for event in events if event.row == row]


@pytest.fixture(
    scope="module",
    params=[None, AttnWindow(9, sink_tokens=2), AttnWindow(9, sink_tokens=2, relative_sinks=True)],
    ids=str,
)
def model(request: pytest.FixtureRequest) -> Llama:
    return llama(request.param)


# --- the same tokens, however it is done -----------------------------------------------------------------------------


def naive(model: Llama, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: the whole text again for every token."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


def test_greedy_equals_decoding_without_a_cache(model: Llama) -> None:
    (prompt,) = prompts(30)
    wanted = naive(model, prompt, 25)
    assert len(set(wanted)) > 5  # text that wanders: a constant would prove little
    assert tokens_of(list(generate(model, [prompt], config=GenerationConfig(max_new_tokens=25)))) == wanted


def test_a_batch_of_ragged_prompts_equals_each_alone(model: Llama) -> None:
    config = GenerationConfig(max_new_tokens=20, chunk_size=6)
    batch = prompts(31, 1, 13, 6)
    events = list(generate(model, batch, config=config))
    for row, prompt in enumerate(batch):
        own = [event for event in events if event.row == row]
        assert tokens_of(events, row) == tokens_of(list(generate(model, [prompt], config=config)))
        assert [event.position for event in own] == [*range(len(prompt), len(prompt) + 20)]
        assert [event.finish for event in own] == [None] * 19 + ["length"]


def test_chunk_sizes_change_nothing(model: Llama) -> None:
    batch = prompts(70, 20)
    config = [GenerationConfig(max_new_tokens=5, chunk_size=size) for size in (1, 7, 64, 511)]
    runs = [[(e.row, e.token, e.position) for e in generate(model, batch, config=one)] for one in config]
    assert runs[0] == runs[1] == runs[2] == runs[3]


def test_sampled_rows_draw_what_they_would_draw_alone(model: Llama) -> None:
    batch = prompts(15, 4, 15)
    samplers = [
        SamplerConfig(temperature=1.3, seed=7),
        SamplerConfig(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=8),
        SamplerConfig(temperature=1.0, min_p=0.02, seed=7),
    ]
    config = GenerationConfig(max_new_tokens=20)
    together = list(generate(model, batch, config=config, sampler=samplers))
    for row, (prompt, sampler) in enumerate(zip(batch, samplers, strict=True)):
        alone = list(generate(model, [prompt], config=config, sampler=sampler))
        assert tokens_of(together, row) == tokens_of(alone)
    other = list(generate(model, batch[:1], config=config, sampler=SamplerConfig(temperature=1.3, seed=9)))
    assert tokens_of(other) != tokens_of(together, 0)


@pytest.mark.parametrize(
    "sampler", [SamplerConfig(temperature=0), SamplerConfig(temperature=1.2, top_k=30, seed=3)], ids=str
)
def test_a_stream_resumed_over_its_cache_goes_on_as_it_would_have(model: Llama, sampler: SamplerConfig) -> None:
    (prompt,) = prompts(14)
    whole = tokens_of(list(generate(model, [prompt], config=GenerationConfig(max_new_tokens=30), sampler=sampler)))
    cache, said, unread = model.init_cache(1), [], prompt
    for count in (1, 9, 20):
        config = GenerationConfig(max_new_tokens=count, chunk_size=5)
        events = list(generate(model, [unread], config=config, sampler=sampler, cache=cache))
        said += tokens_of(events)
        assert cache.position == len(prompt) + len(said) - 1  # all but the last token
        assert events[-1].position == cache.position
        unread = said[-1:]
    assert said == whole


def test_a_conversation_over_one_cache_equals_the_text_read_at_once(model: Llama) -> None:
    turns = prompts(9, 5)
    cache = model.init_cache(1)
    first = tokens_of(list(generate(model, [turns[0]], config=GenerationConfig(max_new_tokens=6), cache=cache)))
    config = GenerationConfig(max_new_tokens=8)
    second = tokens_of(list(generate(model, [first[-1:] + turns[1]], config=config, cache=cache)))
    assert second == tokens_of(list(generate(model, [turns[0] + first + turns[1]], config=config)))


def test_logprobs_are_those_of_the_model_before_any_setting(model: Llama) -> None:
    (prompt,) = prompts(11)
    sampler = SamplerConfig(temperature=2.0, top_k=4, logit_bias={3: 5.0}, seed=1)
    events = list(generate(model, [prompt], config=GenerationConfig(max_new_tokens=9, logprobs=3), sampler=sampler))
    text = prompt + tokens_of(events)
    with torch.no_grad():
        wanted = model(torch.tensor([text]))[0].log_softmax(-1)[len(prompt) - 1 : -1]
    for event, row in zip(events, wanted, strict=True):
        assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-5)
        best = row.topk(3)
        assert [token for token, _ in event.top] == best.indices.tolist()
        assert [value for _, value in event.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    (only,) = generate(model, [prompt], config=GenerationConfig(max_new_tokens=1, logprobs=0))
    assert (only.logprob is not None, only.top) == (True, ())
    (without,) = generate(model, [prompt], config=GenerationConfig(max_new_tokens=1))
    assert (without.logprob, without.top) == (None, ())


# --- a scripted model ------------------------------------------------------------------------------------------------


class Spelling:
    """Token n spells `spelling[n]`."""

    def __init__(self, *pieces: str | bytes) -> None:
        self.bytes = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]

    def token_bytes(self, token: int) -> bytes:
        return self.bytes[token]


@dataclass
class Script:
    """Says `lines[row]`, whatever the prompt: the token for each position after it. Counts its calls."""

    lines: list[list[int]]
    prompt: int = 3  # length of every prompt
    vocab_size: int = VOCAB
    calls: list[Tensor] = field(default_factory=list)

    def init_cache(self, batch: int, *, max_length: int | None = None) -> CacheManager:
        return CacheManager(batch, [AttnWindow()], kv_heads=1, head_dim=1, max_length=max_length)

    def forward_logits(
        self, tokens: Tensor, cache: CacheManager, *, all_positions: bool = False, commit: bool = True
    ) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls.append(tokens.clone())
        step = cache.positions(tokens)
        keys = step.positions.expand(len(self.lines), -1)[:, None, :, None].float()
        cache[0].update(keys, -keys, step)
        if commit:
            cache.advance(step)
        logits = torch.zeros(len(self.lines), self.vocab_size)
        ends = step.positions.amax(1).expand(len(self.lines)).tolist()
        for row, (line, end) in enumerate(zip(self.lines, ends, strict=True)):
            said = end + 1 - self.prompt
            if 0 <= said < len(line):
                logits[row, line[said]] = 9.0
        return logits


def run(script: Script, *, rows: int = 1, **settings) -> list[TokenEvent]:
    settings.setdefault("config", GenerationConfig(max_new_tokens=8))
    return list(generate(script, [[1] * script.prompt] * rows, **settings))


def test_the_scripted_model_and_llama_are_autoregressive_models() -> None:
    assert isinstance(Script([[1]]), AutoregressiveModel)
    assert isinstance(llama(), AutoregressiveModel)


def test_a_stop_token_ends_its_row_and_no_other(way: str) -> None:
    script = Script([[5, 6, 7, 8, 9], [6, 5, 5, 5, 5], [1, 2, 3, 4, 5]])
    events = run(script, rows=3, config=GenerationConfig(max_new_tokens=5, stop_tokens=frozenset({7, 6})))
    assert [(e.token, e.finish) for e in events if e.row == 0] == [(5, None), (6, "stop_token")]
    assert [(e.token, e.finish) for e in events if e.row == 1] == [(6, "stop_token")]
    assert tokens_of(events, 2) == [1, 2, 3, 4, 5]
    # a row that has ended is fed no token, the others go on
    if way == "host":
        assert [call[:, 0].tolist() for call in script.calls[1:]] == [[5, -1, 1], [-1, -1, 2], [-1, -1, 3], [-1, -1, 4]]


def test_nothing_is_computed_after_the_last_row_has_ended(way: str) -> None:
    script = Script([[5, 6], [5, 6]])
    run(script, rows=2, config=GenerationConfig(max_new_tokens=50, stop_tokens={6}))
    assert len(script.calls) == {"host": 2, "ahead": 3}[way]  # that they have ended is read one step late
    script = Script([[5, 6, 7]])
    run(script, config=GenerationConfig(max_new_tokens=3))
    assert len(script.calls) == 3  # the prompt and two tokens: the third is not read


def test_a_stop_token_has_no_text_and_lets_out_what_was_held_back() -> None:
    spelling = Spelling("", "wai", "</", "s>", "<end>")
    config = GenerationConfig(max_new_tokens=9, stop_tokens={4}, stop_strings=("</s>",))
    events = run(Script([[1, 2, 4]]), config=config, tokenizer=spelling)
    assert [event.text for event in events] == ["wai", "", "</"]
    assert events[-1].finish == "stop_token"


@pytest.mark.parametrize(
    ("pieces", "stop", "texts"),
    [
        (["Hello", " wor", "ld", "!"], "o w", ["Hell", ""]),
        (["a", "\n\nHu", "man: x", "y"], "\n\nHuman:", ["a", "", ""]),
        ([b"\xe6\x97", b"\xa5\xe6", b"\x9c\xac", b"\xe8\xaa\x9e"], "本", ["", "日", ""]),
        ([b"caf\xc3", b"\xa9 \xf0\x9f\x99", b"\x82.", b"x"], "🙂", ["caf", "é ", ""]),
        (["aa", "ab", "c"], "aab", ["", "a"]),
    ],
)
def test_stop_strings_are_found_across_tokens_and_bytes(pieces: list, stop: str, texts: list[str]) -> None:
    script = Script([[*range(len(pieces))]])
    config = GenerationConfig(max_new_tokens=len(pieces), stop_strings=("never said", stop))
    events = run(script, config=config, tokenizer=Spelling(*pieces))
    assert [event.text for event in events] == texts
    assert [event.finish for event in events] == [None] * (len(texts) - 1) + ["stop_string"]


def test_unfinished_characters_wait_for_their_last_byte() -> None:
    whole = "naïve 日本語 🙂"
    pieces = [bytes([byte]) for byte in whole.encode()]
    script = Script([[*range(len(pieces))]])
    events = run(script, config=GenerationConfig(max_new_tokens=len(pieces)), tokenizer=Spelling(*pieces))
    assert "".join(event.text for event in events) == whole
    assert all("�" not in event.text for event in events)


def test_the_last_event_brings_what_was_held_back() -> None:
    spelling = Spelling("ab", "c<", b"\xf0\x9f")
    config = GenerationConfig(max_new_tokens=3, stop_strings=("<stop>",))
    events = run(Script([[0, 1, 2]]), config=config, tokenizer=spelling)
    assert [(event.text, event.finish) for event in events] == [("ab", None), ("c", None), ("<�", "length")]


def test_rows_have_texts_and_stops_of_their_own() -> None:
    spelling = Spelling("x", "st", "op", "y")
    config = GenerationConfig(max_new_tokens=4, stop_strings=("stop",))
    events = run(Script([[1, 0, 2, 3], [0, 1, 2, 3]]), rows=2, config=config, tokenizer=spelling)
    assert "".join(e.text for e in events if e.row == 0) == "stxopy"
    assert "".join(e.text for e in events if e.row == 1) == "x"
    assert [e.finish for e in events if e.finish] == ["stop_string", "length"]


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert [event.text for event in run(Script([[1, 2]]), config=GenerationConfig(max_new_tokens=2))] == ["", ""]


def test_penalties_count_the_prompt_and_what_was_generated() -> None:
    """The script wants the same token for ever; a penalty on what was generated makes the loop take others."""
    script = Script([[5] * 8])
    free = run(script, config=GenerationConfig(max_new_tokens=4))
    assert tokens_of(free) == [5, 5, 5, 5]
    script = Script([[5] * 8])
    punished = run(
        script, config=GenerationConfig(max_new_tokens=4), sampler=SamplerConfig(temperature=0, presence_penalty=20.0)
    )
    assert tokens_of(punished) == [5, 0, 1, 2]
    script = Script([[1] * 8])  # the prompts are made of token 1
    repeated = run(
        script,
        config=GenerationConfig(max_new_tokens=1),
        sampler=SamplerConfig(temperature=0, repetition_penalty=1e9, logit_bias={4: 1.0}),
    )
    assert tokens_of(repeated) == [4]


# --- progress and cancellation ---------------------------------------------------------------------------------------


def test_progress_counts_the_tokens_that_were_read() -> None:
    script = Script([[5], [5]], prompt=0)
    seen: list[tuple[int, int]] = []
    batch = [[1] * 10, [1] * 4]
    config = GenerationConfig(max_new_tokens=1, chunk_size=3)
    list(generate(script, batch, config=config, on_prefill=lambda *at: seen.append(at)))
    assert seen == [(6, 14), (10, 14), (13, 14), (14, 14)]
    assert [call.shape[1] for call in script.calls] == [3, 3, 3, 1]


class After:
    """Says True from the n-th question on."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_cancellation_while_the_prompt_is_read() -> None:
    script = Script([[5], [5]], prompt=10)
    cache = script.init_cache(2)
    events = run(
        script, rows=2, config=GenerationConfig(chunk_size=4), cache=cache, cancelled=After(2), tokenizer=Spelling("")
    )
    assert [(e.row, e.token, e.position, e.text, e.finish) for e in events] == [
        (0, -1, 10, "", "cancelled"),
        (1, -1, 10, "", "cancelled"),
    ]
    assert len(script.calls) == 2
    assert cache.row_positions == (8, 8)  # what was read by then


def test_cancellation_while_tokens_are_made() -> None:
    script = Script([[5, 6, 7, 8], [4, 9, 9, 9]])
    spelling = Spelling(*["?"] * 4, "stop", "<", "x<", "y", "z", "end")
    cancel: list[bool] = []
    config = GenerationConfig(max_new_tokens=9, stop_tokens={4}, stop_strings=("<!>",))
    stream = generate(script, [[1] * 3] * 2, config=config, tokenizer=spelling, cancelled=lambda: bool(cancel))
    got = []
    for event in stream:
        got.append((event.row, event.token, event.text, event.finish))
        if event.token == 6:
            cancel.append(True)
    # row 1 had ended; row 0 gives what it held back
    assert got == [(0, 5, "", None), (1, 4, "", "stop_token"), (0, 6, "<x", None), (0, -1, "<", "cancelled")]
    assert len(script.calls) <= 3


def test_nothing_happens_before_the_first_event_is_asked_for(way: str) -> None:
    script = Script([[5, 6, 7]])
    stream = generate(script, [[1] * 3])
    assert isinstance(stream, Iterator)
    assert script.calls == []
    assert next(stream).token == 5
    assert len(script.calls) == {"host": 1, "ahead": 2}[way]  # each token as soon as it is there
    stream.close()  # type: ignore[attr-defined]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ([], {}, r"no prompts; give at least one row"),
        ([[1], []], {}, r"the prompt of row 1 is empty; give at least one token"),
        ([[1], [2, VOCAB]], {}, rf"row 1 holds token {VOCAB}, outside the vocabulary of {VOCAB} ids"),
        ([[-1]], {}, r"row 0 holds token -1, outside the vocabulary"),
        (
            [[1]],
            {"config": GenerationConfig(stop_strings=("x",))},
            r"stop_strings are found in text, so they need a tokenizer",
        ),
        ([[1], [1]], {"sampler": [SamplerConfig()]}, r"1 configurations for 2 rows"),
        ([[1]], {"sampler": SamplerConfig(banned_tokens=(VOCAB,))}, rf"banned_tokens has ids \[{VOCAB}\]"),
    ],
)
def test_bad_arguments_are_refused_at_once(given: list[list[int]], settings: dict, message: str) -> None:
    script = Script([[1]])
    with pytest.raises(ValueError, match=message):
        generate(script, given, **settings)  # not iterated
    assert script.calls == []


def test_a_cache_that_is_too_small_says_what_is_needed() -> None:
    script = Script([[1]])
    cache = script.init_cache(1, max_length=10)
    with pytest.raises(
        ValueError, match=r"row 0 needs 12 positions \(0 held, 5 of the prompt, 8 new\), .*max_length 10"
    ):
        generate(script, [[1] * 5], config=GenerationConfig(max_new_tokens=8), cache=cache)
    list(
        generate(script, [[1] * 5], config=GenerationConfig(max_new_tokens=6), cache=cache)
    )  # 5 + 6 - 1: the last is not read
    assert cache.position == 10
    with pytest.raises(ValueError, match=r"row 0 needs 11 positions \(10 held, 1 of the prompt, 1 new\)"):
        generate(script, [[1]], config=GenerationConfig(max_new_tokens=1), cache=cache)
    with pytest.raises(ValueError, match="2 prompts for a cache of 1 rows"):
        generate(script, [[1], [1]], cache=cache)


@pytest.mark.parametrize(
    ("settings", "part"), [({"max_new_tokens": 0}, "max_new_tokens 0"), ({"chunk_size": 0}, "chunk_size 0")]
)
def test_a_configuration_that_cannot_be(settings: dict, part: str) -> None:
    with pytest.raises(ValueError, match=f"GenerationConfig: .*{part}"):
        GenerationConfig(**settings)


def test_a_stop_string_given_bare_is_refused() -> None:
    """`stop_strings="stop"` would otherwise stop at the first s, t, o or p."""
    with pytest.raises((TypeError, ValueError), match="several strings"):
        run(Script([[1]]), config=GenerationConfig(stop_strings="stop"), tokenizer=Spelling("a"))  # type: ignore[arg-type]


def test_weights_of_nan_end_the_stream_with_a_clear_error() -> None:
    model = llama()
    with torch.no_grad():
        model.layers[1].mlp.down.weight[3, 3] = math.nan
    stream = generate(model, prompts(5, 3))
    with pytest.raises(
        GenerationError, match=r"row 0, position 5: no logit is finite or allowed; the weights may hold NaN"
    ):
        next(stream)


def test_every_token_banned_ends_the_stream_too() -> None:
    script = Script([[1]], vocab_size=4)
    with pytest.raises(GenerationError, match="every token is banned"):
        run(script, sampler=SamplerConfig(banned_tokens=(0, 1, 2, 3)))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"got torch.int64 of shape \(3,\), wanted int64 \[B, T\]"),
        (torch.zeros(1, 0, dtype=torch.int64), r"shape \(1, 0\)"),
        (torch.zeros(1, 3), r"torch.float32"),
        (torch.tensor([[0, 1], [2, 99]]), r"id 99 at row 1, column 1 is outside the vocabulary of 50 ids"),
        (torch.tensor([[0, -2]]), r"id -2 at row 0, column 1"),
    ],
)
def test_tokens_are_checked(tokens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tokens(tokens, 50)
    check_tokens(torch.tensor([[-1, 0, 49]]), 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_many_rows_keeps_its_clocks(dtype: torch.dtype) -> None:
    """Rows that end at different times leave positions behind that a next turn goes on from."""
    model = llama().to(dtype)
    cache = model.init_cache(4)
    config = GenerationConfig(max_new_tokens=6, chunk_size=4)
    batch = prompts(3, 9, 5, 1)
    list(generate(model, batch, config=config, cache=cache))
    assert cache.row_positions == tuple(len(prompt) + 5 for prompt in batch)
    list(generate(model, prompts(1, 2, 3, 4), config=config, cache=cache))
    assert cache.row_positions == tuple(len(a) + n + 10 for a, n in zip(batch, (1, 2, 3, 4), strict=True))
