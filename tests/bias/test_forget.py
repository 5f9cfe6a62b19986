"""Forgetting attention against its formula: training, streams of every shape, and sums of a million."""

import math

import numpy as np
import pytest
import torch
from biased import HEADS, M, build, cases, check, check_any_chunks, chunks, forward, inputs, numbers, stream, wanted
from hypothesis import HealthCheck, given, settings
from torch.func import functional_call

from longburn import Attention, AttnWindow, CacheManager
from longburn.bias import BiasContext, Policy
from longburn.bias.forget import ForgetBias
from longburn.cache import CacheMark, Step, buffers

WINDOWS = [AttnWindow(), AttnWindow(1), AttnWindow(7), AttnWindow(7, sink_tokens=2), AttnWindow(1, sink_tokens=2)]


def making(dtype: torch.dtype) -> Policy:
    return ForgetBias(M, HEADS, dtype=dtype)


def written(policy: Policy, x: np.ndarray):
    """Equation 4 of the paper: what is added is the sum of log f over the tokens after j, up to and with i."""
    assert isinstance(policy, ForgetBias)
    gates = 1 / (1 + np.exp(-(x @ numbers(policy.gate.weight).T + numbers(policy.gate.bias))))
    return lambda h, p, j, q, k: sum(math.log(gates[t, h]) for t in range(j + 1, p + 1))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_any_chunks_give_the_formula(window: AttnWindow, sinks: bool) -> None:
    check_any_chunks(making, written, window, sinks=sinks)


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(cases())
def test_whatever_a_stream_does(case: dict[str, object]) -> None:
    check(case, making, written)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("sizes", [(7, 15, 11), (15, 1, 8), (3, 9, 30)])
def test_padded_columns_beyond_the_window(sizes: tuple[int, ...], left: bool) -> None:
    for rows in (1, 2):
        case = {"window": AttnWindow(7, sink_tokens=1), "rows": rows, "slack": 0, "max_length": None, "left": left}
        turns = [("chunk", [size - row for row in range(rows)]) for size in sizes]
        check(case | {"sinks": True, "padding": 2, "turns": turns, "impl": "auto", "seed": 3}, making, written)


@pytest.mark.parametrize("options", [{}, {"slack": 5}, {"max_length": 64}], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_packed_cache_rounds_keys_and_values_only(window: AttnWindow, options: dict[str, int]) -> None:
    layer, x = build(making, window, sinks=True), inputs(2, 41)
    one_by_one = stream(layer, x, 1, packed=True, **options)
    for chunk in chunks(window.size)[1:]:
        np.testing.assert_allclose(stream(layer, x, chunk, packed=True, **options), one_by_one, atol=1e-10, rtol=0)
    error = np.abs(one_by_one - layer(torch.tensor(x)).detach().numpy()).max()
    assert 1e-4 < error / np.abs(one_by_one).max() < 0.1


def test_gradients() -> None:
    layer = build(making, AttnWindow(3, sink_tokens=1), sinks=True)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x = torch.tensor(inputs(1, 6), requires_grad=True)
    assert {"bias.gate.weight", "bias.gate.bias"} < set(parameters)

    def output(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *parameters.values()))


def test_the_row_term_counts_beside_a_learned_sink() -> None:
    """Without sinks a row's constant cancels; with one it does not, and the formula has it."""
    policy, x = making(torch.float64), torch.tensor(inputs(1, 9))
    own = policy.of_tokens(x, x, x, torch.arange(9)[None], torch.zeros(1, HEADS, dtype=torch.float64))
    context = BiasContext(torch.arange(9)[None], torch.arange(9)[None], x[:, None].expand(1, HEADS, 9, M))
    terms = policy.terms(context._replace(extra=own, own=own))
    assert terms.key is not None
    assert terms.row is not None
    assert [t.shape for t in terms if isinstance(t, torch.Tensor)] == [(1, HEADS, 9)] * 2  # nothing of size T x S
    matrix = terms.key[:, :, None] + terms.row[..., None]
    torch.testing.assert_close(matrix.diagonal(0, 2, 3), torch.zeros(1, HEADS, 9, dtype=torch.float64))
    assert (matrix.tril(-1).flatten() <= 0).all()


# --- long streams ----------------------------------------------------------------------------------------------------

WINDOW = 24
FADING = 10_000  # tokens


def gated(window: AttnWindow) -> Attention:
    """In fp32; the first input alone sets the gates: x[0] is their logit, of which the rest knows nothing."""
    layer = build(making, window, sinks=True, dtype=torch.float32)
    assert isinstance(layer.bias, ForgetBias)
    with torch.no_grad():
        layer.bias.gate.weight.zero_()
        layer.bias.gate.bias.zero_()
        layer.bias.gate.weight[:, 0] = torch.linspace(0.5, 1.0, HEADS)
        layer.qkv.weight[:, 0] = 0
    return layer


def long_stream(window: AttnWindow, *, recorded: bool = False) -> tuple[float, float]:
    """The largest error of the last 60 tokens after a sum of a million, against the formula, and that sum."""
    layer, x = gated(window), inputs(1, FADING + 60)
    x[:, :FADING, 0] = -200 + 5 * x[:, :FADING, 0]  # they let all fade at once
    x[:, FADING:, 0] = 2 + x[:, FADING:, 0]  # they keep most
    cache = CacheManager.for_layers([layer], 1)
    tokens = torch.tensor(x, dtype=torch.float32)
    parts = [forward(layer, part, cache, part.shape[1]) for part in tokens[:, :FADING].split(500, 1)]
    one = replayed if recorded else forward
    parts += [one(layer, token, cache, 1) for token in tokens[:, FADING:].split(1, 1)]
    got = torch.cat(parts[-60:], 1)[0].double().numpy()
    last = tokens[0, -(60 + WINDOW) :].double().numpy()
    answers = wanted(layer, written, last)[-60:]  # what is farther back is out of sight
    total = 0.5 * np.log1p(np.exp(-tokens[0, :, 0].double().numpy())).sum()  # of the slowest head, about
    return float(np.abs(got - answers).max()), float(total)


def replayed(layer: Attention, tokens: torch.Tensor, cache: CacheManager, count: int) -> torch.Tensor:
    """One step as something recorded does it: the layer sees a tensor of positions, and the host says what was done."""
    step = cache.positions(count)
    assert cache.takes(step)
    with cache.fixed_step(step.positions.clone()):
        y = forward(layer, tokens, cache, count, commit=False)
    cache.wrote(step)
    cache.advance(step)
    return y


@pytest.mark.parametrize("recorded", [False, True])
def test_a_sum_of_a_million_is_as_exact_as_a_short_one(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    error, total = long_stream(AttnWindow(WINDOW), recorded=recorded)
    assert total > 0.99e6
    assert error < 1e-5
    monkeypatch.setattr(buffers, "REBASED", 10**12)
    without, _ = long_stream(AttnWindow(WINDOW), recorded=recorded)
    assert without > 1e-3


@pytest.mark.parametrize("window", [AttnWindow(), AttnWindow(WINDOW, sink_tokens=2)], ids=str)
def test_what_is_kept_stays_small(window: AttnWindow) -> None:
    """Also in a cache that drops nothing, where the oldest sums grow as far as they are forgotten."""
    layer, x = gated(window), inputs(2, 900)
    x[:, :, 0] = -3
    cache = CacheManager.for_layers([layer], 2)
    for part in torch.tensor(x).split(30, 1):
        forward(layer, part, cache, part.shape[1])
    kept, at = cache[0].memory[-2], cache[0].positions[0]
    assert kept[:, :, at.argmax()].abs().max() < 3.1 * 62  # at most 62 tokens since the last time
    assert kept[:, -1, :2].max() < -2000  # the first two, in both windows


def test_rows_whose_turns_never_meet() -> None:
    """When sums are moved, that must not depend on which row has the call's tokens."""
    layer, x = gated(AttnWindow(WINDOW)), inputs(2, 400)
    x[:, :, 0] = -3
    cache = CacheManager.for_layers([layer], 2)
    for t, token in enumerate(torch.tensor(x).split(1, 1)):
        forward(layer, token, cache, torch.tensor([[0], [-1]] if t % 2 else [[-1], [0]]))
    kept, at = cache[0].memory[-2], cache[0].positions
    newest = kept.gather(2, at.argmax(1)[:, None, None].expand(2, HEADS, 1))
    assert newest.abs().max() < 3.1 * 62


def test_a_mark_brings_sums_back() -> None:
    for window in WINDOWS:
        layer, x = build(making, window), torch.tensor(inputs(1, 130))
        cache = CacheManager.for_layers([layer], 1)
        forward(layer, x[:, :30], cache, 30)
        mark = CacheMark(cache)
        for part in x[:, 30:].split(10, 1):
            forward(layer, part, cache, part.shape[1])
        mark.restore()
        got = forward(layer, x[:, 30:50], cache, 20)
        full = layer(x[:, :50])[:, 30:].detach()
        torch.testing.assert_close(got, full, atol=1e-11, rtol=0)


def test_positions_that_the_host_does_not_know() -> None:
    layer, x = build(making, AttnWindow(7, sink_tokens=2), sinks=True), torch.tensor(inputs(2, 30))
    full = layer(x).detach()
    cache = CacheManager.for_layers([layer], 2, slack=4)
    parts = []
    for t in range(0, 30, 3):
        step = Step.of(torch.arange(t, t + 3)[None], read=False)
        with torch.no_grad():
            parts.append(layer(x[:, t : t + 3], step, cache=cache[0]))
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-11, rtol=0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="the token right before is not held"):
        layer(x[:, :3], Step.of(torch.arange(40, 43)[None], read=False), cache=cache[0])


@pytest.mark.cuda
def test_on_a_gpu_too() -> None:
    for window in WINDOWS:
        layer = Attention(64, 4, kv_heads=2, head_dim=32, window=window, sinks=True, bias=ForgetBias(64, 4))
        x = torch.randn(2, 90, 64, generator=torch.Generator().manual_seed(2))
        full = layer.double()(x.double()).detach()
        layer = layer.float().cuda()
        for chunk in (1, 8, 31):
            cache = CacheManager.for_layers([layer], 2)
            got = torch.cat([forward(layer, c.cuda(), cache, c.shape[1]).cpu() for c in x.split(chunk, 1)], 1)
            torch.testing.assert_close(got.double(), full, atol=2e-5, rtol=0)


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_tokens_that_are_left_out() -> None:
    layer, x = build(making), torch.tensor(inputs(1, 12))
    cache = CacheManager.for_layers([layer], 1)
    forward(layer, x[:, :5], cache, 5)
    before = [tensor.float().nan_to_num(7.0) for tensor in cache.memory]  # most of it was never written
    for positions in ([7, 8, 9], [5, 7, 8]):
        with torch.no_grad(), pytest.raises(ValueError, match=r"RollingKVCache\.previous: positions skip tokens"):
            layer(x[:, 5:8], torch.tensor([positions]), cache=cache[0])
    assert all(torch.equal(a, b.float().nan_to_num(7.0)) for a, b in zip(before, cache.memory, strict=True))


def test_where_it_cannot_be_used() -> None:
    plain, x = Attention(M, HEADS, head_dim=6), torch.randn(1, 4, M)
    with pytest.raises(ValueError, match=r"ForgetBias needs more of a layer than one call; give it to Attention"):
        plain(x, bias=ForgetBias(M, HEADS))
    with pytest.raises(ValueError, match="the layer has its own, ForgetBias"):
        build(making, dtype=torch.float32)(x, bias=torch.zeros(1, 1, 4, 4))
    layer = build(making)
    wrong = CacheManager(1, [layer.window], kv_heads=2, head_dim=6, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(ValueError, match="keeps no numbers for a bias"):
        layer(x.double(), wrong.positions(4), cache=wrong[0])
    q = torch.zeros(1, HEADS, 1, 6)
    with pytest.raises(ValueError, match="are kept by the layer"):
        ForgetBias(M, HEADS).terms(BiasContext(torch.zeros(1, 1).long(), torch.zeros(1, 1).long(), q))
