import numpy as np
import pytest
import torch
from scipy import stats

from longburn.sampling.uniform import random_bits, streams, uniform

MASK = 2**64 - 1


def splitmix64(state: int, n: int) -> int:
    """Output n of the published generator, in Python's unbounded integers."""
    z = (state + (n + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def as_int64(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def test_known_answers():
    # The first outputs of Vigna's splitmix64.c (https://prng.di.unimi.it/splitmix64.c) from state 1234567.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    got = random_bits(torch.tensor([1234567]), torch.arange(5))
    assert got.tolist() == [as_int64(value) for value in published]


def test_against_unbounded_integers():
    rng = np.random.default_rng(0)
    seeds = [0, 1, 2**63 - 1, 2**63, MASK, *(int(s) for s in rng.integers(0, 2**64, 200, dtype=np.uint64))]
    draws = [0, 1, 2**31, 2**62, *(int(d) for d in rng.integers(0, 2**62, 201))]
    want = [splitmix64(splitmix64(seed, 0), draw) for seed, draw in zip(seeds, draws, strict=True)]
    state = streams(seeds)
    assert random_bits(state, torch.tensor(draws)).tolist() == [as_int64(value) for value in want]
    assert uniform(state, torch.tensor(draws)).tolist() == [(value >> 11) / 2**53 for value in want]


def test_an_int_draw_is_the_same_as_a_tensor():
    state = streams(range(7))
    for draw in (0, 1, 12345, 2**40):
        assert torch.equal(random_bits(state, draw), random_bits(state, torch.full((7,), draw)))


def chi_square_p(cells: torch.Tensor, n: int) -> float:
    return stats.chisquare(torch.bincount(cells, minlength=n).numpy()).pvalue


N = 2**20


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1, 1234567890123456789])
def test_uniform_over_draws(seed):
    u = uniform(streams([seed]), torch.arange(N))
    assert u.min() >= 0
    assert u.max() < 1
    assert chi_square_p((u * 1000).long(), 1000) > 1e-4
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4
    low_bits = (u * 2**53).long() & 1023
    assert chi_square_p(low_bits, 1024) > 1e-4


def test_uniform_over_consecutive_seeds_at_one_draw():
    for draw in (0, 1, 1000):
        assert chi_square_p((uniform(streams(range(2**17)), draw) * 256).long(), 256) > 1e-4


@pytest.mark.parametrize("lag", [1, 2, 3, 1000])
def test_draws_of_one_seed_are_independent(lag):
    u = uniform(streams([42]), torch.arange(N))
    pairs = (u[:-lag] * 32).long() * 32 + (u[lag:] * 32).long()
    assert chi_square_p(pairs, 1024) > 1e-4


@pytest.mark.parametrize("gap", [1, 2, 2**32, 0x9E3779B97F4A7C15])
def test_streams_of_related_seeds_are_independent(gap):
    first, second = (uniform(streams([seed % 2**64]), torch.arange(N)) for seed in (99, 99 + gap))
    pairs = (first * 32).long() * 32 + (second * 32).long()
    assert chi_square_p(pairs, 1024) > 1e-4


def test_no_two_draws_of_many_small_seeds_share_their_bits():
    bits = random_bits(streams(range(1000))[:, None], torch.arange(1000))
    assert bits.unique().numel() == 1_000_000


@pytest.mark.cuda
def test_cuda_gives_the_same_bits():
    draws = torch.arange(1000)
    here, there = streams(range(1000)), streams(range(1000), "cuda")
    assert torch.equal(random_bits(here, draws), random_bits(there, draws.cuda()).cpu())
    assert torch.equal(uniform(here, draws), uniform(there, draws.cuda()).cpu())
