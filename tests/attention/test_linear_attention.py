"""Linear attention: both forms against the paper's sums, one token at a time, and a causal stream of constant state."""

import pytest
import torch
from torch import Tensor

from longburn import LinearAttention, LinearState, RotaryEncoding

NAN = float("nan")
M, H, D = 12, 3, 4


def layer_of(*, causal: bool, rope: bool = False, dtype: torch.dtype = torch.float64, **settings) -> LinearAttention:
    torch.manual_seed(0)
    encoding = RotaryEncoding(D, theta=100.0) if rope else None
    return LinearAttention(M, H, head_dim=D, causal=causal, rope=encoding, dtype=dtype, **settings)


def manual(layer: LinearAttention, x: Tensor, held: Tensor | None = None) -> Tensor:
    """`sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)` over all j, or j <= i, as two loops over tokens."""
    B, T, _ = x.shape
    held = torch.ones(B, T, dtype=torch.bool) if held is None else held
    qkv = x.nan_to_num() @ layer.qkv.weight.T + (0 if layer.qkv.bias is None else layer.qkv.bias)
    q, k, v = qkv.view(B, T, 3, H, D).unbind(2)
    if layer.rope is not None:
        angle = torch.arange(T)[:, None] * 100.0 ** (-2.0 * torch.arange(D // 2, dtype=torch.float64) / D)
        cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
        q, k = (
            torch.cat(
                [a[..., : D // 2] * cos - a[..., D // 2 :] * sin, a[..., D // 2 :] * cos + a[..., : D // 2] * sin], -1
            )
            for a in (q, k)
        )
    q, k = q.clamp_min(0), k.clamp_min(0)
    out = torch.zeros(B, T, H, D, dtype=x.dtype)
    for b in range(B):
        for i in range(T):
            over, under = torch.zeros(H, D, dtype=x.dtype), torch.zeros(H, dtype=x.dtype)
            for j in range(i + 1 if layer.causal else T):
                if held[b, i] and held[b, j]:
                    weight = (q[b, i] * k[b, j]).sum(-1)
                    over, under = over + weight[:, None] * v[b, j], under + weight
            out[b, i] = over / (under + layer.eps)[:, None]
    return out.flatten(2) @ layer.out.weight.T + (0 if layer.out.bias is None else layer.out.bias)


def tokens(B: int, T: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_sums(causal: bool, rope: bool, biased: bool) -> None:
    layer = layer_of(causal=causal, rope=rope, qkv_bias=biased, out_bias=biased, eps=1e-6)
    x = tokens(2, 13)
    torch.testing.assert_close(layer(x), manual(layer, x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_masked_may_be_anything(causal: bool) -> None:
    """By mask or by positions; in the middle of a row too."""
    layer = layer_of(causal=causal)
    x = tokens(3, 9)
    held = torch.ones(3, 9, dtype=torch.bool)
    held[0, 6:] = held[1, :4] = held[2, 3:5] = False
    wanted = manual(layer, x, held)
    poisoned = x.masked_fill(~held[..., None], NAN)
    with torch.no_grad():
        torch.testing.assert_close(layer(poisoned, mask=held), wanted, atol=1e-10, rtol=1e-10)
        positions = torch.where(held, torch.arange(9)[None], -1)
        torch.testing.assert_close(layer(poisoned, positions), wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("chunks", [(1,), (2, 7, 1), (63, 64, 65), (64,), (200,)])
def test_a_causal_stream_equals_the_full_forward(chunks: tuple[int, ...], rope: bool) -> None:
    """Whatever the chunks, below, at and above the size in which the layer itself works."""
    layer = layer_of(causal=True, rope=rope)
    x = tokens(2, 150)
    full = layer(x)
    torch.testing.assert_close(full[:, :40], manual(layer, x[:, :40]), atol=1e-9, rtol=1e-9)
    state, at, parts = LinearState(2, H, D, dtype=torch.float64), 0, []
    size = state.nbytes
    with torch.no_grad():
        while at < 150:
            n = chunks[len(parts) % len(chunks)]
            part = x[:, at : at + n]
            parts.append(layer(part, torch.arange(at, at + part.shape[1])[None], state=state))
            at += n
            assert state.nbytes == size == 2 * H * D * (D + 1) * 8
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-10, rtol=1e-10)


def test_rows_pause_and_begin_anew() -> None:
    """A ragged stream; a row that is reset is as if it had never been."""
    layer = layer_of(causal=True, rope=True)
    x = tokens(2, 12)
    state = LinearState(2, H, D, dtype=torch.float64)
    with torch.no_grad():
        layer(x[:, :5], torch.tensor([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]]), state=state)
        state.reset([0])
        got = layer(x[:, 5:8], torch.tensor([[0, 1, 2], [3, -1, -1]]), state=state)
    torch.testing.assert_close(got[0], manual(layer, x[:1, 5:8])[0], atol=1e-10, rtol=1e-10)
    second = torch.cat([x[1:, 2:5], x[1:, 5:6]], 1)
    torch.testing.assert_close(got[1, 0], manual(layer, second)[0, 3], atol=1e-10, rtol=1e-10)
    state.reset()
    assert (state.sum == 0).all()


def test_half_precision_tokens_keep_a_wide_state() -> None:
    layer = layer_of(causal=True, dtype=torch.bfloat16)
    exact = layer_of(causal=True)
    exact.load_state_dict(layer.state_dict())
    x = tokens(1, 300, torch.bfloat16)
    state = LinearState(1, H, D)
    with torch.no_grad():
        got = torch.cat([layer(x[:, a : a + 1], state=state) for a in range(300)], 1)
    assert got.dtype == torch.bfloat16
    assert state.sum.dtype == torch.float32
    wanted = exact(x.double())
    assert (got.double() - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_gradients_flow() -> None:
    for causal in (False, True):
        layer = layer_of(causal=causal, eps=1e-3)
        x = tokens(1, 5).requires_grad_()
        theirs = torch.autograd.grad(manual(layer, x).square().sum(), [x, *layer.parameters()])
        ours = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"LinearAttention: dim 12 is not a multiple of heads 5; give a head_dim"):
        LinearAttention(12, 5)
    state = LinearState(1, H, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="a bidirectional layer sees later tokens and cannot stream"):
        layer_of(causal=False)(tokens(1, 2), state=state)
    with pytest.raises(ValueError, match=r"rope over a stream needs positions; take them from CacheManager"):
        layer_of(causal=True, rope=True)(tokens(1, 2), state=state)
