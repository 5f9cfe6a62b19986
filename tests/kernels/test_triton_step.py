"""The small operations of a decode step in Triton: on a GPU, and in Triton's interpreter where there is none."""

from collections.abc import Iterator

import pytest
import torch
from compute import compute
from covering import every_pair
from torch import Tensor

from longburn import ImplError, use_impl
from longburn.kernels import append as append_kernels
from longburn.kernels import feedforward as feedforward_kernels
from longburn.kernels import linear as linear_kernels
from longburn.kernels import norm as norm_kernels
from longburn.kernels import rotate as rotate_kernels
from longburn.kernels import triton as triton_kernels
from longburn.kernels.append import FP8, FP8_MAX, AppendCall, Rotated, quantised
from longburn.kernels.linear import LinearCall, linear
from longburn.kernels.norm import HeadNorms, NormCall
from longburn.kernels.rotate import AnglesCall, RotateCall, angles, rotate

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# conftest.py sees to it; without it every test here would be skipped and look green.
assert ON_GPU or triton_kernels.interprets(), "Triton was imported before TRITON_INTERPRET=1 was set"

# The interpreter rounds bf16 and fp8 carelessly, so that what is said of their last bit is said on a GPU only.
TYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
HALVES = TYPES[1:]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """PyTorch fills memory that nothing was written to with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g).to(DEVICE, dtype)


def assert_as_good(got: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Mean error at most 1.1 times and largest at most twice that of the reference, but for a fraction of the type's
    last bit: fp32 sums in another order differ by that.
    """
    assert got.dtype == reference.dtype
    assert got.shape == reference.shape
    ours, theirs = ((x.double() - exact).abs() for x in (got, reference))
    unit = torch.finfo(got.dtype).eps * exact.abs().max()
    assert ours.mean() <= 1.1 * theirs.mean() + 0.06 * unit
    assert ours.max() <= 2 * theirs.max() + 0.3 * unit


# --- linear -----------------------------------------------------------------------------------------------------------

LINEARS = [(1, 1), (33, 130), (129, 7), (1, 4097), (32, 2880)]  # out, in
LARGE = [(5120, 2880), (2880, 4096), (32, 2880), (1001, 14336), (20109, 2881), (4096, 64)]


def check_linear(rows: tuple[int, ...], out: int, size: int, dtype: torch.dtype, biased: bool, added: bool) -> None:
    x, weight = normal(*rows, size, dtype=dtype), normal(out, size, seed=1, dtype=dtype) / size**0.5
    bias, residual = normal(out, seed=2, dtype=dtype), 8 * normal(*rows, out, seed=3, dtype=dtype)
    call = LinearCall(x, weight, bias if biased else None, residual if added else None)
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0) + (residual.double() if added else 0)
    got = compute(linear_kernels.OPERATION, "triton", call)
    assert_as_good(got, compute(linear_kernels.OPERATION, "reference", call), exact)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("biased", "added"), [(False, False), (True, True)])
@pytest.mark.parametrize(("out", "size"), LINEARS, ids=str)
def test_linear_of_one_row(out: int, size: int, dtype: torch.dtype, biased: bool, added: bool) -> None:
    check_linear((1, 1), out, size, dtype, biased, added)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("biased", "added"), [(False, True), (True, False)])
@pytest.mark.parametrize("rows", [(2,), (3, 1), (1, 17), (32,)], ids=str)
def test_linear_of_few_rows(rows: tuple[int, ...], dtype: torch.dtype, biased: bool, added: bool) -> None:
    for out, size in LINEARS[1:3]:
        check_linear(rows, out, size, dtype, biased, added)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 9, 31])
@pytest.mark.parametrize(("out", "size"), LARGE, ids=str)
def test_linear_at_the_sizes_of_models(out: int, size: int, rows: int, dtype: torch.dtype) -> None:
    if rows <= linear_kernels.TRITON_ROWS[dtype]:
        check_linear((rows, 1), out, size, dtype, True, True)


@pytest.mark.parametrize("rows", [1, 3])
def test_linear_reads_views(rows: int) -> None:
    dtype = torch.float16
    x = normal(rows, 2, 70, dtype=dtype)[:, 1]
    weight, bias = normal(66, 100, dtype=dtype)[::2, 5:75], normal(33, dtype=dtype)
    residual = normal(33, rows, dtype=dtype).T
    got = compute(linear_kernels.OPERATION, "triton", LinearCall(x, weight, bias, residual))
    wanted = x.double() @ weight.double().T + bias.double() + residual.double()
    assert (got.double() - wanted).abs().max() < 2e-2


def test_linear_refuses() -> None:
    x, weight = normal(40, 8, dtype=torch.float16), normal(5, 8, dtype=torch.float16)
    for call, why in (
        (LinearCall(x, weight), "computes 32 rows of torch.float16 at most, got 40"),
        (LinearCall(x[:1].float(), weight), "one type for all"),
        (LinearCall(x[:1], normal(8, 5, dtype=torch.float16).T), "have gaps"),
        (LinearCall(x[:1], weight.clone().requires_grad_()), "has no gradients"),
    ):
        with use_impl("triton"), pytest.raises(ImplError, match=why):
            linear_kernels.OPERATION(call)
    if ON_GPU:  # and by itself takes what can be taken
        assert linear(x, weight).shape == (40, 5)


# --- norm and gate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("round_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 2880), (5, 3, 33), (2, 1), (3, 4096)], ids=str)
def test_rms_norm(shape: tuple[int, ...], round_last: bool, dtype: torch.dtype) -> None:
    x, weight = 20 * normal(*shape, dtype=dtype), normal(shape[-1], seed=1, dtype=dtype)
    call = NormCall(x, weight, 1e-5, round_last)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    got = compute(norm_kernels.OPERATION, "triton", call)
    assert_as_good(got, compute(norm_kernels.OPERATION, "reference", call), exact)


@pytest.mark.parametrize("shape", [(1, 7, 33), (2, 7, 33), (1500, 1, 40)], ids=str)
def test_rms_norm_of_rows_with_gaps(shape: tuple[int, ...]) -> None:
    """One distance between all rows, two of them, and more rows than have a program each."""
    x = torch.cat([normal(*shape), torch.full(shape, torch.nan, device=DEVICE)], -1)[..., : shape[-1]]
    call = NormCall(x, normal(shape[-1], seed=1), 1e-5, True)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * call.weight.double()
    got = compute(norm_kernels.OPERATION, "triton", call)
    assert_as_good(got, compute(norm_kernels.OPERATION, "reference", call), exact)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 14), (3, 2050)], ids=str)
def test_gated(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = 4 * normal(*shape, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    got = compute(feedforward_kernels.GATED, "triton", x)
    assert_as_good(got, compute(feedforward_kernels.GATED, "reference", x), gate * gate.sigmoid() * up)


# --- angles and rotation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 40)], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.3465735902799727])
def test_angles(shape: tuple[int, int], factor: float) -> None:
    """Exact to fp32 at positions of millions."""
    g = torch.Generator().manual_seed(1)
    positions = torch.randint(0, 20_000_000, shape, generator=g)
    positions[0, 0] = -1
    frequencies = torch.rand(14, generator=g, dtype=torch.float64) * 2 - 1
    call = AnglesCall(positions.to(DEVICE), frequencies.to(DEVICE), factor, torch.float32)
    cos, sin = compute(rotate_kernels.ANGLES, "triton", call)
    phase = positions.double()[:, None, :, None] * frequencies
    for got, wanted in ((cos, phase.cos() * factor), (sin, phase.sin() * factor)):
        assert got.shape == (shape[0], 1, shape[1], 14)
        assert got.dtype == torch.float32
        assert (got.cpu() - wanted).abs().max() < 1e-7


ROTARY = [(12, 12, False), (12, 12, True), (20, 6, False), (20, 6, True), (64, 64, False)]  # D, R, interleaved


def turn(x: Tensor, phase: Tensor, interleaved: bool) -> Tensor:
    """In fp64 on the CPU: pairs of channels are complex numbers that are multiplied by exp(i phase)."""
    phase, out = phase.cpu(), x.double().cpu().clone()
    half = phase.shape[-1]
    first = torch.arange(0, 2 * half, 2) if interleaved else torch.arange(half)
    second = first + (1 if interleaved else half)
    turned = torch.complex(out[..., first], out[..., second]) * torch.polar(torch.ones_like(phase), phase)
    out[..., first], out[..., second] = turned.real, turned.imag
    return out.to(x.device)


def spread(phase: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """cos and sin in the form that rotations take."""

    def pair(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)

    cos, sin = phase.cos(), phase.sin()
    return pair(cos, cos).float(), pair(-sin, sin).float()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("D", "R", "interleaved"), ROTARY, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation(D: int, R: int, interleaved: bool, rows: int, dtype: torch.dtype) -> None:
    x = normal(2, 5, 3, 7, D, dtype=dtype)[:, :, 1].transpose(1, 2)[:, 2:6]  # gaps in every dimension but the last
    phase = normal(rows, 1, 5, R // 2).double() * 6
    call = RotateCall(x, *spread(phase, interleaved), interleaved)
    got = compute(rotate_kernels.ROTATE, "triton", call)
    assert_as_good(got, compute(rotate_kernels.ROTATE, "reference", call), turn(x, phase, interleaved))
    assert torch.equal(got[..., R:], x[..., R:])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("D", "R", "interleaved"), ROTARY, ids=str)
def test_rotation_of_normalised_heads(D: int, R: int, interleaved: bool, dtype: torch.dtype) -> None:
    x = (3 * normal(2, 5, 3, 7, D, dtype=dtype))[:, :, 1].transpose(1, 2)[:, 2:6]
    weight, phase = 1 + normal(D, dtype=dtype), normal(1, 1, 5, R // 2).double() * 6
    call = RotateCall(x, *spread(phase, interleaved), interleaved, weight, 1e-3)
    wide = x.double()
    exact = turn(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-3) * weight.double(), phase, interleaved)
    got = compute(rotate_kernels.ROTATE, "triton", call)
    assert_as_good(got, compute(rotate_kernels.ROTATE, "reference", call), exact)


# --- append -----------------------------------------------------------------------------------------------------------

APPENDS = {  # sink tokens, ring, slots, positions (a row for all, or one a row)
    "no ring": (0, None, 9, [[3, 4, 5]]),
    "one token": (0, 5, 5, [[13]]),
    "ring": (0, 5, 5, [[13, 14, 15]]),
    "sinks": (2, 5, 7, [[1, 2, 3, 4]]),
    "longer than the ring": (2, 5, 7, [list(range(14))]),
    "far longer": (1, 2, 3, [list(range(40, 60))]),
    "padding": (2, 5, 7, [[-1, -1, 6, 7]]),
    "rows": (1, 4, 5, [[-1, 3, 4], [100, 101, -1]]),
    "a row without tokens": (1, 4, 5, [[-1, -1], [0, 1]]),
    "rows longer than the ring": (1, 3, 4, [[0, 1, 2, 3, 4, 5, 6], [-1, -1, 50, 51, 52, 53, 54]]),
}


def slots_of(sinks: int, ring: int | None, rows: list[list[int]]) -> Iterator[tuple[int, int, int, int]]:
    """(row, column, position, slot) of every token, one after the other, as the words say it."""
    for b, row in enumerate(rows):
        for t, p in enumerate(row):
            if p >= 0:
                yield b, t, p, p if ring is None or p < sinks else sinks + (p - sinks) % ring


@pytest.mark.parametrize(("case", "heads", "turned", "dtype"), every_pair(list(APPENDS), [0, 6], [False, True], TYPES))
def test_append(case: str, heads: int, turned: bool, dtype: torch.dtype) -> None:
    sinks, ring, slots, rows = APPENDS[case]
    B, K, T, D, R = 2, 3, len(rows[0]), 20, 12
    fused = normal(B, T, heads + 2 * K, D, dtype=dtype).transpose(1, 2)
    q, k, v = fused[:, :heads], fused[:, heads : heads + K], fused[:, heads + K :]
    phase, far = (normal(len(rows), 1, T, R // 2, seed=s).double() * 6 for s in (1, 2))
    call = AppendCall(
        k=k,
        v=v,
        positions=torch.tensor(rows, device=DEVICE),
        k_cache=torch.full((B, K, slots + 1, D), torch.nan, dtype=dtype, device=DEVICE),
        v_cache=torch.full((B, K, slots + 1, D), torch.nan, dtype=dtype, device=DEVICE),
        held=torch.full((len(rows), slots + 1), -1, device=DEVICE),
        sink_tokens=sinks,
        ring=ring,
        q=q if heads else None,
        angles=spread(phase, False) if turned else None,
        sink_angles=spread(far, False) if turned else None,
    )
    got: Rotated = compute(append_kernels.OPERATION, "triton", call)
    turned_k = rotate(k, *call.angles, interleaved=False) if call.angles else k
    wanted_k, wanted_v = torch.full_like(call.k_cache, torch.nan), torch.full_like(call.v_cache, torch.nan)
    wanted_held = torch.full_like(call.held, -1)
    for b, t, p, slot in slots_of(sinks, ring, rows):
        mine = slice(b, b + 1) if len(rows) > 1 else slice(None)
        wanted_k[mine, :, slot], wanted_v[mine, :, slot] = turned_k[mine, :, t], v[mine, :, t]
        wanted_held[b, slot] = p
    assert torch.equal(call.held[:, :slots], wanted_held[:, :slots])
    assert torch.equal(call.v_cache[:, :, :slots].nan_to_num(7), wanted_v[:, :, :slots].nan_to_num(7))
    torch.testing.assert_close(call.k_cache[:, :, :slots], wanted_k[:, :, :slots], equal_nan=True)
    if not heads:
        assert got == (None, None)
    elif not turned:
        assert got.q is call.q
        assert got.q_sink is None
    else:
        for ours, angle, pair in ((got.q, phase, call.angles), (got.q_sink, far, call.sink_angles)):
            assert ours is not None
            assert pair is not None
            with use_impl("reference"):
                assert_as_good(ours, rotate(q, *pair, interleaved=False), turn(q, angle, False))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("D", "R", "interleaved"), ROTARY, ids=str)
def test_append_rotates_as_rotate_does(D: int, R: int, interleaved: bool, normed: bool) -> None:
    q, k = normal(2, 4, 3, D), normal(2, 2, 3, D, seed=1)
    pair = spread(normal(1, 1, 3, R // 2).double() * 6, interleaved)
    cache, held = torch.zeros(2, 2, 5, D, device=DEVICE), torch.full((1, 5), -1, device=DEVICE)
    positions = torch.tensor([[0, 1, 2]], device=DEVICE)
    norms = HeadNorms(1 + normal(D, seed=2), 1 + normal(D, seed=3), 1e-3) if normed else None
    call = AppendCall(k, k, positions, cache, cache.clone(), held, 0, 4, q, pair, pair, interleaved, norms)
    got: Rotated = compute(append_kernels.OPERATION, "triton", call)
    q_norm, k_norm = ({"weight": x, "eps": 1e-3} if norms else {} for x in (norms or (None, None))[:2])
    with use_impl("triton"):
        assert got.q is not None
        assert got.q_sink is not None
        assert torch.equal(got.q, rotate(q, *pair, interleaved=interleaved, **q_norm))
        assert torch.equal(got.q_sink, got.q)
        assert torch.equal(cache[:, :, :3], rotate(k, *pair, interleaved=interleaved, **k_norm))


def test_append_of_one_clock_to_rows_of_their_own() -> None:
    """One row of positions for a cache that keeps them by row, and nothing beyond the buffers."""
    k = torch.arange(6.0, device=DEVICE).view(2, 1, 3, 1)
    k_cache, v_cache = torch.zeros(2, 1, 4, 1, device=DEVICE), torch.zeros(2, 1, 4, 1, device=DEVICE)
    held = torch.full((2, 4), -1, device=DEVICE)
    positions = torch.tensor([[1, 2, 9]], device=DEVICE)
    compute(append_kernels.OPERATION, "triton", AppendCall(k, k, positions, k_cache, v_cache, held, 0, None))
    assert held.tolist() == [[-1, 1, 2, -1]] * 2
    assert k_cache[:, 0, :, 0].tolist() == [[0, 0, 1, 0], [0, 3, 4, 0]]


# --- fp8 --------------------------------------------------------------------------------------------------------------


def test_quantised() -> None:
    """Every token and head has a scale of its own, under which its largest magnitude is the largest number there is."""
    x = normal(2, 3, 5, 16) * torch.logspace(-12, 4, 5)[:, None].to(DEVICE)
    x[0, 0, 1] = 0
    x[1, 2, 3, 7] = torch.nan
    numbers, scale = quantised(x)
    assert numbers.dtype == FP8
    assert (scale > 0).sum() == scale.numel() - 1
    back = numbers.float() * scale.unsqueeze(-1)
    assert not back[0, 0, 1].any()
    assert back[1, 2, 3, 7].isnan()
    assert torch.equal(numbers.float().abs().amax(-1)[0, 1:], torch.full((2, 5), FP8_MAX, device=DEVICE))
    error, largest = (back - x).abs().nan_to_num(0), x.abs().nan_to_num(0).amax(-1, keepdim=True)
    assert (error <= x.abs().nan_to_num(0) / 16 + largest / 448 / 512).all()  # 3 bits, and those of small numbers


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", [case for case in APPENDS if case != "no ring"])
def test_append_to_fp8_keeps_sinks_apart(case: str, impl: str, dtype: torch.dtype) -> None:
    sinks, ring, slots, rows = APPENDS[case]
    B, K, T, D = 2, 3, len(rows[0]), 20
    k, v = normal(B, K, T, D, dtype=dtype), normal(B, T, K, D, seed=1, dtype=dtype).transpose(1, 2)
    v[0, 0] = 0
    pair = spread(normal(len(rows), 1, T, D // 2).double() * 6, False)
    caches = [torch.full((B, K, slots - sinks + 1, D), torch.nan, device=DEVICE).to(FP8) for _ in range(2)]
    scales = [torch.full((B, K, slots - sinks + 1), torch.nan, device=DEVICE) for _ in range(2)]
    before = [torch.full((B, K, sinks + 1, D), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    call = AppendCall(
        k=k,
        v=v,
        positions=torch.tensor(rows, device=DEVICE),
        k_cache=caches[0],
        v_cache=caches[1],
        held=torch.full((len(rows), slots + 1), -1, device=DEVICE),
        sink_tokens=sinks,
        ring=ring,
        angles=pair,
        scales=(scales[0], scales[1]),
        before=(before[0], before[1]),
    )
    compute(append_kernels.OPERATION, impl, call)
    written: dict[tuple[int, int], tuple[int, int]] = {}
    for b, t, p, slot in slots_of(sinks, ring, rows):
        written[b, slot] = t, p
    for x, cache, scale, apart in zip((rotate(k, *pair, interleaved=False), v), caches, scales, before, strict=True):
        for b in range(B):
            row = b if len(rows) > 1 else 0
            for slot in range(slots):
                t, p = written.get((row, slot), (0, -1))
                assert call.held[row, slot] == p
                if slot < sinks:
                    got, error = apart[b, :, slot], 1e-3
                else:
                    got = cache[b, :, slot - sinks].float() * scale[b, :, slot - sinks, None]
                    error = 1 / 14 if ON_GPU or impl == "reference" else 1 / 7  # the interpreter does not round
                if p < 0:
                    assert got.isnan().all()
                    continue
                wanted = x[b, :, t].float()
                largest = wanted.abs().amax(-1, keepdim=True)
                wrong = (got.float() - wanted).abs() > error * wanted.abs() + largest / 448 / 256
                # The interpreter loses the carry of a mantissa that rounds up to the next power of two.
                assert wrong.float().mean() <= (0 if ON_GPU or impl == "reference" else 0.2)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TYPES)
def test_fp8_is_that_of_the_reference(dtype: torch.dtype) -> None:
    v = normal(2, 3, 40, 80, dtype=dtype) * torch.logspace(-3, 3, 40, device=DEVICE)[:, None].to(dtype)
    written = []
    for impl in ("triton", "reference"):
        caches = [torch.zeros(2, 3, 41, 80, device=DEVICE).to(FP8) for _ in range(2)]
        scales = [torch.zeros(2, 3, 41, device=DEVICE) for _ in range(2)]
        positions, held = torch.arange(40, device=DEVICE)[None], torch.full((1, 41), -1, device=DEVICE)
        call = AppendCall(v, v, positions, *caches, held, 0, None, scales=(scales[0], scales[1]))
        compute(append_kernels.OPERATION, impl, call)
        written.append([t[:, :, :40].float() for t in (*caches, *scales)])
    for ours, theirs in zip(*written, strict=True):
        assert torch.equal(ours, theirs)


def test_append_refuses() -> None:
    k, cache, held = normal(1, 1, 1, 4), torch.zeros(1, 1, 3, 4, device=DEVICE), torch.full((1, 3), -1, device=DEVICE)
    call = AppendCall(k, k, torch.tensor([[1]], device=DEVICE), cache, cache.clone(), held, 0, None)
    wide = (torch.ones(1, 1, 1, 4, dtype=torch.float64, device=DEVICE),) * 2
    for changed, why in (
        (call._replace(angles=wide), "fp32 angles"),
        (call._replace(k_cache=cache.half()), "caches in the type of k"),
        (call._replace(k_cache=torch.zeros(1, 1, 3, 8, device=DEVICE)[..., ::2]), "slots of a cache have gaps"),
        (call._replace(k=normal(1, 1, 1, 8)[..., ::2]), "have gaps"),
        (call._replace(k=k.double(), v=k.double()), "one type for all"),
    ):
        with use_impl("triton"), pytest.raises(ImplError, match=why):
            append_kernels.append(changed)


@pytest.mark.cuda
def test_a_long_chunk_and_millions_of_positions() -> None:
    """A prefill of 3,000 tokens into a ring of 1,000, at positions that fp32 cannot count."""
    B, H, K, T, D, ring, sinks = 2, 8, 2, 3000, 64, 1000, 4
    fused = normal(B, T, H + 2 * K, D, dtype=torch.bfloat16).transpose(1, 2)
    q, k, v = fused[:, :H], fused[:, H : H + K], fused[:, H + K :]
    positions = torch.arange(20_000_000, 20_000_000 + T, device=DEVICE)[None]
    frequencies = torch.logspace(0, -5, D, dtype=torch.float64, device=DEVICE)
    pair = angles(positions, frequencies, 1.3, torch.float32)
    results = []
    for impl in ("triton", "reference"):
        k_cache, v_cache = (torch.zeros(B, K, sinks + ring + 1, D, dtype=k.dtype, device=DEVICE) for _ in range(2))
        held = torch.full((1, sinks + ring + 1), -1, device=DEVICE)
        call = AppendCall(k, v, positions, k_cache, v_cache, held, sinks, ring, q, pair, pair)
        out: Rotated = compute(append_kernels.OPERATION, impl, call)
        results.append((k_cache[:, :, :-1], v_cache[:, :, :-1], held[:, :-1], out.q, out.q_sink))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
