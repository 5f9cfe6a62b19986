"""Distance curves that queries mix, against their formula: training and streams of every shape."""

import numpy as np
import pytest
import torch
from biased import HEADS, M, build, cases, check, check_any_chunks, inputs, numbers
from hypothesis import HealthCheck, given, settings
from torch.func import functional_call

from longburn import Attention, AttnWindow, attend
from longburn.bias import Policy
from longburn.bias.curves import DistanceCurves

CURVES = 3
WINDOWS = [AttnWindow(), AttnWindow(1), AttnWindow(7), AttnWindow(7, sink_tokens=3)]


def making(dtype: torch.dtype) -> Policy:
    return DistanceCurves(M, HEADS, curves=CURVES, distances=10, dtype=dtype)


def written(policy: Policy, x: np.ndarray):
    """The sum over the curves of the weight that token i gives to each, times the curve at the distance."""
    assert isinstance(policy, DistanceCurves)
    weights = (x @ numbers(policy.mix.weight).T).reshape(len(x), HEADS, CURVES)
    bank = numbers(policy.bank)

    def formula(h: int, p: int, j: int, q: np.ndarray, k: np.ndarray) -> float:
        return sum(weights[p, h, r] * bank[r, p - j] for r in range(CURVES)) if p - j < bank.shape[1] else 0.0

    return formula


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_any_chunks_give_the_formula(window: AttnWindow, sinks: bool) -> None:
    check_any_chunks(making, written, window, sinks=sinks)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(cases())
def test_whatever_a_stream_does(case: dict[str, object]) -> None:
    check(case, making, written)


def test_gradients() -> None:
    layer = build(making, AttnWindow(4, sink_tokens=1))
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x = torch.tensor(inputs(1, 6), requires_grad=True)
    assert {"bias.mix.weight", "bias.bank"} < set(parameters)

    def output(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *parameters.values()), fast_mode=True)


def test_later_keys_have_no_bias() -> None:
    layer, x = build(making, AttnWindow.two_sided()), torch.tensor(inputs(1, 6))
    policy = layer.bias
    assert isinstance(policy, DistanceCurves)
    with torch.no_grad():
        biased = layer(x)[:, 0]
        policy.bank[:, 1:] = 0  # the first token has keys at distance 0 and later ones only
        assert torch.equal(layer(x)[:, 0], biased)
        policy.bank[:, 0] += 1
        assert not torch.allclose(layer(x)[:, 0], biased)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="DistanceCurves: 0 curves of 3 distances"):
        DistanceCurves(M, 2, curves=0, distances=3)
    plain = Attention(M, 2)
    curves = DistanceCurves(M, 2, curves=2, distances=3)
    assert plain(torch.randn(1, 4, M), bias=curves).shape == (1, 4, M)  # one call's bias sees the layer's input as well
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="they depend on the layer's input"):
        attend(q, q, q, bias=curves)
