"""The attention layer: the full forward with its gradients, streaming in fp32, and every option of the constructor."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layers import THETA, M, build, forward, padded, stream, tokens
from torch import Tensor

from longburn import Alibi, Attention, AttnWindow, CacheManager, DenseBias, Rope3dEncoding, RotaryEncoding, use_impl

WINDOWS = [
    None,
    AttnWindow(1),
    AttnWindow(5),
    AttnWindow(4, sink_tokens=2),
    AttnWindow(4, sink_tokens=2, relative_sinks=True),
]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_full_forward_equals_the_oracle(window: AttnWindow | None, heads: int, kv_heads: int, impl: str) -> None:
    one = build(window, heads=heads, kv_heads=kv_heads, sinks=heads == 6)
    x = tokens(2, 17)
    with use_impl(impl):
        for grad in (False, True):  # without gradients other kernels may run
            with torch.set_grad_enabled(grad):
                got = one.layer(x)
            for b in range(2):
                torch.testing.assert_close(got[b], one.wanted(x[b]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_gradients_of_training_are_finite_differences_of_the_oracle(window: AttnWindow | None) -> None:
    """Every parameter and the input: the loss of the oracle, moved along a random direction, against the gradient."""
    one = build(window, head_dim=4, sinks=True, seed=3)
    x = tokens(1, 9).requires_grad_()
    cotangent = tokens(9, seed=4)
    (one.layer(x)[0] * cotangent).sum().backward()

    def loss(shift: float, name: str, direction: np.ndarray) -> float:
        other, moved = build(window, head_dim=4, sinks=True, seed=3), x.detach()[0]
        step = shift * direction
        if name == "x":
            moved = moved + torch.tensor(step)
        elif name == "sinks":
            other.sinks[:] += step
        elif name == "out":
            other.weights.out[:] += step
        else:
            sizes = [a.size for a in (other.weights.q, other.weights.k, other.weights.v)]
            for a, part in zip(
                (other.weights.q, other.weights.k, other.weights.v),
                np.split(step.reshape(-1), np.cumsum(sizes)[:-1]),
                strict=True,
            ):
                a += part.reshape(a.shape)
        return float((other.wanted(moved) * cotangent).sum())

    generator = np.random.default_rng(7)
    gradients = {
        "x": x.grad[0],
        "qkv": one.layer.qkv.weight.grad,
        "out": one.layer.out.weight.grad,
        "sinks": one.layer.sinks.grad,
    }
    for name, gradient in gradients.items():
        direction = generator.normal(size=tuple(gradient.shape))
        h = 1e-5
        wanted = (loss(h, name, direction) - loss(-h, name, direction)) / (2 * h)
        assert float((gradient.numpy() * direction).sum()) == pytest.approx(wanted, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("chunks", [(1,), (7,), (16, 1), (40,)])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_streaming_equals_the_full_forward_in_fp32(window: AttnWindow | None, chunks: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = Attention(64, 4, kv_heads=2, window=window, rope=RotaryEncoding(16), sinks=True, qk_norm=1e-6)
    x = torch.randn(2, 61, 64)
    with torch.no_grad():
        full = layer(x)
    got = stream(layer, x, CacheManager.for_layers([layer], 2, slack=2), chunks)
    torch.testing.assert_close(got, full, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("bias", [None, "alibi"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (8, 1)])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_decoding_ragged_rows_in_fp32(window: AttnWindow | None, heads: tuple[int, int], bias: str | None) -> None:
    """A few tokens a call at a head size that is a multiple of 16: the calls for which there are kernels in C, which
    know no fp64. Rows of different lengths, past the wrap, against the oracle."""
    one = build(window, heads=heads[0], kv_heads=heads[1], head_dim=16, sinks=True, dtype=torch.float32)
    policy = Alibi(heads[0]) if bias else None
    rows = [tokens(n, seed=n).float() for n in (29, 4, 17)]
    x, ids = padded(rows, left=False)
    cache = one.cache(batch=3, slack=1)
    parts = []
    for at in range(0, 29, 2):
        step = cache.positions(ids[:, at : at + 2])
        with torch.no_grad():
            parts.append(one.layer(x[:, at : at + 2], step, cache=cache[0], bias=policy))
        cache.advance(step)
    got = torch.cat(parts, 1).double()
    for b, row in enumerate(rows):
        wanted = one.wanted(row, slopes=policy.slopes.double().numpy()) if policy else one.wanted(row)
        assert (got[b, : len(row)] - wanted).abs().max() < 1e-5 * wanted.abs().max()


def manual(layer: Attention, x: Tensor, *, scale: float, prescale: bool) -> Tensor:
    """The layer's formula, written with PyTorch's own functions on one head at a time."""
    T, H, K, D = x.shape[1], layer.heads, layer.kv_heads, layer.head_dim
    fused = F.linear(x, layer.qkv.weight, layer.qkv.bias)
    q, k, v = fused.split([H * D, K * D, K * D], -1)
    factor, scale = (math.sqrt(scale), 1.0) if prescale else (1.0, scale)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    heads = []
    for h in range(H):
        own = slice(h // (H // K) * D, h // (H // K) * D + D)
        qh, kh, vh = q[..., h * D : (h + 1) * D], k[..., own], v[..., own]
        if layer.q_norm is not None:
            qh = qh / (qh.square().mean(-1, keepdim=True) + layer.q_norm.eps).sqrt() * layer.q_norm.weight
            kh = kh / (kh.square().mean(-1, keepdim=True) + layer.k_norm.eps).sqrt() * layer.k_norm.weight
        scores = (factor * qh) @ (factor * kh).transpose(-1, -2) * scale
        heads.append(scores.masked_fill(~causal, -math.inf).softmax(-1) @ vh)
    return F.linear(torch.cat(heads, -1), layer.out.weight, layer.out.bias)


@pytest.mark.parametrize("prescale", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("qk_norm", [None, 1e-3])
@pytest.mark.parametrize("scale", [None, 0.9])
def test_every_option_of_the_constructor(
    prescale: bool, biased: bool, qk_norm: float | None, scale: float | None
) -> None:
    torch.manual_seed(1)
    layer = Attention(
        12,
        6,
        kv_heads=3,
        head_dim=5,
        qk_norm=qk_norm,
        qkv_bias=biased,
        out_bias=biased,
        scale=scale,
        prescale=prescale,
        dtype=torch.float64,
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    wanted = manual(layer, x, scale=scale or 1 / math.sqrt(5), prescale=prescale)
    torch.testing.assert_close(layer(x), wanted, atol=1e-10, rtol=1e-10)
    cached = stream(layer, x, CacheManager.for_layers([layer], 2), (4, 1))
    torch.testing.assert_close(cached, wanted, atol=1e-10, rtol=1e-10)


def test_prescaling_changes_what_the_cache_holds_and_nothing_else() -> None:
    """q and k take the root of the scale each, so that the product of half precision scores stays small."""
    torch.manual_seed(2)
    plain = Attention(8, 2, dtype=torch.float64)
    scaled = Attention(8, 2, prescale=True, dtype=torch.float64)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(plain(x), scaled(x))
    caches = [CacheManager.for_layers([layer], 1) for layer in (plain, scaled)]
    for layer, cache in zip((plain, scaled), caches, strict=True):
        forward(layer, x, cache)
    ratio = caches[1][0].memory[0][:, :, :6] / caches[0][0].memory[0][:, :, :6]
    torch.testing.assert_close(ratio, torch.full_like(ratio, (1 / math.sqrt(4)) ** 0.5))


def test_positions_shift_nothing_under_rope() -> None:
    """Without a cache too, positions are an argument: a later stretch of the same tokens gives the same."""
    one = build(AttnWindow(5))
    x = tokens(1, 11)
    shifted = one.layer(x, torch.arange(1000, 1011)[None])
    torch.testing.assert_close(shifted, one.layer(x), atol=1e-10, rtol=0)


def test_rows_without_a_cache_may_be_ragged() -> None:
    one = build(AttnWindow(5, sink_tokens=1))
    rows = [tokens(6, seed=1), tokens(11, seed=2)]
    for left in (False, True):
        x, ids = padded(rows, left=left)
        positions = torch.where(ids < 0, -1, (ids >= 0).cumsum(1) - 1)
        with torch.no_grad():
            got = one.layer(x, positions)
        for b, row in enumerate(rows):
            torch.testing.assert_close(got[b][ids[b] >= 0], one.wanted(row), atol=1e-10, rtol=0)


def test_layers_of_one_step_share_its_angles() -> None:
    """What depends on the positions alone is computed once a call, however many layers there are."""
    rope = RotaryEncoding(6, theta=THETA)
    calls = []
    layers = [Attention(M, 4, head_dim=6, rope=rope, dtype=torch.float64) for _ in range(3)]
    cache = CacheManager.for_layers(layers, 1)
    step = cache.positions(5)
    original = RotaryEncoding.angles
    try:
        RotaryEncoding.angles = lambda self, *a, **k: calls.append(self) or original(self, *a, **k)  # type: ignore[method-assign]
        with torch.no_grad():
            for layer, kv in zip(layers, cache, strict=True):
                layer(tokens(1, 5), step, cache=kv)
    finally:
        RotaryEncoding.angles = original  # type: ignore[method-assign]
    assert calls == [rope]


# --- bias ------------------------------------------------------------------------------------------------------------


def test_dense_bias_goes_by_position_through_a_wrapped_ring() -> None:
    """Columns are absolute key positions; the ring holds them in another order. Training and streaming agree with the
    oracle, which reads the same matrix."""
    window = AttnWindow(5, sink_tokens=2)
    one = build(window)
    x, T = tokens(1, 23), 23
    matrix = torch.randn(1, 4, T, T, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    wanted = one.wanted(x[0], dense=matrix[0].numpy())
    with torch.no_grad():
        torch.testing.assert_close(one.layer(x, bias=matrix)[0], wanted, atol=1e-10, rtol=0)
    for chunks, slack in itertools.product(((1,), (4,), (11, 3)), (0, 3)):
        cache, at, parts = one.cache(slack=slack), 0, []
        while at < T:
            n = chunks[min(len(parts), len(chunks) - 1)]
            step = cache.positions(min(n, T - at))
            rows = matrix[:, :, at : at + n]
            bias = rows if len(parts) % 2 else DenseBias(rows[..., : step.bound])
            with torch.no_grad():
                parts.append(one.layer(x[:, at : at + n], step, cache=cache[0], bias=bias))
            cache.advance(step)
            at += n
        torch.testing.assert_close(torch.cat(parts, 1)[0], wanted, atol=1e-10, rtol=0)


def test_alibi_over_a_stream() -> None:
    one = build(AttnWindow(6, sink_tokens=1), rope=False)
    x = tokens(1, 19)
    bias = Alibi(4)
    wanted = one.wanted(x[0], slopes=bias.slopes.double().numpy())
    cache, parts = one.cache(), []
    for at in range(0, 19, 4):
        step = cache.positions(min(4, 19 - at))
        with torch.no_grad():
            parts.append(one.layer(x[:, at : at + 4], step, cache=cache[0], bias=bias))
        cache.advance(step)
    torch.testing.assert_close(torch.cat(parts, 1)[0], wanted, atol=1e-10, rtol=0)


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 5), "dim 12, heads 5, kv_heads 5, head_dim None"),
        ((12, 4, 3), "dim 12, heads 4, kv_heads 3"),
        ((12, 0), "heads 0"),
        ((12, 4, 0), "kv_heads 0"),
    ],
)
def test_sizes_that_do_not_divide(arguments: tuple[int, ...], message: str) -> None:
    dim, heads, *kv = arguments
    with pytest.raises(ValueError, match=f"Attention: .*{message}.*wanted heads a multiple of kv_heads"):
        Attention(dim, heads, kv_heads=kv[0] if kv else None)


def test_relative_sinks_of_three_axes_are_refused() -> None:
    rope = Rope3dEncoding(12, (2, 3))
    with pytest.raises(ValueError, match="relative_sinks clamp positions of tokens, which for Rope3dEncoding are rows"):
        Attention(12, 1, window=AttnWindow(4, sink_tokens=1, relative_sinks=True), rope=rope)


def test_relative_sinks_need_rope() -> None:
    with pytest.raises(ValueError, match="relative_sinks clamp the distance that rope sees, but rope is None"):
        Attention(12, 4, window=AttnWindow(4, sink_tokens=1, relative_sinks=True))


def test_a_cache_needs_positions_of_its_length() -> None:
    one = build()
    cache = one.cache()
    x = tokens(1, 3)
    with pytest.raises(ValueError, match=r"a cache needs positions; take them from CacheManager.positions"):
        one.layer(x, cache=cache[0])
    with pytest.raises(ValueError, match="3 tokens, but positions for 2"):
        one.layer(x, cache.positions(2), cache=cache[0])


def test_a_window_that_looks_ahead_cannot_stream() -> None:
    layer = Attention(12, 4, window=AttnWindow.two_sided(3, 2))
    cache = CacheManager(1, [AttnWindow()], kv_heads=4, head_dim=3)
    with pytest.raises(ValueError, match="a window with lookahead 2 sees later keys, which no cache holds yet"):
        layer(torch.zeros(1, 2, 12), cache.positions(2), cache=cache[0])


def test_a_bias_of_the_wrong_shape() -> None:
    one = build()
    with pytest.raises(ValueError, match=r"DenseBias: values are \(1, 4, 2, 3\).*3 queries"):
        one.layer(tokens(1, 3), bias=torch.zeros(1, 4, 2, 3))


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, AttnWindow(5, sink_tokens=2, relative_sinks=True)], ids=str)
def test_the_full_forward_compiles_into_one_graph(window: AttnWindow | None) -> None:
    torch.manual_seed(0)
    layer = Attention(32, 4, kv_heads=2, window=window, rope=RotaryEncoding(8), sinks=True, qk_norm=1e-6)
    x = torch.randn(2, 17, 32)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).square().sum().backward()
    got = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    for a, parameter in zip(got, layer.parameters(), strict=True):
        torch.testing.assert_close(a, parameter.grad, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_a_rope_for_other_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="rope is for heads of 128, these are of 16"):
        Attention(64, 4, rope=RotaryEncoding(128))
