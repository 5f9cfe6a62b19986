"""Merging attention over disjoint keys, and the gate of a feed-forward block: every implementation against fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compute import compute

from longburn.kernels.attend import merging
from longburn.kernels.attend.merging import merge
from longburn.kernels.feedforward import GATED


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(0, 5, 33), (0, 1, 2, 30, 33)], ids=str)
def test_parts_of_the_keys_give_the_whole(impl: str, dtype: torch.dtype, cuts: tuple[int, ...]) -> None:
    """Some queries see nothing of a part, one sees nothing at all; scores far from zero."""
    g = torch.Generator().manual_seed(len(cuts))
    B, H, T, S, D = 2, 3, 7, 33, 20
    scores = torch.randn(B, H, T, S, generator=g, dtype=torch.float64) * 20 + 300
    v = torch.randn(B, H, S, D, generator=g, dtype=torch.float64)
    scores[:, :, 2, :30] = -torch.inf
    scores[:, 1, 4] = -torch.inf
    parts = []
    for a, b in itertools.pairwise(cuts):
        out = scores[..., a:b].softmax(-1).nan_to_num() @ v[:, :, a:b]
        strided = torch.empty(B, T, H, D, dtype=dtype).transpose(1, 2).copy_(out)
        parts.append((strided, scores[..., a:b].logsumexp(-1).float().transpose(1, 2).contiguous().transpose(1, 2)))
    out, lse = compute(merging.OPERATION, impl, parts)
    wanted = scores.softmax(-1).nan_to_num() @ v
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert (out.double() - wanted).abs().max() <= 4 * max(
        eps, 3e-5
    ) * wanted.abs().max()  # lse of 300 has 3e-5 to spare
    torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=1e-6, atol=0)


def test_one_part_is_itself() -> None:
    part = (torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2))
    assert merge([part]) is part


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 66), (70, 512)], ids=str)
def test_gate(impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 6).to(dtype)
    got = compute(GATED, impl, x)
    gate, up = x.double().chunk(2, -1)
    wanted = F.silu(gate) * up
    assert got.shape == wanted.shape
    plain = (F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]).double()
    assert (got - wanted).abs().max() <= 2 * (plain - wanted).abs().max() + 4e-7 * wanted.abs().max()
