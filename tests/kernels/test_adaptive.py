"""Layer norms that are modulated from outside, and the product with a GELU, against their formulas in fp64."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from longburn import use_impl
from longburn.kernels.adaptive import adaptive_norm
from longburn.kernels.gelu import linear_gelu

SHAPES = [(2, 6, 96, 3, 1), (2, 12, 100, 1, 2), (1, 6, 33, 6, 1), (3, 4, 128, 2, 3)]  # B, T, M, stretches, their rows


def by_loops(
    x: Tensor, scale: Tensor, shift: Tensor, branch: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    total, y = x.double().clone(), torch.empty_like(x, dtype=torch.float64)
    (B, T, M), G = x.shape, scale.shape[1]
    for b, t in product(range(B), range(T)):
        row, g = b % scale.shape[0], t // (T // G)
        if branch is not None:
            total[b, t] += branch[b, t].double() * (1 if gate is None else gate[row, g].double())
        mean = total[b, t].sum() / M
        variance = (total[b, t] - mean).square().sum() / M
        y[b, t] = (total[b, t] - mean) / math.sqrt(variance + 1e-6) * scale[row, g].double() + shift[row, g].double()
    return total, y


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parts", ["x", "branch", "gate"])
def test_adaptive_norm_is_its_formula(impl: str, shape: tuple[int, ...], parts: str) -> None:
    B, T, M, G, rows = shape
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x, scale, shift = drawn(B, T, M) + 3, drawn(rows, G, M), drawn(rows, G, M)
    branch = drawn(B, T, M) if parts != "x" else None
    gate = drawn(rows, G, 2 * M)[..., :M] if parts == "gate" else None  # with gaps between rows
    with use_impl(impl):
        total, y = adaptive_norm(x, scale, shift, 1e-6, branch=branch, gate=gate)
    wanted_total, wanted = by_loops(x, scale, shift, branch, gate)
    torch.testing.assert_close(total.double(), wanted_total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=pytest.mark.cuda)])
def test_half_precision_is_rounded_once(impl: str) -> None:
    device = "cuda" if impl == "triton" else "cpu"  # Triton's interpreter does not round, it cuts off
    x, row = torch.randn(1, 4, 64, device=device).bfloat16(), torch.randn(1, 1, 64, device=device)
    with use_impl(impl):
        total, y = adaptive_norm(x, row, row, 1e-6, branch=x, gate=row)
    wanted_total, _ = by_loops(x, row, row, x, row)
    assert float((total.double() - wanted_total).abs().max() / wanted_total.abs().max()) < 2**-8
    _, wanted = by_loops(total, row, row, None, None)
    assert float((y.double() - wanted).abs().max() / wanted.abs().max()) < 2**-8


def test_adaptive_norm_refuses_shapes_that_disagree() -> None:
    x, row = torch.zeros(2, 6, 8), torch.ones(1, 1, 8)
    for bad in (torch.ones(1, 4, 8), torch.ones(3, 1, 8), torch.ones(1, 1, 7), torch.ones(8)):
        with pytest.raises(ValueError, match=r"shift is .* G a divisor"):
            adaptive_norm(x, row, bad, 1e-6)
    with pytest.raises(ValueError, match="branch is None"):
        adaptive_norm(x, row, row, 1e-6, gate=row)
    with pytest.raises(ValueError, match=r"branch is \(2, 6, 7\)"):
        adaptive_norm(x, row, row, 1e-6, branch=x[..., :7])


def gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = x.double() @ weight.double().T + bias.double()
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def test_linear_gelu_is_its_formula() -> None:
    x, weight, bias = torch.randn(2, 5, 24), torch.randn(40, 24), torch.randn(40)
    torch.testing.assert_close(linear_gelu(x, weight, bias).double(), gelu(x, weight, bias), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="linear_gelu: x"):
        linear_gelu(x, weight[:, :20], bias)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_gelu_of_the_library_on_a_gpu(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*s, device="cuda").to(dtype) / 4 for s in ((300, 64), (128, 64), (128,)))
    wanted = gelu(x, weight, bias)
    with use_impl("cublas"):
        y = linear_gelu(x, weight, bias)
    assert float((y.double() - wanted).norm() / wanted.norm()) < {torch.float32: 1e-3}.get(dtype, 4e-3)
