"""Counter-based random numbers: a draw is a pure function of (seed, draw index).

The function is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): output n
of a stream is `mix(state + (n + 1) * GOLDEN)`, so any output is reached without the ones before it. There is no
generator object, no global state and no host read, and int64 arithmetic modulo 2**64 gives the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def streams(seeds: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Start state `[B]` int64 of each seed's stream, the seeds in [0, 2**64).

    A seed is hashed once, so that the streams of 0, 1, 2 ... start far apart.
    """
    return random_bits(torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64, device=device), 0)


def random_bits(state: Tensor, draw: Tensor | int) -> Tensor:
    """Output number `draw` (from 0; an int or an int64 tensor) of SplitMix64 started at `state`: 64 bits as int64."""
    step = _signed((draw + 1) * _GOLDEN) if isinstance(draw, int) else (draw + 1) * _signed(_GOLDEN)
    z = state + step
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return z ^ _shift_right(z, 31)


def uniform(state: Tensor, draw: Tensor | int) -> Tensor:
    """Uniform float64 in [0, 1) with 53 random bits for draw number `draw` of each stream."""
    return _shift_right(random_bits(state, draw), 11).double() * 2.0**-53


def _shift_right(bits: Tensor, n: int) -> Tensor:
    # int64 shifts copy the sign bit in; a 64-bit unsigned shift is that without the copies.
    return (bits >> n) & ((1 << (64 - n)) - 1)


def _signed(value: int) -> int:
    """The int64 whose two's-complement bits are those of `value` modulo 2**64."""
    return (value + 2**63) % 2**64 - 2**63
