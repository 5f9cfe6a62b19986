"""Experts as grouped products: the reference's values and gradients, from the same call."""

import pytest
import torch
from torch import Tensor

from longburn.kernels.experts import ExpertsCall, experts
from longburn.kernels.experts_grouped import experts_grouped, why_not
from longburn.kernels.mxfp4 import quantize
from longburn.kernels.registry import use_impl

SIZES = [(37, 24, 40, 5, 2), (1, 8, 16, 3, 3), (200, 64, 48, 8, 4)]  # N, M, I, E, k; an expert may get no token


def arguments(n: int, m: int, i: int, e: int, k: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    g = torch.Generator().manual_seed(n)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype).requires_grad_()

    # The last expert is never chosen where there are enough others.
    chosen = torch.stack([torch.randperm(max(k, e - 1), generator=g)[:k] for _ in range(n)]).to(device)
    weights = torch.rand(n, k, generator=g).to(device).requires_grad_()
    shapes = [(e, 2 * i, m), (e, 2 * i), (e, m, i), (e, m)]
    return [random(n, m), chosen, weights, *(random(*shape) for shape in shapes)]


def call(args: list[Tensor]) -> ExpertsCall:
    return ExpertsCall(*args, alpha=1.702, limit=1.5)  # a limit that many values reach


def gradients(y: Tensor, args: list[Tensor]) -> list[Tensor]:
    wanted = [a for a in args if a.requires_grad]
    return list(
        torch.autograd.grad((y.double() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum(), wanted)
    )


@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_are_the_reference(sizes: tuple[int, ...]) -> None:
    args = arguments(*sizes, torch.float32)
    with use_impl("reference"):
        wanted = experts(*args, alpha=1.702, limit=1.5)
    found = experts_grouped(call(args))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for ours, reference in zip(gradients(found, args), gradients(wanted, args), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3)


def test_refusals_name_their_reason() -> None:
    args = arguments(600, 32, 32, 4, 2, torch.bfloat16)
    assert "CUDA" in (why_not(call(args)) or "")


@pytest.mark.cuda
@pytest.mark.parametrize("sizes", [(2048, 224, 320, 8, 4), (4096, 64, 96, 16, 2)])
def test_cuda_is_as_exact_as_the_reference(sizes: tuple[int, ...]) -> None:
    """Error against fp64, values and gradients: near that of the reference (what rounds across the limit differs)."""
    args = arguments(*sizes, torch.bfloat16, "cuda")
    exact_args = [a.detach().double().requires_grad_(a.requires_grad) if a.is_floating_point() else a for a in args]
    outs = {}
    for name in ("grouped", "reference"):
        with use_impl(name):
            y = experts(*args, alpha=1.702, limit=7.0)
        outs[name] = [y, *gradients(y, args)]
    with use_impl("reference"):
        y = experts(*exact_args, alpha=1.702, limit=7.0)
    exact = [y, *gradients(y, exact_args)]
    for ours, theirs, truth in zip(outs["grouped"], outs["reference"], exact, strict=True):
        mine, other = ((o.double() - truth).norm() / truth.norm() for o in (ours, theirs))
        assert mine <= 1.5 * other + 1e-4, (mine, other, list(truth.shape))


@pytest.mark.cuda
def test_mxfp4_and_small_calls_go_elsewhere() -> None:
    args = arguments(600, 32, 32, 4, 2, torch.bfloat16, "cuda")
    assert why_not(call(args)) is None
    packed = [*args[:3], quantize(args[3]), args[4], quantize(args[5]), args[6]]
    assert "dense" in (why_not(call(packed)) or "")
    few = [args[0][:8], args[1][:8], args[2][:8], *args[3:]]
    assert "at least" in (why_not(call(few)) or "")
