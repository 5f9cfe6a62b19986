"""The arguments of `attend`, at their limits and beyond them."""

import math

import pytest
import torch
from torch import Tensor

from longburn import AttnWindow, CrossAttention, attend, attend_with_lse, merge, use_impl

B, H, K, T, S, D = 2, 4, 2, 3, 5, 8


def tensors(**sizes: int) -> list[Tensor]:
    n = {"B": B, "H": H, "K": K, "T": T, "S": S, "D": D} | sizes
    g = torch.Generator().manual_seed(0)
    shapes = ((n["B"], n["H"], n["T"], n["D"]), *[(n["B"], n["K"], n["S"], n["D"])] * 2)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("sizes", [{"S": 0}, {"S": 0, "T": 1}, {"T": 0}, {"B": 0}, {"T": 0, "S": 0}], ids=str)
@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_to_attend_to(sizes: dict[str, int], impl: str, grad: bool) -> None:
    """No keys, no queries or no rows: zeros of the right shape. (PyTorch's CPU kernel divides by zero and takes the
    process with it.)"""
    q, k, v = tensors(**sizes)
    k_pos = torch.arange(k.shape[2])[None]
    q_pos = torch.arange(q.shape[2])[None]
    with torch.set_grad_enabled(grad), use_impl(impl):
        out = attend(q.requires_grad_(grad), k, v, q_pos=q_pos, k_pos=k_pos, window=AttnWindow(lookahead=None))
        assert out.shape == q.shape
        assert (out == 0).all()


def test_no_keys_beside_learned_sinks_and_in_a_merge() -> None:
    q, k, v = tensors()
    sinks = torch.randn(H, dtype=torch.float64)
    q_pos, k_pos = torch.arange(2, 5)[None], torch.arange(S)[None]
    empty = attend_with_lse(q, k[:, :, :0], v[:, :, :0], q_pos=q_pos, k_pos=k_pos[:, :0], sinks=sinks)
    torch.testing.assert_close(empty[1], sinks[None, :, None].expand(B, H, T))
    rest = attend_with_lse(q, k, v, q_pos=q_pos, k_pos=k_pos)
    wanted = attend_with_lse(q, k, v, q_pos=q_pos, k_pos=k_pos, sinks=sinks)
    torch.testing.assert_close(merge([empty, rest]), wanted)
    bare = attend_with_lse(q, k[:, :, :0], v[:, :, :0], q_pos=q_pos, k_pos=k_pos[:, :0])
    assert (bare[1] == -math.inf).all()
    torch.testing.assert_close(merge([rest, bare]), rest)
    torch.testing.assert_close(merge([bare, bare]), bare)


def test_an_empty_context_gives_the_projection_of_zero() -> None:
    layer = CrossAttention(12, 4, out_bias=True)
    with torch.no_grad():
        got = layer(torch.randn(2, 3, 12), torch.randn(2, 0, 12))
    torch.testing.assert_close(got, layer.out.bias.expand(2, 3, 12))


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_a_bias_of_minus_infinity_hides_a_key(impl: str) -> None:
    q, k, v = tensors()
    bias = torch.randn(1, 1, T, S, dtype=torch.float64)
    bias[..., 1] = bias[..., 0, 2] = -math.inf
    hidden = torch.tensor([[0, -1, 2, 3, 4]])
    with use_impl(impl), torch.no_grad():
        got = attend(q, k, v, q_pos=torch.arange(2, 5)[None], k_pos=torch.arange(S)[None], bias=bias)
        row = attend(q[:, :, 1:], k, v, q_pos=torch.arange(3, 5)[None], k_pos=hidden, bias=bias[:, :, 1:].nan_to_num())
    assert got.isfinite().all()
    torch.testing.assert_close(got[:, :, 1:], row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (H, T, D)}, r"q \(4, 3, 8\).*wanted \[B, H, T, D\] and \[B, K, S, D\]"),
        ({"k": (B, K, S + 1, D)}, r"disagree: wanted the same B and D, as many keys as values"),
        ({"k": (1, K, S, D), "v": (1, K, S, D)}, r"disagree"),
        ({"k": (B, K, S, D + 1)}, r"disagree"),
        ({"k": (B, 3, S, D), "v": (B, 3, S, D)}, r"query heads a multiple of kv heads"),
    ],
)
def test_shapes_that_disagree(change: dict[str, tuple[int, ...]], message: str) -> None:
    given = dict(zip("qkv", tensors(), strict=True)) | {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=f"attend: .*{message}"):
        attend(**given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sinks": torch.zeros(3)}, r"sinks are \(3,\), wanted \(4,\), one logit a query head"),
        ({"q_sink": torch.zeros(B, H, T, D + 1)}, r"q_sink is .*wanted the shape of q"),
        ({"q_pos": torch.arange(T)}, r"q_pos is torch.int64 of shape \(3,\), wanted int64 \[1, 3\] or \[2, 3\]"),
        ({"q_pos": torch.arange(T + 1)[None]}, r"q_pos .*\(1, 4\)"),
        ({"k_pos": torch.zeros(1, S)}, r"k_pos is torch.float32 of shape \(1, 5\), wanted int64 \[1, 5\]"),
        ({"k_pos": torch.zeros(3, S, dtype=torch.int64)}, r"k_pos .*\(3, 5\)"),
    ],
)
def test_arguments_that_do_not_fit(settings: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"attend: {message}"):
        attend(*tensors(), **settings)


def test_types_that_differ() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"q is torch.float32, k torch.float64, v torch.float64: wanted one type"):
        attend(q.float(), k, v)
