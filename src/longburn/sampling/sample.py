"""From logits to tokens, one row at a time in meaning and a batch at a time in fact.

The order, fixed for every row:

1. `logit_bias` is added and `banned_tokens` are removed (a ban wins over any bias).
2. `repetition_penalty`, over the prompt and the generated tokens.
3. `frequency_penalty` and `presence_penalty`, over the generated tokens only.
4. NaN counts as -inf, which is no candidate; +inf counts as the largest finite float32.
5. Greedy rows take the most likely token here. Other rows divide by `temperature` (with `temperature_last`, after 8).
6. `top_k`.
7. `top_p`, of the probability that top-k left.
8. `min_p`, relative to the most likely token.
9. One draw from what is left: inverse transform sampling, over tokens from most to least likely where top-k is on,
   else over tokens by id.

Equal logits are ordered by lowest id. A row without any candidate gives token -1. All of it reads float32 logits.

Row i of a batch gives, bit for bit, what it would give alone: its draw depends only on its logits, counts, settings,
seed and draw index (see `uniform` and `processors` for how).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longburn.sampling.choose import DRAW, MOST_LIKELY, DrawCall, take
from longburn.sampling.config import SamplerConfig
from longburn.sampling.counts import TokenCounts
from longburn.sampling.processors import (
    MAX_VOCABULARY,
    clean,
    most_likely,
    penalise_frequency,
    penalise_presence,
    penalise_repetition,
)
from longburn.sampling.uniform import streams

Device = torch.device | str | None


@dataclass(frozen=True)
class Sampled:
    """One step's result. Log-probabilities are those of the model itself: of the raw logits, before step 1.

    Args:
        tokens: `[B]` int64; -1 where a row had no candidate.
        logprobs: `[B]` float32, of the chosen tokens (-inf for -1), or None if they were not asked for.
        top_tokens: `[B, n]` int64, the model's most likely tokens, or None.
        top_logprobs: `[B, n]` float32, theirs, or None.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None


class Sampler:
    """Sampling of a batch whose rows may all differ, with every setting prepared once on the device.

    A call reads nothing back to the host and has fixed shapes, so it may be part of a CUDA graph (pass `draw` as a
    tensor there). Settings that no row uses cost nothing, and greedy rows do not pay for the draws of their mates.

    Args:
        config: One configuration for all rows, or one per row. Rows with an equal seed and equal logits draw the same
            tokens; with `seed=None` every row gets its own fresh seed.
        batch: Number of rows B.
        vocab_size: Width V of the logits.
        device: Where the logits will be.

    Attributes:
        configs: The configuration of each row with its seed, enough to repeat every draw.

    Raises:
        ValueError: The number of configurations is not B, or an id lies outside the vocabulary.
    """

    def __init__(
        self, config: SamplerConfig | Sequence[SamplerConfig], *, batch: int, vocab_size: int, device: Device = None
    ) -> None:
        rows = [config] * batch if isinstance(config, SamplerConfig) else list(config)
        if len(rows) != batch:
            raise ValueError(f"Sampler: got {len(rows)} configurations for {batch} rows; pass one, or one per row")
        if not 0 < vocab_size <= MAX_VOCABULARY:
            raise ValueError(f"Sampler: vocab_size must be in 1 .. {MAX_VOCABULARY}, got {vocab_size}")
        for row in rows:
            row.check_vocabulary(vocab_size)
        self.configs = tuple(row.resolved() for row in rows)
        self.uses_counts = any(row.uses_counts for row in rows)
        self._shape = (batch, vocab_size)
        self._offset = _offset(rows, vocab_size, device)
        self._repetition = _column([row.repetition_penalty for row in rows], 1.0, torch.float32, device)
        self._frequency = _column([row.frequency_penalty for row in rows], 0.0, torch.float32, device)
        self._presence = _column([row.presence_penalty for row in rows], 0.0, torch.float32, device)
        self._groups = _groups(self.configs, vocab_size, device)

    def __call__(
        self, logits: Tensor, *, draw: Tensor | int, counts: TokenCounts | None = None, logprobs: int | None = None
    ) -> Sampled:
        """Sample one token per row.

        Args:
            logits: `[B, V]`, any floating type; read as float32 and left unchanged.
            draw: Index of this draw in the rows' own sequences: an int for all, or int64 `[B]`. The same seed and
                index give the same random number again.
            counts: Tokens seen so far; needed if a row has a penalty.
            logprobs: None for no log-probabilities, n >= 0 for those of the chosen token and the n most likely ones.
        """
        if logits.shape != self._shape:
            raise ValueError(f"Sampler: got logits of shape {tuple(logits.shape)}, was built for {self._shape}")
        if not isinstance(draw, int) and (draw.shape != self._shape[:1] or draw.dtype != torch.int64):
            got = f"{draw.dtype} of shape {tuple(draw.shape)}"
            raise ValueError(f"Sampler: draw must be an int or int64 of shape ({self._shape[0]},), got {got}")
        tokens = self._pick(self._penalise(self._shift(logits), counts), draw)
        return Sampled(tokens) if logprobs is None else _with_logprobs(tokens, logits, logprobs)

    def reseed(self, other: Sampler) -> bool:
        """Take over the seeds of a sampler that differs in nothing else, in place; False if it does.

        So a CUDA graph that holds this sampler can be used for other seeds.
        """
        if other._shape != self._shape or _seedless(other.configs) != _seedless(self.configs):
            return False
        self.configs = other.configs
        for mine, theirs in zip(self._groups, other._groups, strict=True):
            if isinstance(mine, _Random) and isinstance(theirs, _Random):
                mine.stream.copy_(theirs.stream)
        return True

    def _shift(self, logits: Tensor) -> Tensor:
        if self._offset is None:
            return logits
        index, value = self._offset
        return logits.float().flatten().scatter_add(0, index, value).view(self._shape)

    def _penalise(self, logits: Tensor, counts: TokenCounts | None) -> Tensor:
        if not self.uses_counts:
            return logits
        if counts is None or counts.generated.shape != self._shape:
            got = "none" if counts is None else f"counts of shape {tuple(counts.generated.shape)}"
            raise ValueError(f"Sampler: a penalty is on and needs TokenCounts of shape {self._shape}, got {got}")
        logits = logits.float()
        if self._repetition is not None:
            logits = penalise_repetition(logits, (counts.prompt + counts.generated) > 0, self._repetition)
        if self._frequency is not None:
            logits = penalise_frequency(logits, counts.generated, self._frequency)
        if self._presence is not None:
            logits = penalise_presence(logits, counts.generated, self._presence)
        return logits

    def _pick(self, logits: Tensor, draw: Tensor | int) -> Tensor:
        if len(self._groups) == 1:
            return self._groups[0].pick(logits, draw)
        tokens = torch.empty(self._shape[0], dtype=torch.int64, device=logits.device)
        for group in self._groups:
            rows = group.rows
            tokens[rows] = group.pick(logits[rows], draw if isinstance(draw, int) else draw[rows])
        return tokens


def sample(
    logits: Tensor,
    config: SamplerConfig | Sequence[SamplerConfig],
    *,
    counts: TokenCounts | None = None,
    draw: Tensor | int = 0,
    logprobs: int | None = None,
) -> Sampled:
    """Sample one token per row of logits `[B, V]` once; a loop prepares a `Sampler` instead.

    `config`, `counts`, `draw` and `logprobs` are those of `Sampler`.
    """
    if logits.ndim != 2:
        raise ValueError(f"sample: logits must be [B, V], got shape {tuple(logits.shape)}")
    sampler = Sampler(config, batch=logits.shape[0], vocab_size=logits.shape[1], device=logits.device)
    return sampler(logits, counts=counts, draw=draw, logprobs=logprobs)


@dataclass(frozen=True)
class _Greedy:
    """Rows `[b]` int64 of the batch that take the most likely token."""

    rows: Tensor

    def pick(self, logits: Tensor, _draw: Tensor | int) -> Tensor:
        return MOST_LIKELY(logits)


@dataclass(frozen=True)
class _Random:
    """Rows `[b]` int64 of the batch that draw, with their settings as columns `[b, 1]`; None is off for all of them.

    With `width` > 0 all rows use top-k, and everything after it costs O(width). With 0 none does.
    """

    rows: Tensor
    width: int
    stream: Tensor
    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    cut_temperature: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[int], configs: Sequence[SamplerConfig], width: int, device: Device) -> _Random:
        return cls(
            torch.tensor(rows, device=device),
            width,
            streams([config.seed for config in configs if config.seed is not None], device),
            _column([config.temperature for config in configs], 1.0, torch.float64, device),
            _column([config.top_k for config in configs], width, torch.int64, device) if width else None,
            _column([config.top_p for config in configs], 1.0, torch.float64, device),
            _column([config.min_p for config in configs], 0.0, torch.float64, device),
            None
            if all(config.cut_temperature == config.temperature for config in configs)
            else torch.tensor([[config.cut_temperature] for config in configs], dtype=torch.float64, device=device),
        )

    def pick(self, logits: Tensor, draw: Tensor | int) -> Tensor:
        settings = (self.stream, self.width, self.temperature, self.top_k, self.top_p, self.min_p)
        return DRAW(DrawCall(logits, draw, *settings, self.cut_temperature))


def _seedless(configs: Sequence[SamplerConfig]) -> list[SamplerConfig]:
    return [replace(config, seed=None) for config in configs]


def _groups(configs: Sequence[SamplerConfig], vocab_size: int, device: Device) -> list[_Greedy | _Random]:
    """Cut the batch into greedy rows, rows with top-k and the rest, by each row's own settings."""
    greedy: list[int] = []
    ranked: list[int] = []
    other: list[int] = []
    for row, config in enumerate(configs):
        (greedy if config.greedy else ranked if 0 < config.top_k < vocab_size else other).append(row)
    groups: list[_Greedy | _Random] = []
    if greedy:
        groups.append(_Greedy(torch.tensor(greedy, device=device)))
    for rows in (ranked, other):
        if rows:
            chosen = [configs[row] for row in rows]
            width = max(config.top_k for config in chosen) if rows is ranked else 0
            groups.append(_Random.of(rows, chosen, width, device))
    return groups


def _column(values: Sequence[float], off: float, dtype: torch.dtype, device: Device) -> Tensor | None:
    """A setting of the rows as `[b, 1]`, or None if no row uses it."""
    if all(value == off for value in values):
        return None
    return torch.tensor(values, dtype=dtype, device=device)[:, None]


def _offset(configs: Sequence[SamplerConfig], vocab_size: int, device: Device) -> tuple[Tensor, Tensor] | None:
    """Places `[n]` in the flattened logits and the numbers `[n]` to add there: the bias, or -inf for a banned token."""
    offset: dict[int, float] = {}
    for row, config in enumerate(configs):
        offset |= {row * vocab_size + token: bias for token, bias in config.logit_bias.items()}
        offset |= {row * vocab_size + token: -torch.inf for token in config.banned_tokens}
    if not offset:
        return None
    places = torch.tensor(list(offset), dtype=torch.int64, device=device)
    return places, torch.tensor(list(offset.values()), dtype=torch.float32, device=device)


def _with_logprobs(tokens: Tensor, logits: Tensor, n: int) -> Sampled:
    if not 0 <= n <= logits.shape[-1]:
        raise ValueError(f"Sampler: logprobs must be None or in 0 .. {logits.shape[-1]}, got {n}")
    # A row of -inf has no distribution: NaN from log_softmax, "impossible" for every token here.
    logprobs = clean(clean(logits.float()).log_softmax(-1))
    chosen = take(logprobs, tokens, missing=-torch.inf)
    if n == 0:
        return Sampled(tokens, chosen)
    top = most_likely(logprobs, n)
    return Sampled(tokens, chosen, top, logprobs.gather(-1, top))
