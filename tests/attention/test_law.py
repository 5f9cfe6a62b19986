"""The law: streaming equals the full forward for every way of cutting the stream, against a separate fp64 oracle."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Weights, attention

from longburn import Alibi, Attention, AttnWindow, CacheManager, RotaryEncoding, use_impl

M = 7
TOLERANCE = 1e-10  # in fp64
TOLERANCE_32 = 2e-5


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Uninitialised memory holds NaN, so that whoever looks at a slot that nothing was written to shows it."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@st.composite
def cases(draw):
    window = draw(st.sampled_from([None, 1, 2, 3, 7, 16]))
    sink_tokens = draw(st.sampled_from([0, 1, 2, 5])) if window is not None else 0
    rope = draw(st.booleans())
    relative = rope and sink_tokens > 0 and draw(st.booleans())
    rows = draw(st.integers(1, 3))
    lengths = [draw(st.integers(1, 40)) for _ in range(rows)]
    if draw(st.booleans()):
        lengths = [lengths[0]] * rows
    reach = window or 5
    return {
        "window": window,
        "sink_tokens": sink_tokens,
        "relative": relative,
        "theta": draw(st.sampled_from([10.0, 10000.0])) if rope else None,
        "kv_heads": draw(st.sampled_from([1, 2, 3])),
        "groups": draw(st.sampled_from([1, 2, 3])),
        "head_dim": draw(st.sampled_from([2, 6, 8])),
        "slack": draw(st.sampled_from([0, 1, 5])),
        "sinks": draw(st.booleans()),
        "bias": draw(st.sampled_from([None, "alibi", "dense"])),
        "lengths": lengths,
        "chunks": draw(
            st.lists(
                st.sampled_from([1, 1, 2, 3, 5, 11, max(1, reach - 1), reach, reach + 1, 2 * reach + 1]),
                min_size=1,
                max_size=6,
            )
        ),
        "left": draw(st.booleans()),
        "fixed": draw(st.booleans()),
        "provisional": draw(st.booleans()),
        "rewind": draw(st.sampled_from([0, 0, 1, 2, 6])),
        "impl": draw(st.sampled_from(["auto", "auto", "reference"])),
        "seed": draw(st.integers(0, 2**20)),
    }


def build(case):
    generator = np.random.default_rng(case["seed"])
    H, D = case["kv_heads"] * case["groups"], case["head_dim"]
    w = Weights(
        generator.normal(size=(H, D, M)),
        generator.normal(size=(case["kv_heads"], D, M)),
        generator.normal(size=(case["kv_heads"], D, M)),
        generator.normal(size=(M, H * D)),
    )
    sinks = 3 * generator.normal(size=H) if case["sinks"] else None
    layer = Attention(
        M,
        H,
        kv_heads=case["kv_heads"],
        head_dim=D,
        window=AttnWindow(case["window"], sink_tokens=case["sink_tokens"], relative_sinks=case["relative"]),
        rope=RotaryEncoding(D, theta=case["theta"]) if case["theta"] else None,
        sinks=case["sinks"],
        dtype=torch.float64,
    )
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.tensor(np.concatenate([a.reshape(-1, M) for a in (w.q, w.k, w.v)])))
        layer.out.weight.copy_(torch.tensor(w.out))
        if sinks is not None:
            layer.sinks.copy_(torch.tensor(sinks))
    return generator, w, sinks, layer


def rows_of(take, tokens, left):
    """Each row's next tokens as one padded batch, and which columns hold them."""
    width = max(len(t) for t in take)
    x = torch.full((len(take), width, M), float("nan"), dtype=torch.float64)
    ids = torch.full((len(take), width), -1)
    for b, t in enumerate(take):
        columns = slice(width - len(t), width) if left else slice(0, len(t))
        x[b, columns] = tokens[b][t]
        ids[b, columns] = 0
    return x, ids


def stream(case, layer, tokens, biases):
    lengths = case["lengths"]
    cache = CacheManager(
        len(lengths),
        [layer.window],
        kv_heads=case["kv_heads"],
        head_dim=case["head_dim"],
        max_length=max(lengths) if case["fixed"] else None,
        slack=case["slack"],
        dtype=layer.dtype,
        device=layer.device,
    )
    at = [0] * len(lengths)
    out = [np.full((n, M), np.nan) for n in lengths]
    turn = 0
    rewinds = 3 if case["rewind"] else 0
    while any(a < n for a, n in zip(at, lengths, strict=True)):
        size = case["chunks"][turn % len(case["chunks"])]
        take = [list(range(a, min(n, a + size))) for a, n in zip(at, lengths, strict=True)]
        if len(set(lengths)) > 1 and turn % 3 == 2:  # the first row pauses while the others run on
            take[0] = take[0] if len(take) == 1 or at[1:] == lengths[1:] else []
        x, ids = rows_of(take, tokens, case["left"])
        step = cache.positions(ids)
        bias = None
        if case["bias"] == "alibi":
            bias = Alibi(layer.heads)
            bias.slopes = bias.slopes.to(layer.device, layer.dtype)
        elif case["bias"] == "dense":
            bias = torch.zeros(len(lengths), layer.heads, x.shape[1], max(lengths), dtype=torch.float64)
            for b, t in enumerate(take):
                columns = slice(x.shape[1] - len(t), None) if case["left"] else slice(0, len(t))
                bias[b, :, columns] = torch.tensor(biases[b][:, t])
            bias = bias.to(layer.device, layer.dtype)
        passes = [x]
        if case["provisional"] and x.shape[1] <= (case["slack"] + 1 if case["window"] else 99):
            passes.insert(
                0, torch.where(x.isnan(), x, x.flip(-1) + 1)
            )  # another draft of the same positions, never committed
        for draft in passes:
            y = layer(draft.nan_to_num().to(layer.device, layer.dtype), step, cache=cache[0], bias=bias).cpu()
            step = cache.positions(ids)
        cache.advance(step)
        for b, t in enumerate(take):
            columns = slice(x.shape[1] - len(t), None) if case["left"] else slice(0, len(t))
            out[b][t] = y[b, columns].numpy()
            at[b] += len(t)
        if rewinds and turn % 2:  # take tokens back and stream them again
            rewinds -= 1
            back = [min(case["rewind"], a - cache[0].earliest_restart(b)) for b, a in enumerate(at)]
            cache.rewind(back)
            at = [a - n for a, n in zip(at, back, strict=True)]
            for b, a in enumerate(at):
                out[b][a:] = np.nan
        turn += 1
    return out, cache


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_streaming_equals_the_oracle(case):
    check(case, build(case), TOLERANCE)


@pytest.mark.cuda
@pytest.mark.parametrize("head_dim", [32, 64, 80])
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_on_a_gpu_too(case, head_dim):
    generator, w, sinks, layer = build({**case, "head_dim": head_dim, "impl": "auto"})
    check({**case, "head_dim": head_dim}, (generator, w, sinks, layer.float().cuda()), TOLERANCE_32)


def check(case, built, tolerance):
    generator, w, sinks, layer = built
    longest = max(case["lengths"])
    tokens = [generator.normal(size=(n, M)) for n in case["lengths"]]
    biases = [generator.normal(size=(layer.heads, longest, longest)) for _ in case["lengths"]]
    slopes = Alibi(layer.heads).slopes.double().numpy() if case["bias"] == "alibi" else None
    with torch.no_grad(), use_impl(case["impl"]):
        got, cache = stream(case, layer, [torch.tensor(t) for t in tokens], biases)
    assert cache.row_positions == tuple(case["lengths"])
    for b, x in enumerate(tokens):
        wanted = attention(
            x,
            w,
            window=case["window"],
            sink_tokens=case["sink_tokens"],
            relative=case["relative"],
            theta=case["theta"],
            sinks=sinks,
            slopes=slopes,
            dense=biases[b] if case["bias"] == "dense" else None,
        )
        error = np.abs(got[b] - wanted).max(initial=0.0)
        assert error <= tolerance * max(1.0, np.abs(wanted).max(initial=0.0)), error
