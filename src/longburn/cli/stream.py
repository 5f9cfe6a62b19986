"""One reply: made token by token, interruptible, with a bar while a long prompt is read and the figures at the end."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from longburn.cli.display import progress
from longburn.cli.reading import Piece, Reading, Spoken

if TYPE_CHECKING:
    from longburn.cache import CacheManager
    from longburn.generation import GenerationConfig, TokenEvent
    from longburn.models import LoadedModel
    from longburn.sampling import SamplerConfig

BAR_AFTER = 1.0  # seconds; a prompt read faster than this needs no bar


@dataclass(frozen=True)
class Stats:
    """The figures of one reply. Decode is the time from the first token, which the prefill made, to the last one."""

    prompt_tokens: int
    prefill_seconds: float
    new_tokens: int
    decode_seconds: float
    cache_bytes: int
    position: int

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt read per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens made per second after the first one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    def __str__(self) -> str:
        return (
            f"prefill {self.prompt_tokens} tokens at {self.prefill_rate:.1f} tokens/s, "
            f"decode {self.new_tokens} tokens at {self.decode_rate:.1f} tokens/s, "
            f"cache {self.cache_bytes / 2**20:.1f} MiB, position {self.position}"
        )


@dataclass(frozen=True)
class Reply:
    """What came of one prompt. `text` is the answer alone, `messages` are all that the model said in a format that has
    them; `tokens` leaves out the stop token that ended it."""

    text: str
    messages: tuple[Spoken, ...]
    tokens: tuple[int, ...]
    finish: str
    stats: Stats


@dataclass(frozen=True)
class Stream:
    """A model with the cache of one stream, and how tokens are chosen."""

    loaded: "LoadedModel"
    cache: "CacheManager"
    config: "GenerationConfig"
    sampler: "SamplerConfig"
    impl: str

    def reply(self, prompt: Sequence[int], reading: Reading, show: Callable[[Piece], None]) -> Reply:
        """Goes on with the token ids `prompt` after what the cache holds; each piece of text goes to `show` at once.

        The first Ctrl-C ends the reply after the token (or chunk of the prompt) in work, the second one at once.
        """
        from longburn.generation import generate
        from longburn.kernels.registry import use_impl

        events: list[TokenEvent] = []
        texts: list[str] = []
        times: list[float] = []
        started = read_at = time.perf_counter()
        read = 0

        def on_prefill(done: int, total: int) -> None:
            nonlocal read, read_at
            read, read_at = done, time.perf_counter()
            bar(done, total)

        with interruptible() as cancelled, prefill_bar() as bar, use_impl(self.impl):
            for event in generate(
                self.loaded.model,
                [prompt],
                config=reading.config,
                sampler=self.sampler,
                tokenizer=reading.speller,
                cache=self.cache,
                on_prefill=on_prefill,
                cancelled=cancelled,
            ):
                events.append(event)
                if event.token >= 0:
                    times.append(time.perf_counter())
                for piece in reading.take(event):
                    texts += [piece.text] if piece.label is None else []
                    show(piece)
                if reading.stopped:
                    break
        return Reply(
            text="".join(texts),
            messages=tuple(reading.spoken),
            tokens=tuple(event.token for event in events if event.token >= 0 and event.finish != "stop_token"),
            finish=events[-1].finish or "stop_string",
            stats=Stats(
                prompt_tokens=read,
                prefill_seconds=read_at - started,
                new_tokens=len(times),
                decode_seconds=times[-1] - times[0] if times else 0.0,
                cache_bytes=self.cache.nbytes,
                position=self.cache.position,
            ),
        )


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the function it yields say True; the second one interrupts as usual."""
    interrupted = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def prefill_bar() -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (done, total) that shows a progress bar once reading the prompt has taken a while."""
    started = time.perf_counter()
    with ExitStack() as shown:
        advance: Callable[[int, int], None] | None = None

        def on_prefill(done: int, total: int) -> None:
            nonlocal advance
            if done >= total:
                shown.close()  # before the first token appears
            elif advance is not None:
                advance(done, total)
            elif time.perf_counter() - started >= BAR_AFTER:
                advance = shown.enter_context(progress("reading the prompt"))
                advance(done, total)

        yield on_prefill
