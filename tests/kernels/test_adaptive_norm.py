"""The norm of a gated update, shifted and scaled: both implementations beside PyTorch's own in fp64."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from compute import compute
from covering import pairwise
from torch import Tensor

from longburn.kernels import triton as triton_kernels
from longburn.kernels.adaptive_norm import OPERATION, AdaptiveNormCall, adaptive_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
assert DEVICE == "cuda" or triton_kernels.interprets()  # conftest.py sees to it: nothing is skipped
SIZES = [(2, 6, 65, 1, 1), (2, 6, 65, 2, 1), (2, 6, 128, 2, 3), (3, 8, 33, 1, 4), (1, 6, 96, 1, 6)]  # B, T, M, rows, G


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("sizes", "centered", "affine", "modulated", "updated", "dtype"),
    pairwise(
        SIZES,
        [False, True],
        ["", "weight", "weight and bias"],
        [False, True],
        ["", "added", "gated"],
        [torch.float32, torch.bfloat16, torch.float16],
    ),
)
def test_adaptive_norm(
    impl: str,
    sizes: tuple[int, ...],
    centered: bool,
    affine: str,
    modulated: bool,
    updated: str,
    dtype: torch.dtype,
) -> None:
    B, T, M, rows, G = sizes
    shape, n = (B, T, M), M
    x = 3 + 2 * normal(*shape, seed=0, dtype=dtype)
    wide = normal(rows, G, 3, n, seed=1, dtype=dtype)  # with gaps between them, as parts of one table have
    shift, scale, gate = wide.unbind(2)
    call = AdaptiveNormCall(
        x,
        1e-3,
        centered,
        weight=1 + normal(n, seed=2, dtype=dtype) if affine else None,
        bias=normal(n, seed=3, dtype=dtype) if "bias" in affine else None,
        shift=shift if modulated else None,
        scale=scale if modulated else None,
        update=normal(*shape, seed=4, dtype=dtype) if updated else None,
        gate=gate if updated == "gated" else None,
    )
    got = compute(OPERATION, impl, call)
    exact, total = by_torch(call)
    unit = torch.finfo(dtype).eps
    assert got.normed.dtype == got.x.dtype == dtype
    assert got.normed.shape == got.x.shape == x.shape
    assert (got.x.double() - total).abs().max() <= unit * total.abs().max()
    assert (got.normed.double() - exact).abs().max() <= 6 * unit * exact.abs().max()
    assert (got.x is x) == (not updated)


def by_torch(call: AdaptiveNormCall) -> tuple[Tensor, Tensor]:
    """In fp64, one token after the other; the norm is of the sum as it is rounded."""
    B, T, n = call.x.shape
    normed, total = torch.empty_like(call.x, dtype=torch.float64), torch.empty_like(call.x, dtype=torch.float64)
    for b, t in product(range(B), range(T)):

        def part(of: Tensor, b: int = b, t: int = t) -> Tensor:
            return of[b % of.shape[0], t // (T // of.shape[1])].double()

        total[b, t] = call.x[b, t].double()
        if call.update is not None:
            total[b, t] += call.update[b, t].double() * (1 if call.gate is None else part(call.gate))
        x = total[b, t].to(call.x.dtype).double()
        weight = None if call.weight is None else call.weight.double()
        y = F.layer_norm(x, (n,), weight, eps=call.eps) if call.centered else F.rms_norm(x, (n,), weight, call.eps)
        y = y + (0 if call.bias is None else call.bias.double())
        normed[b, t] = y if call.scale is None or call.shift is None else y * part(call.scale) + part(call.shift)
    return normed, total


def test_it_has_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    x, update = (torch.randn(2, 3, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    shift, scale, gate = (torch.randn(2, 1, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(*parts: Tensor) -> Tensor:
        x, update, shift, scale, gate = parts
        done = adaptive_norm(x, eps=1e-3, centered=True, shift=shift, scale=scale, update=update, gate=gate)
        return torch.cat([done.normed, done.x])

    assert torch.autograd.gradcheck(run, (x, update, shift, scale, gate))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight": torch.ones(4)}, r"weight \(4,\) beside x \(2, 3, 5\), wanted \(5,\)"),
        (
            {"shift": torch.ones(1, 2, 5), "scale": torch.ones(1, 1, 5)},
            r"shift .* wanted \[2 or 1, G, 5\], G a divisor of 3",
        ),
        ({"shift": torch.ones(1, 1, 5), "scale": torch.ones(3, 1, 5)}, r"scale \(3, 1, 5\) beside x"),
        ({"shift": torch.ones(2, 5), "scale": torch.ones(2, 5)}, r"shift \(2, 5\) beside x"),
        ({"shift": torch.ones(2, 1, 5)}, "shift alone, wanted both or none"),
        ({"gate": torch.ones(2, 1, 5)}, r"update is none beside x \(2, 3, 5\)"),
        ({"update": torch.ones(2, 3, 4)}, r"update is \(2, 3, 4\) beside x \(2, 3, 5\), wanted x's shape"),
    ],
)
def test_shapes_that_disagree(given: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adaptive_norm(torch.ones(2, 3, 5), eps=1e-6, centered=False, **given)
