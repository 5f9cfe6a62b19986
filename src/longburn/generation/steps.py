"""How the loop gets its tokens: step by step on the host, or (`generation/ahead.py`) from a device that runs ahead."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from longburn.cache import CacheManager
from longburn.generation.graph import DecodeStep
from longburn.generation.model import AutoregressiveModel
from longburn.sampling import Sampled, Sampler, TokenCounts


class Steps(Protocol):
    """The tokens of all rows, one after the other: `ahead` (if more are wanted than this one), `read`, `go_on`, again.

    Attributes:
        positions: of every row's next token.
    """

    positions: list[int]

    def ahead(self) -> None:
        """Begin, if that is possible, the step after the token that is read next."""
        ...

    def read(self) -> Sampled:
        """The next token of every row, on the host. Rows that have ended hold any number."""
        ...

    def go_on(self, live: Sequence[int]) -> None:
        """Put the token that was read last into the cache of these rows, in order; the others have ended."""
        ...

    def close(self) -> None:
        """No more tokens: leave the cache as `go_on` left it."""
        ...


class HostSteps:
    """Samples on the host; a step begins when its tokens were read, because the loop reads them anyway.

    Args:
        logits: `[B, V]`, of the first token.
        positions: of the first token of every row.
        prompts: for penalties.
        sampler: on the CPU.
        logprobs: as of `Sampler`.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        cache: CacheManager,
        logits: Tensor,
        positions: Sequence[int],
        prompts: Tensor,
        sampler: Sampler,
        logprobs: int | None,
    ) -> None:
        self.positions = list(positions)
        self._step, self._logits, self._sampler, self._logprobs = DecodeStep(model, cache), logits, sampler, logprobs
        self._counts = TokenCounts.zeros(*logits.shape) if sampler.uses_counts else None
        if self._counts is not None:
            self._counts.add_prompt(prompts)

    def ahead(self) -> None:
        pass

    def read(self) -> Sampled:
        draw = torch.tensor(self.positions)
        self._read = self._sampler(self._logits.cpu(), draw=draw, counts=self._counts, logprobs=self._logprobs)
        return self._read

    def go_on(self, live: Sequence[int]) -> None:
        tokens = torch.full((len(self.positions), 1), -1)
        for row in live:
            tokens[row] = self._read.tokens[row]
            self.positions[row] += 1
        if self._counts is not None:
            self._counts.add_generated(tokens)
        self._logits = self._step(tokens)

    def close(self) -> None:
        pass
