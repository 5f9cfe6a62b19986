"""Seeded samplers, one stream of random numbers a row."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longburn.sampling import Sampler as Prepared
from longburn.sampling import SamplerConfig
from longburn.sampling.config import SEED_LIMIT
from longburn.sampling.uniform import streams, uniform


def seeds_by_row(config: SamplerConfig, batch: int) -> list[SamplerConfig]:
    """One configuration a row, with the seeds s, s + 1, ...: as gymnasium's vector environments are seeded."""
    seed = config.resolved().seed
    assert seed is not None
    return [replace(config, seed=(seed + row) % SEED_LIMIT) for row in range(batch)]


class TokenSampler:
    """Token ids from logits, by `longburn.sampling`.

    Args:
        configs: the settings of every row, with their seeds.
        vocab_size: V.
        device: where the logits are.

    Raises:
        ValueError: a penalty, which would need to know which text the tokens are part of.
    """

    def __init__(self, configs: Sequence[SamplerConfig], vocab_size: int, device: Any) -> None:
        self._prepared = Prepared(configs, batch=len(configs), vocab_size=vocab_size, device=device)
        if self._prepared.uses_counts:
            raise ValueError(
                "TokenSampler: repetition, frequency and presence penalties are of text; leave them out for actions"
            )

    def __call__(self, logits: Tensor, draw: Tensor) -> Tensor:
        return self._prepared(logits, draw=draw).tokens


class GaussianSampler:
    """Continuous actions `[B, d]` from `[B, 2 d]`: means, then logarithms of standard deviations.

    What is drawn beyond the bounds is clipped, so that a model reads what was done.

    Args:
        configs: of every row its seed, and the temperature that multiplies its deviations (0: the means).
        low, high: bounds of the components, fp64 `[d]`.
        device: where the logits are.

    Raises:
        ValueError: a setting that only tokens have.
    """

    def __init__(self, configs: Sequence[SamplerConfig], low: Tensor, high: Tensor, device: Any) -> None:
        for config in configs:
            if config != SamplerConfig(temperature=config.temperature, seed=config.seed):
                raise ValueError(f"GaussianSampler: {config}: continuous actions know temperature and seed only")
        seeds = [config.resolved().seed for config in configs]
        self._streams = streams([seed for seed in seeds if seed is not None], device)[:, None]
        scales = [config.temperature for config in configs]
        self._low, self._high = low.to(device), high.to(device)
        self._scale = torch.tensor(scales, dtype=torch.float64, device=device)[:, None]

    def __call__(self, logits: Tensor, draw: Tensor) -> Tensor:
        mean, log_deviation = logits.double().chunk(2, -1)
        d = mean.shape[-1]
        which = draw[:, None] * d + torch.arange(d, device=draw.device)
        # 53 random bits and a half: never 0, where a normal number would be infinite
        normal = torch.special.ndtri(uniform(self._streams, which) + 2.0**-54)
        drawn: Tensor = mean + self._scale * log_deviation.exp() * normal
        return drawn.clamp(self._low, self._high).float()
