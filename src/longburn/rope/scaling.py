"""Frequency scalings that carry RoPE beyond its trained context.

RoPE turns channel pair j of a token at position p by the angle p * f_j, with f_j = theta^(-2j/rotary_dim) radians per
token (Su et al., RoFormer, arXiv:2104.09864). A scaling changes the f_j and, for YaRN and LongRoPE, multiplies the
rotated queries and keys by an `attention_factor` (so attention logits grow by its square).

Every setting here is frozen and has one method, `frequencies(theta, rotary_dim, length)`. `length` is the declared
total length of the stream in tokens; only `DynamicNtkScaling` and `LongRopeScaling` look at it. It must be declared,
and not read off the positions seen so far, because keys are rotated once when they are written: a base that moved
while the stream grew would leave old and new keys in different rotations, and the output would depend on how the
stream was cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Frequencies(NamedTuple):
    """What a scaling gives.

    inv_freq: radians per token of each pair, float64 [rotary_dim / 2] on the CPU.
    attention_factor: what the rotated queries and keys are multiplied by.
    """

    inv_freq: Tensor
    attention_factor: float


class RopeScaling(Protocol):
    """Anything that turns a base and a size into frequencies. `length` None means the trained context."""

    def frequencies(self, theta: float, rotary_dim: int, length: int | None = None) -> Frequencies:
        """Return the scaled frequencies of all `rotary_dim / 2` pairs, fastest first, and the attention factor."""
        ...


def unscaled(theta: float, rotary_dim: int) -> Tensor:
    """RoFormer's own frequencies theta^(-2j/rotary_dim): float64 [rotary_dim / 2]."""
    # The device is named so that a model built under `torch.device("meta")` still gets real numbers.
    return theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim)


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency is divided by `factor` (Chen et al., arXiv:2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        _check_number(self, "factor", at_least=1)

    def frequencies(self, theta: float, rotary_dim: int, length: int | None = None) -> Frequencies:
        return Frequencies(unscaled(theta, rotary_dim) / self.factor, 1.0)


@dataclass(frozen=True)
class NtkScaling:
    """NTK-aware scaling with a fixed factor: the base grows to theta * factor^(d / (d - 2)), d = rotary_dim.

    The fastest pair keeps its frequency and the slowest is divided by exactly `factor` (YaRN paper, section 3.1).
    """

    factor: float

    def __post_init__(self) -> None:
        _check_number(self, "factor", at_least=1)

    def frequencies(self, theta: float, rotary_dim: int, length: int | None = None) -> Frequencies:
        return Frequencies(unscaled(_ntk_base(theta, self.factor, rotary_dim), rotary_dim), 1.0)


@dataclass(frozen=True)
class DynamicNtkScaling:
    """NTK-aware scaling whose factor follows the declared length L: factor * L / original_context - (factor - 1).

    Up to `original_context` tokens nothing changes. Source: the "dynamic" type of transformers.
    """

    factor: float
    original_context: int

    def __post_init__(self) -> None:
        _check_number(self, "factor", at_least=1)
        _check_number(self, "original_context", at_least=1)

    def frequencies(self, theta: float, rotary_dim: int, length: int | None = None) -> Frequencies:
        stretch = max(length or 0, self.original_context) / self.original_context
        growth = self.factor * stretch - (self.factor - 1)
        return Frequencies(unscaled(_ntk_base(theta, growth, rotary_dim), rotary_dim), 1.0)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv:2309.00071): fast pairs keep their frequency, slow ones are divided by `factor`.

    A pair that makes at least `beta_fast` full turns within `original_context` tokens is fast, one that makes at most
    `beta_slow` is slow, and between them the share is linear in the pair's index.

    truncate: round the two ends of that ramp outwards to whole pairs. True in the paper's code, False for GPT-OSS.
    attention_factor: None gives 0.1 ln(factor) + 1, or, when `mscale` and `mscale_all_dim` are set (DeepSeek),
        (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1). These two come together: with only one of
        them, published implementations disagree.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        _check_number(self, "factor", at_least=1)
        _check_number(self, "original_context", at_least=1)
        _check_number(self, "beta_slow", above=0)
        _check_number(self, "beta_fast", above=0)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            _check_number(self, name, above=0, optional=True)
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"YarnScaling: beta_fast = {self.beta_fast} is below beta_slow = {self.beta_slow}; "
                "fast pairs turn more often than slow ones, so swap the two"
            )
        if not isinstance(self.truncate, bool):
            raise ValueError(f"YarnScaling: truncate = {self.truncate!r}; want True or False")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                f"YarnScaling: mscale = {self.mscale} and mscale_all_dim = {self.mscale_all_dim}; "
                "give both or neither, or state attention_factor itself"
            )

    def frequencies(self, theta: float, rotary_dim: int, length: int | None = None) -> Frequencies:
        low = self._pair_turning(self.beta_fast, theta, rotary_dim)
        high = self._pair_turning(self.beta_slow, theta, rotary_dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # rotary_dim - 1, though pairs end at rotary_dim / 2 - 1, is what every published implementation clamps to.
        low, high = max(low, 0), min(high, rotary_dim - 1)
        pairs = torch.arange(rotary_dim // 2, dtype=torch.float64, device="cpu")
        slow = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
        return Frequencies(_slowed(unscaled(theta, rotary_dim), self.factor, share=slow), self._attention_factor())

    def _pair_turning(self, turns: float, theta: float, rotary_dim: int) -> float:
        """The (fractional) index of the pair that makes `turns` full turns within the original context."""
        return rotary_dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        growth = 0.1 * math.log(self.factor)
        if self.mscale is None or self.mscale_all_dim is None:
            return growth + 1
        return (self.mscale * growth + 1) / (self.mscale_all_dim * growth + 1)


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: like YaRN's ramp, but linear in the number of turns, and without an attention factor.

    A pair that makes at least `high_freq_factor` full turns within `original_context` tokens keeps its frequency, one
    that makes at most `low_freq_factor` is divided by `factor`. Source: `apply_scaling` in meta-llama/llama-models.
    """

    factor: float
    original_context: int
    low_freq_factor: float
    high_freq_factor: float

    def __post_init__(self) -> None:
        _check_number(self, "factor", at_least=1)
        _check_number(self, "original_context", at_least=1)
        _check_number(self, "low_freq_factor", above=0)
        _check_number(self, "high_freq_factor", above=self.low_freq_factor)

    def frequencies(self, theta: float, rotary_dim: int, length: int | None = None) -> Frequencies:
        inv_freq = unscaled(theta, rotary_dim)
        turns = inv_freq * self.original_context / (2 * math.pi)
        slow = ((self.high_freq_factor - turns) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return Frequencies(_slowed(inv_freq, self.factor, share=slow), 1.0)


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., arXiv:2402.13753): one divisor per pair, in two sets, as in Phi-3.

    short_factor, long_factor: rotary_dim / 2 numbers each. The long set is taken when the declared length exceeds
        `original_context`, the short one otherwise.
    factor: how far the model was stretched (its longest context / original_context); used only for the attention
        factor, which is sqrt(1 + ln(factor) / ln(original_context)) unless `attention_factor` states it.
    """

    short_factor: Sequence[float]
    long_factor: Sequence[float]
    original_context: int
    factor: float
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            divisors = getattr(self, name)
            if not isinstance(divisors, Sequence) or not all(is_number(d) and d > 0 for d in divisors):
                raise ValueError(f"LongRopeScaling: {name} = {divisors!r}; want a list of positive numbers")
            object.__setattr__(self, name, tuple(divisors))
        _check_number(self, "original_context", at_least=2)
        _check_number(self, "factor", at_least=1)
        _check_number(self, "attention_factor", above=0, optional=True)

    def frequencies(self, theta: float, rotary_dim: int, length: int | None = None) -> Frequencies:
        for name in ("short_factor", "long_factor"):
            given, wanted = len(getattr(self, name)), rotary_dim // 2
            if given != wanted:
                raise ValueError(
                    f"LongRopeScaling: {name} has {given} numbers; want rotary_dim / 2 = {wanted}, one per pair"
                )
        is_long = (length or 0) > self.original_context
        divisors = torch.tensor(self.long_factor if is_long else self.short_factor, dtype=torch.float64, device="cpu")
        return Frequencies(unscaled(theta, rotary_dim) / divisors, self._attention_factor())

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context))


@dataclass(frozen=True)
class ProportionalScaling:
    """Gemma 4's "proportional" RoPE: only the fastest `proportion` of all pairs turn, the others stand still.

    Unlike a partial rotation (`rotary_dim` < head_dim), pairing and frequencies are those of the full rotary_dim.
    `factor` divides the frequencies as in `LinearScaling`.
    """

    proportion: float = 1.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        _check_number(self, "proportion", above=0, at_most=1)
        _check_number(self, "factor", at_least=1)

    def frequencies(self, theta: float, rotary_dim: int, length: int | None = None) -> Frequencies:
        inv_freq = unscaled(theta, rotary_dim) / self.factor
        inv_freq[int(self.proportion * rotary_dim) // 2 :] = 0
        return Frequencies(inv_freq, 1.0)


def _slowed(inv_freq: Tensor, factor: float, *, share: Tensor) -> Tensor:
    """Blend each frequency with itself divided by `factor`; `share` in [0, 1] is the weight of the divided one."""
    return inv_freq * (1 - share) + inv_freq / factor * share


def _ntk_base(theta: float, growth: float, rotary_dim: int) -> float:
    if rotary_dim <= 2:
        raise ValueError(f"NTK scaling: rotary_dim = {rotary_dim} has one pair only; want at least 4")
    return theta * math.pow(growth, rotary_dim / (rotary_dim - 2))


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float; True and False are not numbers here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_number(
    setting: object,
    name: str,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    optional: bool = False,
) -> None:
    """Raise ValueError unless the setting's field is a number within the bounds (or None, where it is optional)."""
    value = getattr(setting, name)
    if value is None and optional:
        return
    if is_number(value) and at_least <= value <= at_most and value > above:
        return
    bounds = ((">=", at_least), (">", above), ("<=", at_most))
    wanted = " and ".join(f"{relation} {bound}" for relation, bound in bounds if math.isfinite(bound))
    raise ValueError(f"{type(setting).__name__}: {name} = {value!r}; want a number {wanted}")
