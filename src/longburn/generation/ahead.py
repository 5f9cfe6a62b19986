"""Decoding that runs one step ahead of the host: from token id to token id on the device, as one CUDA graph.

The host never waits for a token before it starts the next step. It reads a token while the device already computes the
one after it, so what it finds in it (the end of a text, a cancellation) it finds one step late. Therefore its clock
follows a step behind: a step is committed when the loop goes on from the token that it was given, and taken back when
it does not. Stop tokens are known on the device, where a row that draws one pauses at once.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from longburn.cache import CacheManager, Step
from longburn.cache.step import Run
from longburn.generation.model import AutoregressiveModel
from longburn.generation.results import Results
from longburn.kernels.registry import chosen
from longburn.sampling import Sampled, Sampler, TokenCounts

ROOM = 4096  # positions that a growing cache is given at a time: when its buffers move, the step is captured again
WARMUPS = 2  # steps before a capture: kernels are compiled and workspaces made in them


def runs_ahead(cache: CacheManager) -> bool:
    """Whether decoding over this cache can run ahead: on CUDA, while the host knows how far the cache is filled."""
    return cache.device.type == "cuda" and cache.takes(cache.upcoming(1))


class AheadSteps:
    """Implements `Steps` on the device of the cache.

    Args:
        step: over this cache.
        logits: `[B, V]`, of the first token.
        positions: of the first token of every row.
        prompts: `[B, T]`, for penalties.
        stop_tokens: they end their row.
        end: no row goes beyond this position.
    """

    def __init__(
        self,
        step: "DeviceStep",
        cache: CacheManager,
        logits: Tensor,
        positions: Sequence[int],
        prompts: Tensor,
        stop_tokens: frozenset[int],
        end: int,
    ) -> None:
        self.positions = list(positions)
        self._cache, self._step, self._stops, self._end = cache, step, stop_tokens, end
        self._live = list(range(len(positions)))
        self._pending: Step | None = None  # begun, and not committed
        self._tokens: list[int] = []  # that the pending step was given, once they were read
        self._room = self._measure()
        cache.part()
        self._make_room()
        first = step.begin(cache, logits, positions, prompts, stop_tokens)
        self._results = Results(first)
        self._results.send(first)

    def ahead(self) -> None:
        self._make_room()
        self._tokens, self._pending = [], self._next(self._live)
        self._results.send(self._step(self._cache))

    def read(self) -> Sampled:
        sampled = self._results.read()
        self._tokens = sampled.tokens.tolist()
        return sampled

    def go_on(self, live: Sequence[int]) -> None:
        if self._moved():
            raise RuntimeError("generate: the cache was rewound, reset or written to while tokens were made over it")
        self._settle(live)
        for row in self._live:
            if row in live:
                self.positions[row] += 1
            else:
                self._step.pause(row)
        self._live = list(live)

    def close(self) -> None:
        if not self._moved():
            self._settle(())

    def _moved(self) -> bool:
        """Whether somebody else has set the clock."""
        at = self._cache.row_positions
        return any(at[row] != self.positions[row] for row in self._live)

    def _settle(self, live: Sequence[int]) -> None:
        """Commit the pending step in these rows, and take back what it wrote in others."""
        step, self._pending = self._pending, None
        if step is None:
            return
        written = [row for row in self._live if not (self._tokens and self._paused(self._tokens[row]))]
        if len(written) < len(self._live):
            step = self._next(written)
        self._cache.wrote(step)
        self._cache.advance(step)
        late = [int(row in written and row not in live) for row in range(self._cache.batch)]
        if any(late):
            self._cache.rewind(late)

    def _paused(self, token: int) -> bool:
        """Whether the device saw that this token ends its row, and wrote it nowhere."""
        return token < 0 or token in self._stops

    def _next(self, rows: Sequence[int]) -> Step:
        """The next step in these rows, as the host knows it."""
        held = set(rows)
        runs = tuple(Run(at, int(row in held)) for row, at in enumerate(self._cache.row_positions))
        return Step(torch.tensor([[at if n else -1] for at, n, _ in runs]), runs, max(run.end for run in runs))

    def _make_room(self) -> None:
        """See to it that the next step fits; whatever else a step needs, it has since the first one."""
        bound = max(self.positions[row] for row in self._live) + 1
        if bound > self._room:
            self._cache.reserve(min(self._end, bound + max(ROOM, bound)))
            self._step.forget()
            self._room = self._measure()

    def _measure(self) -> int:
        """Positions for which the buffers have room."""
        return min((layer.slots for layer in self._cache if layer.ring is None), default=self._end)


class DeviceStep:
    """From the tokens of all rows to their next ones, on one set of buffers: on CUDA one graph.

    It stays with the cache (`CacheManager.recorded`) for later calls over the same buffers, and keeps the model.

    Args:
        model: the model.
        sampler: on the device.
        batch: rows B.
        logprobs: as of `Sampler`.

    Attributes:
        logits: `[B, V]` of the last step.
        captures: how many graphs were captured so far.
        why_not: why none can be, or None.
    """

    logits: Tensor

    def __init__(
        self, model: AutoregressiveModel, sampler: Sampler, *, batch: int, logprobs: int | None, device: torch.device
    ) -> None:
        self.model, self.sampler, self.logprobs, self.device = model, sampler, logprobs, device
        self.captures = 0
        self.why_not: str | None = None
        self._graph: tuple[torch.cuda.CUDAGraph, Sampled] | None = None  # and where it puts what it drew
        self._key: object = None  # what the graph holds for
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.full((batch, 1), -1, dtype=torch.int64, device=device)  # theirs; -1: the row pauses
        self._goes_on = torch.ones(model.vocab_size + 1, dtype=torch.bool, device=device)
        self._counts = TokenCounts.zeros(batch, model.vocab_size, device) if sampler.uses_counts else None

    @classmethod
    def over(
        cls, cache: CacheManager, model: AutoregressiveModel, sampler: Sampler, logprobs: int | None
    ) -> "DeviceStep":
        """The step that the cache keeps, if it is of this model and differs in seeds only; or else a new one."""
        kept = cache.recorded
        if isinstance(kept, cls) and kept.model is model and kept.logprobs == logprobs and kept.sampler.reseed(sampler):
            return kept
        cache.recorded = kept = None  # its memory is free before there is more
        own = Sampler(sampler.configs, batch=cache.batch, vocab_size=model.vocab_size, device=cache.device)
        cache.recorded = step = cls(model, own, batch=cache.batch, logprobs=logprobs, device=cache.device)
        return step

    @torch.no_grad()
    def begin(
        self,
        cache: CacheManager,
        logits: Tensor,
        positions: Sequence[int],
        prompts: Tensor,
        stop_tokens: Collection[int],
    ) -> Sampled:
        """Draw each row's first token from logits `[B, V]`, for these positions, and capture the step if need be."""
        self._goes_on.fill_(True)
        ends = [token for token in stop_tokens if 0 <= token < self.model.vocab_size]
        self._goes_on[torch.tensor([*ends, self.model.vocab_size], device=self.device)] = False
        if self._counts is not None:
            self._counts.clear()
            self._counts.add_prompt(prompts.to(self.device))
        first = self._choose(logits.to(self.device), torch.tensor(list(positions), device=self.device))
        if self._key != self._holds_for(cache):
            self.forget()
        self._prepare(cache)
        return first

    def _holds_for(self, cache: CacheManager) -> object:
        """What a graph depends on, beside the contents of buffers."""
        memory = tuple(tensor.data_ptr() for tensor in cache.memory)
        return chosen(), torch.are_deterministic_algorithms_enabled(), _addresses(self.model), memory

    def forget(self) -> None:
        """Buffers have moved: capture again before the next step."""
        self._graph = self._key = None

    def pause(self, row: int) -> None:
        """The row has ended."""
        self._positions[row].fill_(-1)

    @torch.no_grad()
    def __call__(self, cache: CacheManager) -> Sampled:
        """One step, for which the cache has room. What it returns, on the device, the next step may overwrite."""
        self._prepare(cache)
        if self._graph is None:
            return self._run(cache)
        graph, drawn = self._graph
        graph.replay()
        return drawn

    def _run(self, cache: CacheManager) -> Sampled:
        if self._counts is not None:
            self._counts.add_generated(torch.where(self._positions < 0, -1, self._tokens))
        with cache.fixed_step(self._positions):
            self.logits = self.model.forward_logits(self._tokens, cache, commit=False)
        return self._choose(self.logits, self._positions[:, 0] + 1)

    def _choose(self, logits: Tensor, positions: Tensor) -> Sampled:
        """Draw the tokens for these positions `[B]` (0: the row pauses)."""
        sampled = self.sampler(logits, draw=positions, counts=self._counts, logprobs=self.logprobs)
        tokens = sampled.tokens
        goes_on = (positions > 0) & self._goes_on[tokens]  # token -1 takes the last entry, which is False
        self._tokens.copy_(tokens[:, None])
        self._positions.copy_(torch.where(goes_on, positions, -1)[:, None])
        return sampled

    def _prepare(self, cache: CacheManager) -> None:
        if self._key is None:
            self._key = self._holds_for(cache)
            if self.device.type == "cuda" and self.why_not is None:
                self._capture(cache)

    def _capture(self, cache: CacheManager) -> None:
        changing = [self._tokens, self._positions, *([] if self._counts is None else [self._counts.generated])]
        before = [tensor.clone() for tensor in changing]
        current, aside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        try:
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(WARMUPS):  # they write what the step itself will write
                    self._run(cache)
                    for tensor, value in zip(changing, before, strict=True):
                        tensor.copy_(value)
            current.wait_stream(aside)
            # Other threads may go on with their own work on the device.
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                drawn = self._run(cache)
        except Exception as reason:  # whatever it is, the model can run as usual
            self.why_not = f"{type(reason).__name__}: {reason}"
            torch.cuda.synchronize(self.device)
            for tensor, value in zip(changing, before, strict=True):
                tensor.copy_(value)
        else:
            self._graph = graph, drawn
            self.captures += 1


def _addresses(model: AutoregressiveModel) -> object:
    """Where the parameters are; for a model that does not say, something that is never the same again."""
    if not isinstance(model, nn.Module):
        return object()
    return tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
