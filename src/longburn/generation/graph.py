"""The decode step, recorded once and then run without Python where all of its operations allow it."""

from collections.abc import Hashable

import torch
from torch import Tensor

from longburn.cache import CacheManager, Step
from longburn.generation.model import AutoregressiveModel, check_tokens
from longburn.kernels.native.tape import Tape, Unrecordable
from longburn.kernels.registry import chosen


class DecodeStep:
    """`forward_logits` of one token a row, as fast as the machine allows; the same bits.

    The first step is recorded (`kernels/native/tape.py`), the second one run both ways. Only if both give the same bits
    are the further ones run from the tape: what a model does with Python's numbers in between, a tape does not see.
    Whatever cannot be recorded, or does not fit the tape (a row that pauses, a cache that has to grow), goes through
    the model.

    Args:
        model: the model. Its parameters must stay where they are.
        cache: the cache of all its steps.
    """

    def __init__(self, model: AutoregressiveModel, cache: CacheManager) -> None:
        self.model, self.cache = model, cache
        self.tape: Tape | None = None
        self.why_not: str | None = None  # why steps are not run from a tape
        self._proven = False
        self._key: Hashable = None
        self._tokens = torch.zeros(cache.batch, 1, dtype=torch.int64)
        self._positions = torch.zeros(0, 1, dtype=torch.int64)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits `[B, V]` after the tokens `[B, 1]` (-1: the row pauses), at the cache's next positions, committed.

        Raises:
            ValueError: as `forward_logits`.
        """
        check_tokens(tokens, self.model.vocab_size)
        if self.why_not is not None or not tokens.is_cpu or bool((tokens < 0).any()):
            return self.model.forward_logits(tokens, self.cache)
        step = self.cache.positions(tokens)
        if step.positions.device.type != "cpu" or not self.cache.takes(step):
            return self.model.forward_logits(tokens, self.cache)
        key = (chosen(), step.positions.shape[0], *(tensor.data_ptr() for tensor in self.cache.memory))
        if self.tape is None or key != self._key:
            self._key, self._proven = key, False
            return self._record(tokens, step)
        logits = self._run(self.tape, tokens, step)
        if not self._proven:
            self._prove(tokens, logits)
        self.cache.wrote(step)
        self.cache.advance(step)
        return logits

    def _run(self, tape: Tape, tokens: Tensor, step: Step) -> Tensor:
        self._tokens.copy_(tokens)
        self._positions.copy_(step.positions)
        return tape.run().clone()

    def _record(self, tokens: Tensor, step: Step) -> Tensor:
        self._tokens.copy_(tokens)
        self._positions = step.positions.clone()
        inputs = [self._tokens, self._positions, *self.cache.memory]
        try:
            with self.cache.fixed_step(self._positions):
                self.tape = Tape(lambda: self.model.forward_logits(self._tokens, self.cache, commit=False), inputs)
        except Unrecordable as reason:
            self.why_not = str(reason)
            return self.model.forward_logits(tokens, self.cache)
        self.cache.wrote(step)
        self.cache.advance(step)
        return self.tape.result.clone()

    def _prove(self, tokens: Tensor, logits: Tensor) -> None:
        wanted = self.model.forward_logits(tokens, self.cache, commit=False)
        self._proven = torch.equal(logits.nan_to_num(), wanted.nan_to_num())
        if not self._proven:
            self.tape, self.why_not = None, "the recorded step gave other numbers than the model"
            logits.copy_(wanted)
