"""Linear map, RMS norm, gated feed-forward: every implementation that this machine has, against the formula in fp64."""

import pytest
import torch
import torch.nn.functional as F
from compute import compute

from longburn import ImplError, use_impl
from longburn.kernels import feedforward as feedforward_kernels
from longburn.kernels import linear as linear_kernels
from longburn.kernels import norm as norm_kernels
from longburn.kernels.feedforward import SwiGLUCall, swiglu
from longburn.kernels.linear import LinearCall, linear
from longburn.kernels.norm import NormCall, rms_norm

DTYPES = {  # the C kernels know two types
    impl: [torch.float32, torch.bfloat16] + ([] if impl == "native" else [torch.float64, torch.float16])
    for impl in ("native", "matvec", "reference")
}
ONE_ROW = [((), 1, 1), ((1,), 7, 5), ((1, 1), 576, 193), ((1, 1), 64, 50)]  # leading sizes, in, out
ROWS = [((1, 3), 33, 17), ((2, 1), 64, 9), ((0,), 5, 3)]
GATED_ROW = [((1,), 7, 5, 3), ((1, 1), 64, 96, 64), ((1, 1), 33, 130, 17)]  # leading sizes, in, hidden, out
GATED_ROWS = [((2, 3), 24, 40, 24)]


def grid(operation, one_row: list, rows: list) -> list:
    """Implementation, type and sizes: only the reference takes several rows."""
    return [
        (impl.name, dtype, sizes)
        for impl in operation.impls
        if impl.name in DTYPES  # Triton's kernels have tests of their own
        for dtype in DTYPES[impl.name]
        for sizes in (one_row + rows if impl.name == "reference" else one_row)
    ]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("impl", "dtype", "sizes"), grid(linear_kernels.OPERATION, ONE_ROW, ROWS), ids=str)
def test_linear(impl: str, dtype: torch.dtype, sizes: tuple[tuple[int, ...], int, int], biased: bool) -> None:
    leading, n, m = sizes
    g = torch.Generator().manual_seed(n)
    x, weight, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((*leading, n), (m, n), (m,)))
    got = compute(linear_kernels.OPERATION, impl, LinearCall(x, weight, bias if biased else None))
    wanted = x.double() @ weight.double().T + (bias.double() if biased else 0)
    assert got.shape == (*leading, m)
    assert got.dtype == dtype
    if got.numel():
        plain = (F.linear(x, weight, bias if biased else None).double() - wanted).abs().max()
        assert (got.double() - wanted).abs().max() <= 2 * plain + torch.finfo(dtype).eps * wanted.abs().max()


def test_linear_of_a_row_with_gaps() -> None:
    """A decode step may hand in a slice of something larger, or a transposed weight."""
    wide = torch.randn(1, 1, 40)
    weight = torch.randn(24, 20)
    with torch.no_grad():
        torch.testing.assert_close(linear(wide[..., ::2], weight), F.linear(wide[..., ::2], weight))
        torch.testing.assert_close(linear(wide[..., :24], weight.T), F.linear(wide[..., :24], weight.T))


def test_linear_has_gradients() -> None:
    x = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: linear(*a), (x, weight, bias.requires_grad_()))


NORM_SHAPES = [(1,), (1, 1, 576), (3, 7), (2, 5, 33), (16, 64)]


@pytest.mark.parametrize(("impl", "dtype", "shape"), grid(norm_kernels.OPERATION, NORM_SHAPES, [(40, 64)]), ids=str)
def test_rms_norm(impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(shape[-1])
    x = (3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
    weight = (1 + 0.1 * torch.randn(shape[-1], generator=g, dtype=torch.float64)).to(dtype)
    got = compute(norm_kernels.OPERATION, impl, NormCall(x, weight, 1e-5))
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("round_last", [False, True])
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_rms_norm_rounds_before_or_after_the_weight(impl: str, round_last: bool) -> None:
    g = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(shape, generator=g).to(torch.bfloat16) for shape in ((16, 288), (288,)))
    after = F.rms_norm(x.float(), (288,), weight.float(), 1e-5).to(torch.bfloat16)
    before = F.rms_norm(x.float(), (288,), None, 1e-5).to(torch.bfloat16) * weight
    assert (after != before).sum() > 500
    got = compute(norm_kernels.OPERATION, impl, NormCall(x, weight, 1e-5, round_last))
    assert (got != (after if round_last else before)).sum() <= 5  # the last bit of a sum may tip a rounding


def test_rms_norm_of_zeros_and_of_large_numbers_is_finite() -> None:
    """In bf16 the square of a large activation is past fp16's range, and eps keeps 0 / 0 away."""
    weight = torch.ones(64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert (rms_norm(torch.zeros(1, 64, dtype=torch.bfloat16), weight, 1e-5) == 0).all()
        large = rms_norm(torch.full((1, 64), 1e15, dtype=torch.bfloat16), weight, 1e-5)
    torch.testing.assert_close(large, torch.ones(1, 64, dtype=torch.bfloat16))


def test_rms_norm_has_gradients() -> None:
    x, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (5,)))
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-5), (x, weight))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("impl", "dtype", "sizes"), grid(feedforward_kernels.OPERATION, GATED_ROW, GATED_ROWS), ids=str
)
def test_swiglu(impl: str, dtype: torch.dtype, sizes: tuple[tuple[int, ...], int, int, int], biased: bool) -> None:
    leading, dim, hidden, out = sizes
    g = torch.Generator().manual_seed(dim)
    shapes = ((*leading, dim), (2 * hidden, dim), (2 * hidden,), (out, hidden), (out,))
    x, gate_up, gate_up_bias, down, down_bias = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    gate_up, down = gate_up / dim**0.5, down / hidden**0.5
    biases = (gate_up_bias, down_bias) if biased else (None, None)
    call = SwiGLUCall(x, gate_up, biases[0], down, biases[1])
    got = compute(feedforward_kernels.OPERATION, impl, call)
    assert (got.shape, got.dtype) == ((*leading, out), dtype)
    exact = [None if t is None else t.double() for t in call]
    gate, up = F.linear(exact[0], exact[1], exact[2]).chunk(2, -1)
    wanted = F.linear(gate * torch.sigmoid(gate) * up, exact[3], exact[4])
    gate, up = F.linear(x, gate_up, biases[0]).chunk(2, -1)
    plain = (F.linear(F.silu(gate) * up, down, biases[1]).double() - wanted).abs().max()
    assert (got.double() - wanted).abs().max() <= 2 * plain + 2 * torch.finfo(dtype).eps * wanted.abs().max()


def test_swiglu_has_gradients() -> None:
    shapes = ((2, 3), (8, 3), (3, 4), (8,), (3,))
    assert torch.autograd.gradcheck(swiglu, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes])


def test_a_named_row_kernel_refuses_with_its_reason() -> None:
    with (
        use_impl("matvec"),
        pytest.raises(ImplError, match=r"linear: implementation 'matvec' cannot.*1 rows at most, got 2"),
    ):
        linear(torch.zeros(2, 4), torch.zeros(3, 4))


def test_a_name_that_one_operation_has_leaves_the_others_free() -> None:
    x = torch.randn(1, 4)
    with use_impl("matvec"):
        rms_norm(x, torch.ones(4), 1e-5)
