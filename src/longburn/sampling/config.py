"""What a user asks of the sampler: one frozen, validated settings object per row."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

SEED_LIMIT = 2**64
_FLOAT32 = torch.finfo(torch.float32)  # the settings meet float32 logits: what is not finite there is not finite


@dataclass(frozen=True)
class SamplerConfig:
    """Sampling settings of one row. The defaults draw from the model's own distribution.

    The order in which the settings act is stated in `longburn.sampling.sample`.

    Args:
        temperature: Divides the logits; 0 is greedy (the most likely token, lowest id on a tie).
        top_k: Keep exactly this many most likely tokens, lowest ids first among equals; 0 is off.
        top_p: Keep the smallest set of most likely tokens whose probability reaches `top_p`, in (0, 1]; 1 is off.
        min_p: Keep tokens whose probability is at least `min_p` times that of the most likely one, in [0, 1]; 0 is off.
        temperature_last: `top_p` and `min_p` look at probabilities of temperature 1, and the temperature divides the
            logits of what they keep.
        repetition_penalty: For tokens of the prompt or the generated text: positive logits are divided by it,
            negative ones multiplied (CTRL, https://arxiv.org/abs/1909.05858); 1 is off.
        frequency_penalty: Subtracted from a logit once per time the token was *generated*; 0 is off.
        presence_penalty: Subtracted once if the token was *generated* at all; 0 is off.
        logit_bias: Token id to finite number added to its logit.
        banned_tokens: Ids that are never drawn, whatever their bias.
        seed: Number in [0, 2**64) that, with the draw index, fixes every draw of the row. None asks for a fresh
            seed from the operating system when the configuration is resolved (see `resolved`).

    Raises:
        ValueError: A setting is out of range; the message names it, the value and the range.
        TypeError: An id, count or seed is not an integer.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    temperature_last: bool = False
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    banned_tokens: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        # Copies: a dict or list that the caller changes later must not change a frozen configuration.
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        object.__setattr__(self, "banned_tokens", tuple(self.banned_tokens))

        def finite(x: float) -> bool:
            return abs(x) <= _FLOAT32.max

        _require("temperature", self.temperature, lambda t: finite(t) and t >= 0, "finite and >= 0 (0 is greedy)")
        _require_integers("top_k", [self.top_k])
        _require("top_k", self.top_k, lambda k: k >= 0, ">= 0 (0 turns it off)")
        _require("top_p", self.top_p, lambda p: 0 < p <= 1, "in (0, 1] (1 turns it off; for greedy use temperature=0)")
        _require("min_p", self.min_p, lambda p: 0 <= p <= 1, "in [0, 1] (0 turns it off)")
        _require(
            "repetition_penalty", self.repetition_penalty, lambda r: finite(r) and r >= _FLOAT32.tiny, "finite and > 0"
        )
        _require("frequency_penalty", self.frequency_penalty, finite, "finite")
        _require("presence_penalty", self.presence_penalty, finite, "finite")
        _require_integers("logit_bias", self.logit_bias)
        for token, bias in self.logit_bias.items():
            _require("logit_bias", token, lambda t: t >= 0, "made of token ids >= 0")
            _require(f"logit_bias[{token}]", bias, finite, "finite (to forbid a token use banned_tokens)")
        _require_integers("banned_tokens", self.banned_tokens)
        for token in self.banned_tokens:
            _require("banned_tokens", token, lambda t: t >= 0, "made of token ids >= 0")
        if self.seed is not None:
            _require_integers("seed", [self.seed])
            _require("seed", self.seed, lambda s: 0 <= s < SEED_LIMIT, "in [0, 2**64), or None for a fresh one")

    @property
    def greedy(self) -> bool:
        """True if no draw can change the result: temperature 0, or only the most likely token is kept."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def cut_temperature(self) -> float:
        """The temperature of the probabilities that `top_p` and `min_p` look at."""
        return 1.0 if self.temperature_last and (self.top_p < 1 or self.min_p > 0) else self.temperature

    @property
    def uses_counts(self) -> bool:
        """True if a penalty is on, so that the sampler must be told which tokens came before."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

    def resolved(self) -> SamplerConfig:
        """This configuration with its seed fixed: itself if it has one, else a copy with a seed from the OS."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(SEED_LIMIT))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if a biased or banned id lies outside a vocabulary of `vocab_size` tokens."""
        for name, tokens in (("logit_bias", self.logit_bias), ("banned_tokens", self.banned_tokens)):
            beyond = sorted(token for token in tokens if token >= vocab_size)
            if beyond:
                raise ValueError(
                    f"SamplerConfig: {name} has ids {beyond[:8]} but the logits have {vocab_size} tokens "
                    f"(0 .. {vocab_size - 1}); use ids of this model's tokenizer"
                )


def _require(name: str, value: Any, valid: Any, wanted: str) -> None:
    # `not valid(...)` rather than the opposite comparison: NaN fails every range.
    if not valid(value):
        raise ValueError(f"SamplerConfig: {name} must be {wanted}, got {value!r}")


def _require_integers(name: str, values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"SamplerConfig: {name} must be made of integers, got {value!r} ({type(value).__name__})")
