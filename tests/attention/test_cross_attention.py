"""Attention to a context, against PyTorch's own dense attention; and keys and values that outlive a call."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longburn import CrossAttention, CrossKeyValues, use_impl

NAN = float("nan")


def layer_of(**settings) -> CrossAttention:
    torch.manual_seed(0)
    sizes = {"context_dim": 10, "kv_heads": 2, "head_dim": 5} | settings
    layer = CrossAttention(12, 6, dtype=torch.float64, **sizes)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def manual(
    layer: CrossAttention, x: Tensor, context: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    B, T, D = x.shape[0], x.shape[1], layer.head_dim
    q = F.linear(x, layer.q.weight, layer.q.bias).view(B, T, -1, D).transpose(1, 2)
    k, v = F.linear(context, layer.kv.weight, layer.kv.bias).chunk(2, -1)
    k, v = (a.view(B, -1, layer.kv_heads, D).transpose(1, 2) for a in (k, v))
    if layer.q_norm is not None:
        q, k = (F.rms_norm(a, (D,), norm.weight, norm.eps) for a, norm in ((q, layer.q_norm), (k, layer.k_norm)))
    k, v = (a.repeat_interleave(layer.heads // layer.kv_heads, 1) for a in (k, v))
    added = torch.zeros(B, layer.heads, T, context.shape[1], dtype=x.dtype) if bias is None else bias
    if mask is not None:
        added = added.masked_fill(~mask[:, None, None, :], -math.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=layer.scale)
    return F.linear(out.transpose(1, 2).flatten(2), layer.out.weight, layer.out.bias)


def data(B: int = 3, T: int = 7, S: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, 12, generator=g, dtype=torch.float64)
    context = torch.randn(B, S, 10, generator=g, dtype=torch.float64)
    mask = torch.tensor([[True] * S, [True] * 4 + [False] * (S - 4), [False] * 3 + [True, False] * 4])
    return x, context, mask


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"kv_heads": 6}, {"kv_heads": 1}, {"qk_norm": 1e-3}, {"qkv_bias": True, "out_bias": True}, {"scale": 0.7}],
    ids=str,
)
def test_every_query_sees_the_whole_context(settings: dict, impl: str) -> None:
    layer, (x, context, _) = layer_of(**settings), data()
    with use_impl(impl):
        torch.testing.assert_close(layer(x, context), manual(layer, x, context), atol=1e-10, rtol=1e-10)
        with torch.no_grad():
            torch.testing.assert_close(layer(x, context), manual(layer, x, context), atol=1e-10, rtol=1e-10)
            one = x[:, :1]  # a single query, which has kernels of its own
            torch.testing.assert_close(layer(one, context), manual(layer, one, context), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_what_is_masked_may_be_anything(impl: str) -> None:
    layer, (x, context, mask) = layer_of(qk_norm=1e-6), data()
    wanted = manual(layer, x, context, mask)
    poisoned = context.masked_fill(~mask[..., None], NAN)
    with use_impl(impl), torch.no_grad():
        held = layer.keys_values(poisoned, mask)
        torch.testing.assert_close(layer(x, held), wanted, atol=1e-10, rtol=1e-10)


def test_a_row_without_a_context_gives_the_projection_of_zero() -> None:
    layer, (x, context, mask) = layer_of(out_bias=True), data()
    mask[1] = False
    with torch.no_grad():
        got = layer(x, layer.keys_values(context, mask))
    torch.testing.assert_close(got[1], layer.out.bias.expand(7, -1))
    torch.testing.assert_close(got[0], manual(layer, x, context)[0], atol=1e-10, rtol=1e-10)


def test_kept_keys_and_values_equal_computing_them_again() -> None:
    """The context is projected once for all steps of a loop: bit for bit what each step would compute."""
    layer, (x, context, mask) = layer_of(), data()
    with torch.no_grad():
        held = layer.keys_values(context)
        assert isinstance(held, CrossKeyValues)
        assert held.k.shape == held.v.shape == (3, 2, 11, 5)
        for step in range(3):
            assert torch.equal(layer(x + step, held), layer(x + step, context))
        calls = []
        layer.kv.register_forward_hook(lambda *_: calls.append(1))
        layer(x, held)
        assert calls == []
        assert layer.keys_values(context, mask).pos[1].tolist() == [0, 1, 2, 3, *[-1] * 7]
        # Kernels that are told so do not look at positions: a mask must never pass for a full context.
        assert held.full
        assert not layer.keys_values(context, mask).full
        assert not layer.keys_values(context, torch.ones_like(mask)).full


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (3, 6)])
def test_a_bias_is_added(shape: tuple[int, int]) -> None:
    layer, (x, context, mask) = layer_of(), data()
    bias = torch.randn(*shape, 7, 11, dtype=torch.float64)
    wanted = manual(layer, x, context, mask, bias.expand(3, 6, 7, 11))
    torch.testing.assert_close(layer(x, layer.keys_values(context, mask), bias=bias), wanted, atol=1e-10, rtol=1e-10)


def test_gradients_reach_everything() -> None:
    layer, (x, context, mask) = layer_of(qk_norm=1e-3, qkv_bias=True), data()
    mine = [x.clone().requires_grad_(), context.clone().requires_grad_(), *layer.parameters()]
    theirs = [torch.autograd.grad(manual(layer, mine[0], mine[1], mask).square().sum(), mine)]
    ours = [torch.autograd.grad(layer(mine[0], layer.keys_values(mine[1], mask)).square().sum(), mine)]
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"CrossAttention: dim 12, heads 5, kv_heads 5, head_dim None"):
        CrossAttention(12, 5)
    layer, (x, context, mask) = layer_of(), data()
    with pytest.raises(ValueError, match=r"keys_values: mask is torch.float32 \(3, 11\), wanted bool \(3, 11\)"):
        layer.keys_values(context, mask.float())
    with pytest.raises(ValueError, match=r"mask is torch.bool \(2, 11\), wanted bool \(3, 11\)"):
        layer.keys_values(context, mask[:2])
    with pytest.raises(ValueError, match=r"bias is \(1, 1, 7, 12\), wanted \[B\|1, H\|1, T, S\]"):
        layer(x, context, bias=torch.zeros(1, 1, 7, 12, dtype=torch.float64))
