"""One reply: text shown as it is made, a bar while a long prompt is read, Ctrl-C, and the figures at the end."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from longburn.cache import CacheManager
    from longburn.generate import GenerationConfig
    from longburn.models import LoadedModel
    from longburn.sampling import SamplerConfig

BAR_AFTER = 1.0  # seconds; a prompt read faster than this needs no bar


@dataclass(frozen=True)
class Stats:
    """The figures of one reply. Prefill ends with the first token; decode is the time from there to the last one."""

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
        """Tokens made per second, the first one (which the prefill made) not counted."""
        return max(self.new_tokens - 1, 0) / self.decode_seconds if self.decode_seconds else 0.0

    def __str__(self) -> str:
        return (
            f"prefill {self.prompt_tokens} tokens at {self.prefill_rate:.1f} tokens/s, "
            f"decode {self.new_tokens} tokens at {self.decode_rate:.1f} tokens/s, "
            f"cache {self.cache_bytes / 2**20:.1f} MiB, position {self.position}"
        )


@dataclass(frozen=True)
class Reply:
    """What came of one prompt. `tokens` leaves out the stop token; `finish` is a `TokenEvent`'s, or "cancelled"."""

    text: str
    tokens: tuple[int, ...]
    finish: str
    stats: Stats


def stream(
    loaded: "LoadedModel",
    prompt: Sequence[int],
    *,
    cache: "CacheManager",
    config: "GenerationConfig",
    sampler: "SamplerConfig",
    show: Callable[[str], None],
) -> Reply:
    """Generates from the token ids `prompt` and passes each piece of text to `show` as it is made.

    The first Ctrl-C ends the reply after the token (or the chunk of the prompt) in work, the second at once.
    """
    from longburn.generate import generate

    pieces: list[str] = []
    tokens: list[int] = []
    finish = "cancelled"
    started = first = last = time.perf_counter()
    with interruptible() as cancelled, prefill_bar() as on_prefill:
        for event in generate(
            loaded.model,
            [prompt],
            config=config,
            sampler=sampler,
            tokenizer=loaded.tokenizer,
            cache=cache,
            on_prefill=on_prefill,
            cancelled=cancelled,
        ):
            last = time.perf_counter()
            first = last if not tokens else first
            finish = event.finish or finish
            if event.text:
                pieces.append(event.text)
                show(event.text)
            tokens.append(event.token)
    stats = Stats(len(prompt), first - started, len(tokens), last - first, cache.nbytes, cache.position)
    said = tokens[:-1] if finish == "stop_token" else tokens
    return Reply("".join(pieces), tuple(said), finish, stats)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the returned function say True; the second one interrupts as usual."""
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


@contextmanager
def progress(label: str, *, unit: str = "tokens") -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (done, total) that moves a bar on stderr, if that is a terminal. It is gone at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Screen:
    """Writes text to stdout as it comes, and a last newline however it ends."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self.open_line = False

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.open_line:
            self("\n")

    def __call__(self, text: str) -> None:
        """Shows `text` at once."""
        if self.silent:
            return
        typer.echo(text, nl=False)
        sys.stdout.flush()
        self.open_line = not text.endswith("\n")


def note(text: str) -> None:
    """A line on stderr, beside the text itself."""
    typer.echo(text, err=True)
