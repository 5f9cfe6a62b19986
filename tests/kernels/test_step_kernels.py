"""Angles, rotation and append: every implementation that this machine has, against the formula."""

from collections.abc import Callable

import pytest
import torch
from compute import compute
from torch import Tensor

from longburn import ImplError, use_impl
from longburn.kernels import append as append_kernels
from longburn.kernels import rotate as rotate_kernels
from longburn.kernels import route as route_kernels
from longburn.kernels.append import AppendCall, append
from longburn.kernels.feedforward import swiglu
from longburn.kernels.linear import linear
from longburn.kernels.norm import rms_norm
from longburn.kernels.rotate import AnglesCall, RotateCall, angles, rotate
from longburn.kernels.route import RouteCall


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 16)], ids=str)
def test_angles(impl: str, shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(1)
    positions = torch.randint(0, 20_000_000, shape, generator=g)
    positions[0, 0] = -1
    frequencies = torch.rand(14, generator=g, dtype=torch.float64) * 2 - 1
    cos, sin = compute(rotate_kernels.ANGLES, impl, AnglesCall(positions, frequencies, 1.25, torch.float32))
    phase = positions.double()[:, None, :, None] * frequencies
    assert cos.shape == sin.shape == (shape[0], 1, shape[1], 14)
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos - phase.cos() * 1.25).abs().max() < 1e-7
    assert (sin - phase.sin() * 1.25).abs().max() < 1e-7


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [12, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation(impl: str, dtype: torch.dtype, interleaved: bool, rotary: int, rows: int) -> None:
    """Pairs of channels are complex numbers that are multiplied by exp(i phase); what does not rotate stays."""
    if impl == "native" and dtype not in (torch.float32, torch.bfloat16):
        dtype_only = RotateCall(
            torch.zeros(1, 1, 1, 12, dtype=dtype), torch.ones(1, 1, 1, 12), torch.ones(1, 1, 1, 12), False
        )
        with (
            use_impl("native"),
            pytest.raises(ImplError, match=r"rotate: .*native: (takes fp32 or bf16|needs|LONGBURN)"),
        ):
            rotate_kernels.ROTATE(dtype_only)
        return
    g = torch.Generator().manual_seed(2)
    x = (
        torch.randn(2, 5, 3, 7, 12, generator=g).to(dtype)[:, :, 1].transpose(1, 2)[:, 2:6]
    )  # gaps in every dimension but the last
    phase = torch.rand(rows, 1, 5, rotary // 2, generator=g, dtype=torch.float64) * 6
    pairs = (0, 1) if interleaved else (0, rotary // 2)
    first = torch.arange(0, rotary, 2) if interleaved else torch.arange(rotary // 2)
    second = first + pairs[1]
    cos, sin = torch.empty(2, rows, 1, 5, rotary, dtype=torch.float64).unbind()
    cos[..., first], cos[..., second], sin[..., first], sin[..., second] = (
        phase.cos(),
        phase.cos(),
        -phase.sin(),
        phase.sin(),
    )
    wide = torch.promote_types(dtype, torch.float32)
    got = compute(rotate_kernels.ROTATE, impl, RotateCall(x, cos.to(wide), sin.to(wide), interleaved))
    turned = torch.complex(x[..., first].double(), x[..., second].double()) * torch.polar(torch.ones_like(phase), phase)
    wanted = x.double().clone()
    wanted[..., first], wanted[..., second] = turned.real, turned.imag
    assert got.dtype == dtype
    assert got.shape == x.shape
    assert (got.double() - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * wanted.abs().max()
    assert torch.equal(got[..., rotary:], x[..., rotary:])


def test_rotation_has_gradients() -> None:
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(torch.tensor([[5, 6, 9]]), torch.randn(8, dtype=torch.float64), 1.0, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin, interleaved=True), (x,))
    ours = torch.randn(1, 2, 3, 8, requires_grad=True)
    rotate(ours, cos.float(), sin.float(), interleaved=False).sum().backward()
    assert ours.grad is not None


APPENDS = {  # sink tokens, ring, slots, positions (a row for all, or one a row)
    "no ring": (0, None, 9, [[3, 4, 5]]),
    "ring": (0, 5, 5, [[13, 14, 15]]),
    "sinks": (2, 5, 7, [[1, 2, 3, 4]]),
    "longer than the ring": (2, 5, 7, [list(range(14))]),
    "far longer": (1, 2, 3, [list(range(40, 60))]),
    "padding": (2, 5, 7, [[-1, -1, 6, 7]]),
    "rows": (1, 4, 5, [[-1, 3, 4], [100, 101, -1]]),
    "a row without tokens": (1, 4, 5, [[-1, -1], [0, 1]]),
    "rows longer than the ring": (1, 3, 4, [[0, 1, 2, 3, 4, 5, 6], [-1, -1, 50, 51, 52, 53, 54]]),
}


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", APPENDS)
def test_append(impl: str, dtype: torch.dtype, case: str) -> None:
    sinks, ring, slots, rows = APPENDS[case]
    B, K, T, D = 2, 3, len(rows[0]), 4
    g = torch.Generator().manual_seed(T)
    fused = torch.randn(B, T, 3 * K, D, generator=g).to(dtype).transpose(1, 2)
    k, v = fused[:, K : 2 * K], fused[:, 2 * K :]
    k_cache, v_cache = (torch.randn(B, K, slots + 1, D, generator=g).to(dtype) for _ in range(2))
    held = torch.full((len(rows), slots + 1), -1)
    wanted_k, wanted_v, wanted_held = k_cache.clone(), v_cache.clone(), held.clone()
    for b in range(B):  # one token after the other, as the words say it
        for t, p in enumerate(rows[b if len(rows) > 1 else 0]):
            if p >= 0:
                slot = p if ring is None or p < sinks else sinks + (p - sinks) % ring
                wanted_k[b, :, slot], wanted_v[b, :, slot] = k[b, :, t], v[b, :, t]
                wanted_held[b if len(rows) > 1 else 0, slot] = p
    compute(append_kernels.OPERATION, impl, AppendCall(k, v, torch.tensor(rows), k_cache, v_cache, held, sinks, ring))
    for got, wanted in ((k_cache, wanted_k), (v_cache, wanted_v)):
        assert torch.equal(got[:, :, :slots], wanted[:, :, :slots])
    assert torch.equal(held[:, :slots], wanted_held[:, :slots])


def test_append_of_one_clock_to_rows_of_their_own() -> None:
    """One row of positions for a cache that keeps them by row."""
    for impl in ("native", "reference"):
        k = torch.arange(4.0).view(2, 1, 2, 1)
        k_cache, v_cache, held = torch.zeros(2, 1, 4, 1), torch.zeros(2, 1, 4, 1), torch.full((2, 4), -1)
        compute(append_kernels.OPERATION, impl, AppendCall(k, k, torch.tensor([[1, 2]]), k_cache, v_cache, held, 0, 3))
        assert held[:, :3].tolist() == [[-1, 1, 2]] * 2
        assert k_cache[:, 0, :3, 0].tolist() == [[0, 0, 1], [0, 2, 3]]


def test_append_chooses_by_itself() -> None:
    k, cache, held = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 3, 2), torch.full((1, 3), -1)
    append(AppendCall(k, k, torch.tensor([[1]]), cache, cache.clone(), held, 0, None))
    assert held.tolist() == [[-1, 1, -1]]
    assert isinstance(cache, Tensor)
    assert cache[0, 0, 1].tolist() == [1, 1]


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "experts", "k"), [(1, 32, 4), (7, 5, 5), (16, 3, 1)])
def test_routing(impl: str, dtype: torch.dtype, n: int, experts: int, k: int) -> None:
    """The chosen logits in falling order are the largest, and the weights their share of the softmax over all."""
    g = torch.Generator().manual_seed(n)
    logits = (torch.stack([torch.randperm(experts, generator=g) for _ in range(n)]) * 0.75 - 30).to(dtype)
    chosen, weights = compute(route_kernels.OPERATION, impl, RouteCall(logits, k))
    wanted = logits.argsort(1, descending=True)[:, :k]
    assert torch.equal(chosen, wanted)
    share = logits.double().softmax(1).gather(1, wanted)
    torch.testing.assert_close(weights.double(), share / share.sum(1, keepdim=True), rtol=1e-6, atol=1e-7)


def test_routing_of_nan_and_of_nothing_finite() -> None:
    """A NaN must come out as one, not vanish behind the experts that are well."""
    for impl in ("native", "reference"):
        chosen, weights = compute(route_kernels.OPERATION, impl, RouteCall(torch.tensor([[1.0, torch.nan, 3.0]]), 2))
        assert chosen.tolist() == [[1, 2]]
        assert weights.isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(torch.ones(1, 7), torch.ones(5, 64)), r"x \(1, 7\), weight \(5, 64\), bias None; wanted x"),
        (lambda: linear(torch.ones(1, 64), torch.ones(5, 64), torch.ones(3)), r"bias \(3,\); wanted .* a bias of 5"),
        (
            lambda: linear(torch.ones(1, 64), torch.ones(5, 64), residual=torch.ones(1, 3)),
            r"residual \(1, 3\), wanted \(1, 5\)",
        ),
        (lambda: rms_norm(torch.ones(1, 3, 64), torch.ones(32), 1e-6), r"weight \(32,\), wanted \(64,\)"),
        (lambda: swiglu(torch.ones(1, 7), torch.ones(8, 64), torch.ones(5, 4)), r"swiglu: x \(1, 7\)"),
        (lambda: swiglu(torch.ones(1, 64), torch.ones(8, 64), torch.ones(5, 3)), "wanted twice 3 rows"),
        (
            lambda: swiglu(torch.ones(1, 64), torch.ones(8, 64), torch.ones(5, 4), residual=torch.ones(1, 4)),
            r"residual \(1, 4\), wanted \(1, 5\)",
        ),
        (lambda: rotate(torch.ones(1, 2, 3, 16), *torch.ones(2, 1, 1, 3, 128), interleaved=False), "at most 16"),
        (lambda: rotate(torch.ones(1, 2, 3, 16), *torch.ones(2, 1, 1, 4, 16), interleaved=False), "rotate: angles"),
    ],
)
def test_shapes_that_disagree(call: Callable[[], Tensor], message: str) -> None:
    """Kernels in C do not look: the operations must."""
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call()


def test_append_of_other_angles_writes_nothing() -> None:
    k, caches = torch.ones(1, 2, 1, 16), torch.zeros(2, 1, 2, 5, 16)
    held = torch.full((1, 5), -1)
    angles = (torch.ones(1, 1, 1, 64), torch.ones(1, 1, 1, 64))
    call = AppendCall(k, k, torch.tensor([[2]]), *caches, held, 0, None, k, angles)
    with torch.no_grad(), pytest.raises(ValueError, match="append: angles"):
        append(call)
    assert not caches.any()
    assert bool((held == -1).all())
