"""ACE-Step v1's position encoding against its two formulas, channel by channel, and what it is not."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from longburn.kernels import native
from longburn.kernels.registry import use_impl
from longburn.rope import MismatchedRotaryEncoding, RotaryEncoding


def by_formula(x: list[float], position: int, theta: float) -> list[float]:
    """One head of one token."""
    d = len(x)
    a = [position * theta ** (-2 * (n % (d // 2)) / d) for n in range(d)]
    y = [0.0] * d
    for m in range(d // 2):
        even, odd = 2 * m, 2 * m + 1
        y[even] = x[even] * math.cos(a[even]) - x[odd] * math.sin(a[even])
        y[odd] = x[odd] * math.cos(a[odd]) + x[even] * math.sin(a[odd])
    return y


def encoded(rope: MismatchedRotaryEncoding, x: Tensor, positions: Tensor) -> Tensor:
    return rope.rotate(x, rope.angles(positions, x.dtype))


def heads(batch: int, count: int, positions: int, head_dim: int) -> Tensor:
    return torch.randn(
        batch, count, positions, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )


@pytest.mark.parametrize("head_dim", [2, 6, 8, 10, 14, 128])
@pytest.mark.parametrize("theta", [100.0, 1e6])
def test_equals_the_formula(head_dim: int, theta: float) -> None:
    """Head sizes whose half is odd pair channels of all frequencies across the two halves."""
    x = heads(2, 3, 4, head_dim)
    positions = torch.tensor([[0, 1, 7, 2582], [5, 30_000, 2, 1_000_003]])
    got = encoded(MismatchedRotaryEncoding(head_dim, theta=theta), x, positions)
    for b in range(2):
        for t in range(4):
            for h in range(3):
                wanted = by_formula(x[b, h, t].tolist(), int(positions[b, t]), theta)
                torch.testing.assert_close(got[b, h, t], torch.tensor(wanted, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("impl", ["native", "triton", "reference"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_kernels_agree(impl: str, tokens: int) -> None:
    """They read cosine and sine channel by channel; one that read them once a pair would be wrong here."""
    rope = MismatchedRotaryEncoding(20, theta=50.0)
    x, positions = heads(2, 3, tokens, 20).float(), torch.arange(3, 3 + tokens)[None]
    wanted = encoded(rope, x.double(), positions)
    if impl == "native" and (missing := native.unavailable()):
        pytest.skip(missing)
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"  # else in Triton's interpreter
    if impl == "triton":
        pytest.importorskip("triton")
    angles = rope.angles(positions.to(device))
    with use_impl(impl):
        got = rope.rotate(x.to(device), angles).cpu()
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=0)


def test_is_neither_a_rotation_nor_relative() -> None:
    rope, plain = MismatchedRotaryEncoding(8, theta=100.0), RotaryEncoding(8, theta=100.0, interleaved=True)
    q, k = heads(1, 1, 2, 8).split(1, 2)

    def score(encoding, i: int, j: int) -> float:
        turned = [encoding.rotate(x, encoding.angles(torch.tensor([[p]]), x.dtype)) for x, p in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert score(plain, 9, 4) == pytest.approx(score(plain, 29, 24), abs=1e-9)
    assert abs(score(rope, 9, 4) - score(rope, 29, 24)) > 0.1
    assert abs(encoded(rope, q, torch.tensor([[9]])).norm() - q.norm()) > 0.01


def test_gradients() -> None:
    rope = MismatchedRotaryEncoding(6, theta=10.0)
    x = heads(1, 2, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: encoded(rope, x, torch.tensor([[0, 4, 11]])), (x,))


def test_is_immutable_and_built_under_meta() -> None:
    rope = MismatchedRotaryEncoding(6, theta=10.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rope.theta = 5.0  # type: ignore[misc]
    with torch.device("meta"):
        late = MismatchedRotaryEncoding(6, theta=10.0)
    assert late == rope
    positions = torch.tensor([[3, 4]])
    assert torch.equal(late.angles(positions).cos, rope.angles(positions).cos)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: MismatchedRotaryEncoding(7), "even number"),
        (lambda: MismatchedRotaryEncoding(8, theta=1.0), "theta"),
        (lambda: MismatchedRotaryEncoding(8).angles(torch.zeros(1, 2)), "int64"),
        (
            lambda: encoded(MismatchedRotaryEncoding(8), torch.zeros(1, 1, 2, 6), torch.tensor([[0, 1]])),
            r"\[batch, heads, 2, 8\]",
        ),
    ],
)
def test_says_what_is_wrong(call, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call()
