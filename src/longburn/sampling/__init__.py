"""Choosing tokens from logits: per-row settings, per-row seeds, and rows that do not depend on their batch mates."""

from longburn.sampling.config import SamplerConfig
from longburn.sampling.counts import TokenCounts
from longburn.sampling.sample import Sampled, Sampler, sample

__all__ = ["Sampled", "Sampler", "SamplerConfig", "TokenCounts", "sample"]
