"""Transformer-XL's relative attention against its formula: both ways, causal, over streams of every shape."""

import math

import numpy as np
import pytest
import torch
from biased import HEADS, D, M, build, cases, check, check_any_chunks, chunks, inputs, numbers, stream
from hypothesis import HealthCheck, given, settings
from torch.func import functional_call

from longburn import Attention, AttnWindow, RotaryEncoding, attend
from longburn.attention import core
from longburn.bias import BiasContext, Policy
from longburn.bias.relative import RelativeBias, sinusoids

WINDOWS = [
    AttnWindow(),
    AttnWindow(1),
    AttnWindow(7),
    AttnWindow(8, sink_tokens=1),
    AttnWindow(7, sink_tokens=3),
    AttnWindow(1, sink_tokens=2),
]


def making(dtype: torch.dtype) -> Policy:
    return RelativeBias(M, HEADS, head_dim=D, dtype=dtype)


def projected(policy: RelativeBias, distance: int) -> np.ndarray:
    """W R(m) by heads, `[H, D]`; R has the sine of m * w_f at 2f and the cosine at 2f + 1, w_f = 10000^(-2f / M)."""
    wave = np.zeros(policy.dim)
    for f in range(policy.dim // 2):
        angle = distance * 10000 ** (-2 * f / policy.dim)
        wave[2 * f], wave[2 * f + 1] = math.sin(angle), math.cos(angle)
    return (numbers(policy.project.weight) @ wave).reshape(policy.heads, -1)


def written(policy: Policy, x: np.ndarray):
    """Section 3.3 of the paper: (q + u) . k + (q + v) . W R(i - j), less the q . k that every attention has."""
    assert isinstance(policy, RelativeBias)
    u, v = numbers(policy.u), numbers(policy.v)
    rows = {m: projected(policy, m) for m in range(-len(x), len(x))}
    return lambda h, p, j, q, k: (u[h] @ k + (q + v[h]) @ rows[p - j][h]) / np.sqrt(len(q))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_any_chunks_give_the_formula(window: AttnWindow, sinks: bool) -> None:
    check_any_chunks(making, written, window, sinks=sinks)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(cases())
def test_whatever_a_stream_does(case: dict[str, object]) -> None:
    check(case, making, written)


def test_a_packed_cache_rounds_keys_and_values_only() -> None:
    for window in WINDOWS:
        layer, x = build(making, window), inputs(2, 41)
        one_by_one = stream(layer, x, 1, packed=True)
        for chunk in chunks(window.size)[1:]:
            np.testing.assert_allclose(stream(layer, x, chunk, packed=True), one_by_one, atol=1e-10, rtol=0)


@pytest.mark.parametrize("left", [None, 0, 3])
@pytest.mark.parametrize("right", [None, 0, 5])
def test_both_ways(left: int | None, right: int | None) -> None:
    """Queries that see later keys, at negative distances: the whole score matrix, one after the other."""
    layer, x = build(making, AttnWindow.two_sided(left, right)), inputs(1, 19)[0]
    policy = layer.bias
    assert isinstance(policy, RelativeBias)
    qkv = x @ numbers(layer.qkv.weight).T + numbers(layer.qkv.bias)
    q, k, v = (part.reshape(19, -1, D) for part in np.split(qkv, [HEADS * D, (HEADS + 2) * D], 1))
    formula = written(policy, x)
    out = np.zeros((19, HEADS, D))
    for i in range(19):
        seen = [j for j in range(19) if (left is None or i - j <= left) and (right is None or j - i <= right)]
        for h in range(HEADS):
            scores = [q[i, h] @ k[j, h // 2] / math.sqrt(D) + formula(h, i, j, q[i, h], k[j, h // 2]) for j in seen]
            e = np.exp(np.array(scores) - max(scores))
            out[i, h] = sum(w * v[j, h // 2] for w, j in zip(e / e.sum(), seen, strict=True))
    answers = out.reshape(19, -1) @ numbers(layer.out.weight).T
    np.testing.assert_allclose(layer(torch.tensor(x)[None])[0].detach().numpy(), answers, atol=1e-11, rtol=0)
    with torch.no_grad():
        np.testing.assert_allclose(layer(torch.tensor(x)[None])[0].numpy(), answers, atol=1e-11, rtol=0)


def test_gradients() -> None:
    for window in (AttnWindow(3, sink_tokens=1), AttnWindow.two_sided()):
        layer = build(making, window)
        parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
        x = torch.tensor(inputs(1, 5), requires_grad=True)
        assert {"bias.u", "bias.v", "bias.project.weight"} < set(parameters)

        def output(x: torch.Tensor, *values: torch.Tensor, layer=layer, names=tuple(parameters)) -> torch.Tensor:
            return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(output, (x, *parameters.values()), fast_mode=True)


def test_rows_are_kept_while_the_weight_stays() -> None:
    layer, x = build(making, AttnWindow(7)), torch.tensor(inputs(1, 30))
    policy = layer.bias
    assert isinstance(policy, RelativeBias)
    with torch.no_grad():
        first = layer(x)
        kept = {key: (rows.data_ptr(), rows.clone()) for key, (_, rows) in policy._kept.items()}
        assert [tuple(rows.shape) for _, rows in kept.values()] == [(HEADS, 7, D)]
        layer(x)
        assert {key: rows.data_ptr() for key, (_, rows) in policy._kept.items()} == {k: p for k, (p, _) in kept.items()}
        policy.project.weight *= 2
        second = layer(x)
        for key, (_, rows) in policy._kept.items():  # others, in the same place
            assert rows.data_ptr() == kept[key][0]
            torch.testing.assert_close(rows, 2 * kept[key][1])
    assert (first - second).abs().max() > 1e-2
    torch.testing.assert_close(second, layer(x).detach(), atol=1e-12, rtol=0)


def test_a_long_stream_keeps_few_rows() -> None:
    layer = build(making, AttnWindow(7, sink_tokens=2))
    stream(layer, inputs(1, 300), 1)
    assert isinstance(layer.bias, RelativeBias)
    assert sum(rows.shape[1] for _, rows in layer.bias._kept.values()) <= 1 + 2 + 4 + 7


def test_far_positions_in_fp32() -> None:
    """Distances are whole numbers: ten million tokens on, the same bias, and kept sink tokens at ten million."""
    layer = build(making, AttnWindow(7, sink_tokens=2), dtype=torch.float32)
    policy = layer.bias
    assert isinstance(policy, RelativeBias)
    start = 10_000_019
    held = [0, 1, *range(start - 6, start + 1)]
    q = torch.randn(1, HEADS, 1, D, generator=torch.Generator().manual_seed(4))
    context = BiasContext(torch.tensor([[start]]), torch.tensor([held]), q, 0.5, 7, 2)
    dense = policy.terms(context).dense
    assert dense is not None
    for column, j in enumerate(held):
        rows = projected(policy, start - j)
        right = (numbers(q[0, :, 0]) - numbers(policy.u) + numbers(policy.v)) * rows
        np.testing.assert_allclose(numbers(dense[0, :, 0, column]), 0.5 * right.sum(1), atol=2e-6, rtol=0)


def test_rows_are_written_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = build(making, AttnWindow(7, sink_tokens=1), sinks=True), torch.tensor(inputs(2, 41))
    whole, sizes = layer(x), []
    terms = RelativeBias.terms

    def watched(self: RelativeBias, context: BiasContext):
        sizes.append(context.q.shape[2])
        return terms(self, context)

    monkeypatch.setattr(RelativeBias, "terms", watched)
    monkeypatch.setattr(core, "ROWS", 2 * HEADS * 41 * 6)
    torch.testing.assert_close(layer(x), whole, atol=1e-12, rtol=0)
    assert sizes == [6] * 6 + [5]


def test_waves() -> None:
    assert sinusoids(torch.tensor([0]), 6).tolist() == [[0, 1, 0, 1, 0, 1]]
    assert sinusoids(torch.tensor([-3]), 4)[0].tolist() == pytest.approx(
        [-math.sin(3), math.cos(3), -math.sin(0.03), math.cos(0.03)], rel=1e-14
    )


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="RelativeBias: dim 9, heads 3"):
        RelativeBias(9, 3)
    with pytest.raises(ValueError, match="RelativeBias changes queries, which rope or prescale would change again"):
        Attention(M, 2, rope=RotaryEncoding(4), bias=RelativeBias(M, 2))
    with pytest.raises(ValueError, match="RelativeBias changes queries"):
        Attention(M, 2, prescale=True, bias=RelativeBias(M, 2))
    layer, x = build(making), torch.tensor(inputs(1, 4))
    with pytest.raises(ValueError, match="of 4 keys some are more than 3 positions away"):
        layer(x, torch.tensor([[0, 1, 2, 9]]))
    far = layer(x, torch.arange(10**6, 10**6 + 4)[None])  # far along, but near each other
    torch.testing.assert_close(far, layer(x), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="RelativeBias needs more of a layer than one call"):
        Attention(M, 2)(x.float(), bias=RelativeBias(M, 2))
    q = torch.zeros(1, 2, 3, 4)
    assert attend(q, q, q, bias=RelativeBias(M, 2)).shape == q.shape  # its second product alone
