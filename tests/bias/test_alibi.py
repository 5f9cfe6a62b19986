"""ALiBi against the paper: slopes for any number of heads, and the matrix that they make."""

import math
from fractions import Fraction

import pytest
import torch

from longburn import Alibi, BiasPolicy, attend, use_impl
from longburn.bias import BiasContext, alibi_slopes


def paper(heads: int) -> list[float]:
    """The paper's recipe for n heads: a geometric sequence that starts at 2^(-8/n) with that same ratio; for a number
    that is no power of two, the sequence of the closest lower power, then every other term of the next power's."""
    power = 2 ** math.floor(math.log2(heads))
    exponents = [Fraction(-8 * (i + 1), power) for i in range(power)]
    if power != heads:
        doubled = [Fraction(-8 * (i + 1), 2 * power) for i in range(2 * power)]
        exponents += doubled[0::2][: heads - power]
    return [2.0 ** float(e) for e in exponents]


@pytest.mark.parametrize("heads", range(1, 34))
def test_slopes_are_the_papers(heads: int) -> None:
    slopes = alibi_slopes(heads)
    assert slopes.dtype == torch.float64
    assert slopes.tolist() == pytest.approx(paper(heads), rel=1e-15)
    assert len(set(slopes.tolist())) == heads


def test_slopes_that_the_paper_prints() -> None:
    """For 8 heads 1/2, 1/4, ..., 1/256; for 16 heads that sequence with the square roots in between."""
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(16).tolist() == pytest.approx([2.0 ** (-n / 2) for n in range(1, 17)], rel=1e-15)
    assert alibi_slopes(12)[8:].tolist() == pytest.approx([2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5], rel=1e-15)


def test_more_distance_is_more_penalty() -> None:
    """The sign: with equal scores, the nearest key weighs most, and each step away divides by e^slope."""
    q, k = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 5, 4)
    v = torch.eye(5)[None, None].expand(1, 2, 5, 5)[..., :4].contiguous()
    bias = Alibi(2)
    weights = attend(q, k, v, bias=bias)[0, :, 0]
    for h, slope in enumerate(bias.slopes):
        ratio = weights[h, 1:] / weights[h, :-1]
        torch.testing.assert_close(ratio, torch.full_like(ratio, math.exp(slope)))


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("heads", [1, 3, 8, 12])
def test_equals_the_matrix_written_out(heads: int, impl: str) -> None:
    g = torch.Generator().manual_seed(heads)
    q, k, v = (torch.randn(2, heads, n, 16, generator=g, dtype=torch.float64) for n in (7, 19, 19))
    distance = (torch.arange(12, 19)[:, None] - torch.arange(19)[None]).abs()
    matrix = -torch.tensor(paper(heads), dtype=torch.float64)[:, None, None] * distance
    mask = torch.where(torch.arange(19)[None] <= torch.arange(12, 19)[:, None], 0.0, -math.inf)
    wanted = (q @ k.transpose(-1, -2) / 4 + matrix + mask).softmax(-1) @ v
    with use_impl(impl), torch.no_grad():
        got = attend(q, k, v, bias=Alibi(heads, slopes=alibi_slopes(heads)))
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_slopes_may_be_learned() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 3, generator=g, dtype=torch.float64) for _ in range(3))
    slopes = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: attend(q, k, v, bias=Alibi(2, slopes=s)), (slopes,))


def test_it_is_a_policy_in_its_cheapest_form() -> None:
    policy = Alibi(4)
    assert isinstance(policy, BiasPolicy)
    context = BiasContext(torch.arange(3)[None], torch.arange(9)[None], torch.zeros(1, 4, 3, 8))
    terms = policy.terms(context)
    assert terms.slope is policy.slopes
    assert [term for term in terms if isinstance(term, torch.Tensor)] == [terms.slope]  # nothing of size T or S


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="alibi_slopes: 0 heads, wanted at least 1"):
        alibi_slopes(0)
    with pytest.raises(ValueError, match=r"Alibi: slopes are \(3,\), wanted \(4,\), one a head"):
        Alibi(4, slopes=torch.zeros(3))
