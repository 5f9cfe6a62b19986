"""FIRE: the paper's formula in loops, beyond its length, in every form."""

import math

import numpy as np
import pytest
import torch
from bias_streams import WINDOWS, H, Row, largest_difference, layer
from torch import Tensor

from longburn import AttnWindow, attend
from longburn.bias import BiasContext, Fire


def fire(length: float = 11.0, *, learn_length: bool = True) -> Fire:
    torch.manual_seed(0)
    policy = Fire(H, width=5, c=0.7, length=length, learn_length=learn_length, dtype=torch.float64)
    with torch.no_grad():
        if policy.multiplier is not None:
            policy.multiplier.fill_(-1.1)  # acts by its magnitude
        for parameter in policy.mlp.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return policy.requires_grad_(False)


def paper(policy: Fire, h: int, p: int, j: int) -> float:
    first, first_bias, second, second_bias = (x.detach().numpy() for x in policy.mlp.parameters())
    c = float(policy.c)
    least = policy.length if policy.multiplier is None else abs(float(policy.multiplier) * policy.length)
    share = math.log(abs(c * (p - j)) + 1) / (math.log(abs(c * max(p, least)) + 1) + 1e-6)
    hidden = np.maximum(first[:, 0] * share + first_bias, 0)
    return float(second[h] @ hidden + second_bias[h])


@pytest.mark.parametrize(
    ("length", "learn_length", "sinks"),
    [(1.0, True, False), (11.0, True, True), (11.0, False, False), (100.0, True, True)],
)
@pytest.mark.parametrize("window", [*WINDOWS, AttnWindow.two_sided(3, 2)], ids=str)
def test_streams_equal_the_formula_in_loops(window: AttnWindow, length: float, learn_length: bool, sinks: bool) -> None:
    policy = fire(length, learn_length=learn_length)

    def bias(row: Row) -> np.ndarray:
        return row.fill(lambda h, p, j: paper(policy, h, p, j))

    assert largest_difference(layer(window, sinks=sinks), policy, bias) < 1e-11


def context(first: int, queries: int, window: int | None = None) -> BiasContext:
    low = 0 if window is None else max(0, first - window + 1)
    k_pos = torch.arange(low, first + queries)[None]
    q = torch.zeros(1, H, queries, 4, dtype=torch.float64)
    return BiasContext(torch.arange(first, first + queries)[None], k_pos, q, window=window)


def test_a_table_while_positions_are_within_the_length() -> None:
    policy = fire(100.0, learn_length=False)
    short = policy.terms(context(0, 60))
    assert short.table is not None
    assert short.table.shape == (H, 60)
    assert policy.terms(context(95, 6, window=8)).table.shape == (H, 8)  # the last is at 100
    assert policy.terms(context(96, 6, window=8)).dense.shape == (1, H, 6, 13)
    assert policy.terms(context(5000, 1, window=8)).key.shape == (1, H, 8)
    assert policy.writes_rows(context(96, 6, window=8))
    assert not policy.writes_rows(context(95, 6, window=8))


def test_the_length_of_another_device_is_not_read() -> None:
    """A learned one is known to that device only; a fixed one is a plain number."""
    learned, fixed = (Fire(H, length=100, learn_length=learn, device="meta") for learn in (True, False))
    asked = context(0, 60)
    assert learned.writes_rows(asked)
    assert not fixed.writes_rows(asked)


def test_far_positions() -> None:
    """Ten million: the distance is an integer until the logarithm, also in fp32."""
    policy, single = fire(), fire().float()
    at, window = 10**7 + 1, 9
    asked = context(at, 1, window)
    found = policy.terms(asked).key[0]
    truth = torch.tensor(
        [[paper(policy, h, at, j) for j in range(at - window + 1, at + 1)] for h in range(H)], dtype=torch.float64
    )
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    narrow = single.terms(asked._replace(q=asked.q.float())).key[0].double()
    torch.testing.assert_close(narrow, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [2.0, 100.0])
@pytest.mark.parametrize("window", [AttnWindow(), AttnWindow(3, sink_tokens=1)], ids=str)
def test_gradients_reach_the_parameters(window: AttnWindow, length: float) -> None:
    policy = fire(length).requires_grad_(True)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, H, 8, 3, generator=g, dtype=torch.float64) for _ in range(3))
    parameters = list(policy.parameters())

    def loss() -> Tensor:
        return attend(q, k, v, bias=policy, window=window).square().sum()

    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter is not parameters[-1]:
            flat, found = parameter.detach().view(-1), gradient.reshape(-1)
            for i in (0, flat.numel() - 1):
                kept = float(flat[i])
                sides = []
                for nudge in (1e-6, -1e-6):
                    flat[i] = kept + nudge
                    sides.append(loss().item())
                flat[i] = kept
                assert float(found[i]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-7)
    assert all((gradient != 0).any() for gradient in gradients[:-1])
    assert gradients[-1].abs().max() < 1e-12  # one number for a whole row changes nothing


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="Fire: heads 4, width 0, length 512: wanted at least 1 of each"):
        Fire(4, width=0, length=512)
    with pytest.raises(ValueError, match="Fire: built for 3 heads, the call has 4 query heads"):
        Fire(3).terms(context(0, 2))
