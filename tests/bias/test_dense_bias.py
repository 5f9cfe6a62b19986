"""A bias that is written out: by position where it belongs to a layer, by slot where it belongs to one call."""

import math

import pytest
import torch
from torch import Tensor

from longburn import DenseBias, attend
from longburn.bias import BiasContext

B, H, T, S = 2, 3, 4, 6


def context(k_pos: list[list[int]], batch: int = B) -> BiasContext:
    return BiasContext(torch.arange(T)[None], torch.tensor(k_pos), torch.zeros(batch, H, T, 8))


def numbered(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


@pytest.mark.parametrize("shape", [(1, 1), (1, H), (B, 1), (B, H)])
@pytest.mark.parametrize("k_pos", [[[4, 0, 9, -1, 2]], [[4, 0, 9, -1, 2], [-1, 8, 7, 6, 5]]])
def test_columns_are_absolute_positions(shape: tuple[int, int], k_pos: list[list[int]]) -> None:
    values = numbered(*shape, T, 10)
    dense = DenseBias(values).terms(context(k_pos)).dense
    got = dense.expand(B, H, T, 5)
    for b in range(B):
        for slot, j in enumerate(k_pos[b % len(k_pos)]):
            if j >= 0:  # an empty slot may get anything
                assert torch.equal(got[b, :, :, slot], values.expand(B, H, T, 10)[b, :, :, j])


def test_columns_may_begin_later() -> None:
    """A stream need not keep the columns of what it has forgotten."""
    values = numbered(1, 1, T, 3)
    dense = DenseBias(values, first=100).terms(context([[102, -1, 100]])).dense
    assert torch.equal(dense[..., 0], values[..., 2])
    assert torch.equal(dense[..., 2], values[..., 0])


@pytest.mark.parametrize(("k_pos", "wrong"), [([[0, 10]], 10), ([[-1, 3], [12, 2]], 12)])
def test_a_key_without_a_column_is_refused(k_pos: list[list[int]], wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"outside the columns 0 .. 9 \(position {wrong}\)"):
        DenseBias(numbered(1, 1, T, 10)).terms(context(k_pos))
    with pytest.raises(ValueError, match=r"outside the columns 5 .. 14 \(position 3\)"):
        DenseBias(numbered(1, 1, T, 10), first=5).terms(context([[7, 3]]))


@pytest.mark.parametrize("shape", [(1, 1, T + 1, 5), (3, 1, T, 5), (1, 2, T, 5)])
def test_rows_are_the_queries_of_the_call(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"DenseBias: values are .*batch {B}, heads {H} and {T} queries"):
        DenseBias(torch.zeros(shape)).terms(context([[0, 1, 2]]))
    with pytest.raises(ValueError, match=r"DenseBias: values are \(4, 5\), wanted"):
        DenseBias(torch.zeros(4, 5))


def test_gradients_flow_into_what_was_seen() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 3, generator=g, dtype=torch.float64) for n in (2, 3, 3))
    k_pos = torch.tensor([[5, 1, 4]])
    values = torch.randn(1, 2, 2, 7, generator=g, dtype=torch.float64, requires_grad=True)

    def function(values: Tensor) -> Tensor:
        return attend(q, k, v, q_pos=torch.tensor([[4, 6]]), k_pos=k_pos, bias=DenseBias(values))

    assert torch.autograd.gradcheck(function, (values,))
    (gradient,) = torch.autograd.grad(function(values).square().sum(), values)
    assert (gradient[..., [0, 2, 3, 6]] == 0).all()
    assert (gradient[..., 0, 5] == 0).all()  # later than the query at 4
    assert (gradient[..., 1, 5] != 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, H), (B, 1), (B, H)])
def test_a_tensor_given_to_attend_is_aligned_with_the_slots(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, n, 8, generator=g, dtype=torch.float64) for n in (T, S, S))
    k_pos, q_pos = torch.tensor([[3, 0, 5, 1, 4, 2]]), torch.tensor([[2, 3, 4, 5]])
    bias = torch.randn(*shape, T, S, generator=g, dtype=torch.float64)
    mask = torch.where(k_pos[:, None, None] <= q_pos[:, None, :, None], 0.0, -math.inf)
    wanted = (q @ k.transpose(-1, -2) / math.sqrt(8) + bias + mask).softmax(-1) @ v
    got = attend(q, k, v, q_pos=q_pos, k_pos=k_pos, bias=bias)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(T, S), (1, 1, T, S + 1), (1, 2, T, S), (3, 1, T, S), (1, 1, 1, S)])
def test_a_tensor_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    q, k = torch.zeros(B, H, T, 8), torch.zeros(B, H, S, 8)
    with pytest.raises(
        ValueError, match=r"attend: bias is .*wanted \[B\|1, H\|1, T, S\] with B, H, T, S = \(2, 3, 4, 6\)"
    ):
        attend(q, k, k, bias=torch.zeros(shape))
