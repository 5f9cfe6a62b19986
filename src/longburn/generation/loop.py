"""The generation loop: prompts in, tokens and text out as they are made."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from longburn.cache import CacheManager
from longburn.generation.ahead import ROOM, AheadSteps, DeviceStep, runs_ahead
from longburn.generation.model import AutoregressiveModel
from longburn.generation.steps import HostSteps, Steps
from longburn.generation.stop import TextStream
from longburn.sampling import Sampled, Sampler, SamplerConfig

CHUNKS = {"cpu": 1024, "cuda": 8192}  # prompt tokens per forward call

Finish = Literal["stop_token", "stop_string", "length", "cancelled"]


class GenerationError(RuntimeError):
    """The model gave nothing to choose from."""


class TokenSpeller(Protocol):
    """What the loop needs of a tokenizer: the exact bytes of a token's text."""

    def token_bytes(self, token: int) -> bytes: ...


@dataclass(frozen=True)
class GenerationConfig:
    """How long to generate, and how.

    Args:
        max_new_tokens: per row.
        chunk_size: prompt tokens per forward call; changes memory and speed, never the result. Default None: by where
            the cache is, 1024 on the CPU (from 768 queries on PyTorch's fused attention takes larger blocks, worth 10
            to 20 % of a long prompt's time), 8192 on CUDA.
        stop_tokens: ids that end a row; the last event carries the id, but no text of it.
        stop_strings: texts that end a row, found byte-exactly across token borders; they need a tokenizer.
        logprobs: None for none, n >= 0 for the log-probability of every token and the n most likely ones.
    """

    max_new_tokens: int = 128
    chunk_size: int | None = None
    stop_tokens: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or (self.chunk_size is not None and self.chunk_size < 1):
            raise ValueError(
                f"GenerationConfig: max_new_tokens {self.max_new_tokens}, chunk_size {self.chunk_size}: both at least 1"
            )
        object.__setattr__(self, "stop_tokens", frozenset(self.stop_tokens))


@dataclass(frozen=True)
class TokenEvent:
    """One token of one row, in the order in which they are made.

    Args:
        row: of the batch.
        token: its id; -1 for the last event of a row that was cancelled before its next token.
        position: absolute position of the token in its row.
        text: what this token makes safe to print ("" without a tokenizer): beginnings of stop strings and of unfinished
            characters are held back, and come with a later token or with the last one.
        finish: why the row ends with this event, or None.
        logprob: of the token under the model itself (before temperature and filters), if asked for.
        top: the most likely tokens and their log-probabilities, if asked for.
    """

    row: int
    token: int
    position: int
    text: str = ""
    finish: Finish | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def generate(
    model: AutoregressiveModel,
    prompts: Sequence[Sequence[int]],
    *,
    config: GenerationConfig | None = None,
    sampler: SamplerConfig | Sequence[SamplerConfig] | None = None,
    tokenizer: TokenSpeller | None = None,
    cache: CacheManager | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[TokenEvent]:
    """Continue every prompt, and hand out each token as soon as it is made.

    The prompts may differ in length. The draw of a token depends on its row's seed and on its position alone, so a row
    gives what it would give by itself, and a stream that is resumed over its cache goes on as it would have.

    On CUDA a step is one graph, which stays with the cache, and the device runs one step ahead of the events. Where
    that step was in vain (a stop string, an iterator that is closed), layers with a window can be rewound by one token
    less.

    Args:
        model: the model.
        prompts: token ids of each row; none may be empty.
        config: lengths, stops, log-probabilities.
        sampler: one configuration for all rows, or one for each; default greedy.
        tokenizer: for text and stop strings.
        cache: go on from what it holds (a conversation); default an empty one that is as long as this call needs. When
            the loop ends, every token but each row's last one is in it (after a cancellation that one too). Leave it
            alone while tokens are made.
        on_prefill: called with (prompt tokens read, prompt tokens in all) after each chunk.
        cancelled: asked before every chunk of the prompts and before every token but the first; True ends the rows that
            still run with an event "cancelled".

    Returns:
        An iterator of events. Nothing is computed before the first is asked for; arguments are checked at once.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, too small a cache, stop strings without a
        tokenizer.
        GenerationError: (while iterating) a row's logits leave no candidate.
        RuntimeError: (while iterating, on CUDA) somebody else moved the cache.
    """
    config = config or GenerationConfig()
    rows = [list(prompt) for prompt in prompts]
    _check_prompts(rows, model.vocab_size)
    if config.stop_strings and tokenizer is None:
        raise ValueError("generate: stop_strings are found in text, so they need a tokenizer")
    if cache is None:
        cache = model.init_cache(len(rows), max_length=max(map(len, rows)) + config.max_new_tokens)
    _check_room(rows, cache, config.max_new_tokens)
    sampling = Sampler(sampler or SamplerConfig(temperature=0.0), batch=len(rows), vocab_size=model.vocab_size)
    texts = _Texts(config, tokenizer, [TextStream(config.stop_strings) for _ in rows])
    return _run(model, rows, config, sampling, cache, texts, on_prefill, cancelled or (lambda: False))


def _run(
    model: AutoregressiveModel,
    prompts: list[list[int]],
    config: GenerationConfig,
    sampler: Sampler,
    cache: CacheManager,
    texts: "_Texts",
    on_prefill: Callable[[int, int], None] | None,
    cancelled: Callable[[], bool],
) -> Iterator[TokenEvent]:
    positions = [start + len(prompt) for start, prompt in zip(cache.row_positions, prompts, strict=True)]
    end = max(positions) + config.max_new_tokens - 1
    if cache.device.type == "cuda":  # a step that is captured stays where it is
        cache.reserve(min(end, max(positions) + ROOM))
    logits = _prefill(model, prompts, config.chunk_size or CHUNKS[cache.device.type], cache, on_prefill, cancelled)
    if logits is None:
        yield from (texts.cancel(row, position) for row, position in enumerate(positions))
        return
    live = list(range(len(prompts)))
    with closing(_steps(model, cache, logits, positions, end, _padded(prompts), sampler, config)) as steps:
        for made in range(1, config.max_new_tokens + 1):
            if made > 1 and cancelled():
                yield from (texts.cancel(row, steps.positions[row]) for row in live)
                return
            last = made == config.max_new_tokens
            if not last:
                steps.ahead()
            sampled = steps.read()
            tokens = sampled.tokens.tolist()
            for row in list(live):
                event = texts.event(row, tokens[row], steps.positions[row], sampled, last=last)
                if event.finish is not None:
                    live.remove(row)
                yield event
            if not live:
                return
            steps.go_on(live)


def _steps(
    model: AutoregressiveModel,
    cache: CacheManager,
    logits: Tensor,
    positions: list[int],
    end: int,
    prompts: Tensor,
    sampler: Sampler,
    config: GenerationConfig,
) -> Steps:
    """On a device that can run ahead, from there; else from the host."""
    if config.max_new_tokens > 1 and runs_ahead(cache):
        step = DeviceStep.over(cache, model, sampler, config.logprobs)
        if step.why_not is None:
            ahead = AheadSteps(step, cache, logits, positions, prompts, config.stop_tokens, end)
            if step.why_not is None:
                return ahead
    return HostSteps(model, cache, logits, positions, prompts, sampler, config.logprobs)


def _prefill(
    model: AutoregressiveModel,
    prompts: list[list[int]],
    chunk_size: int,
    cache: CacheManager,
    on_prefill: Callable[[int, int], None] | None,
    cancelled: Callable[[], bool],
) -> Tensor | None:
    """Logits after each row's prompt, `[B, V]`, or None if it was cancelled (what was read by then is in the cache)."""
    tokens = _padded(prompts)
    total, final = sum(map(len, prompts)), None
    for start in range(0, tokens.shape[1], chunk_size):
        if cancelled():
            return None
        chunk = tokens[:, start : start + chunk_size]
        with torch.no_grad():
            logits = model.forward_logits(chunk, cache)
        ends = [start < len(prompt) <= start + chunk_size for prompt in prompts]
        if all(ends):
            final = logits
        else:
            final = logits.clone() if final is None else final
            rows = [row for row, end in enumerate(ends) if end]
            final[rows] = logits[rows]
        if on_prefill is not None:
            if logits.is_cuda:  # what is told was done
                torch.cuda.synchronize(logits.device)
            on_prefill(int((tokens[:, : start + chunk_size] >= 0).sum()), total)
    return final


class _Texts:
    """The text and the end of every row."""

    def __init__(self, config: GenerationConfig, tokenizer: TokenSpeller | None, texts: list[TextStream]) -> None:
        self.config, self.tokenizer, self.texts = config, tokenizer, texts

    def event(self, row: int, token: int, position: int, sampled: Sampled, *, last: bool) -> TokenEvent:
        if token < 0:
            raise GenerationError(
                f"generate: row {row}, position {position}: no logit is finite or allowed; "
                "the weights may hold NaN, or every token is banned"
            )
        text, finish = self._text(row, token, last)
        logprob = None if sampled.logprobs is None else float(sampled.logprobs[row])
        top: tuple[tuple[int, float], ...] = ()
        if sampled.top_tokens is not None and sampled.top_logprobs is not None:
            top = tuple(zip(sampled.top_tokens[row].tolist(), sampled.top_logprobs[row].tolist(), strict=True))
        return TokenEvent(row, token, position, text, finish, logprob, top)

    def cancel(self, row: int, position: int) -> TokenEvent:
        return TokenEvent(row, -1, position, self.texts[row].flush(), "cancelled")

    def _text(self, row: int, token: int, last: bool) -> tuple[str, Finish | None]:
        stream = self.texts[row]
        if token in self.config.stop_tokens:
            return stream.flush(), "stop_token"
        text = "" if self.tokenizer is None else stream.feed(self.tokenizer.token_bytes(token))
        if stream.stop is not None:
            return text, "stop_string"
        return (text + stream.flush(), "length") if last else (text, None)


def _check_prompts(prompts: list[list[int]], vocab_size: int) -> None:
    if not prompts:
        raise ValueError("generate: no prompts; give at least one row of token ids")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"generate: the prompt of row {row} is empty; give at least one token (such as bos)")
        wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise ValueError(f"generate: row {row} holds token {wrong}, outside the vocabulary of {vocab_size} ids")


def _check_room(prompts: list[list[int]], cache: CacheManager, new: int) -> None:
    if cache.batch != len(prompts):
        raise ValueError(f"generate: {len(prompts)} prompts for a cache of {cache.batch} rows")
    for row, (start, prompt) in enumerate(zip(cache.row_positions, prompts, strict=True)):
        need = start + len(prompt) + new - 1
        if cache.max_length is not None and need > cache.max_length:
            raise ValueError(
                f"generate: row {row} needs {need} positions ({start} held, {len(prompt)} of the prompt, {new} new), "
                f"the cache has max_length {cache.max_length}; shorten one of them, or use a cache without max_length"
            )


def _padded(prompts: list[list[int]]) -> Tensor:
    """The prompts as one `[B, T]`, with -1 where a row has ended."""
    longest = max(map(len, prompts))
    return torch.tensor([prompt + [-1] * (longest - len(prompt)) for prompt in prompts])
