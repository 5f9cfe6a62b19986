"""MXFP4 against the format's own definition, written once more here with plain Python numbers."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from compute import compute
from torch import Tensor

from longburn import ImplError, use_impl
from longburn.kernels import mxfp4 as kernels
from longburn.kernels.mxfp4 import Mxfp4, dequantize, is_canonical, quantize

IMPLS = [impl.name for impl in kernels.DEQUANTIZE.impls]
NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def number(code: int) -> float:
    return math.copysign(NUMBERS[code & 7], -1.0 if code & 8 else 1.0)


def every_code() -> Mxfp4:
    """`[256, 16 * 32]`: row s has scale byte s, and every byte value in every place of a block."""
    places = torch.arange(256, dtype=torch.uint8).view(16, 16)
    blocks = torch.cat([places.roll(shift, 1) for shift in range(16)])  # [256, 16]: each byte at each place
    return Mxfp4(
        blocks.expand(256, 256, 16).contiguous(), torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 256)
    )


def contiguous(weight: Mxfp4) -> Mxfp4:
    return Mxfp4(*(part.contiguous() for part in weight))


def small_blocks_too() -> Mxfp4:
    """Every byte under every finite scale, and the same with magnitudes up to 3, 1.5, 0.5 and 0 only."""
    weight = contiguous(every_code())
    blocks, scales = weight.blocks[:253], weight.scales[:253]
    masks = (0xFF, 0xDD, 0xBB, 0x99, 0x88)
    return Mxfp4(torch.cat([blocks & mask for mask in masks]), scales.repeat(len(masks), 1))


def random_weight(*shape: int, seed: int = 0) -> Mxfp4:
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=g, dtype=torch.uint8)
    return Mxfp4(blocks, torch.randint(0, 253, shape, generator=g, dtype=torch.uint8))


def as_dequantized(weight: Mxfp4, dtype: torch.dtype, impl: str) -> Tensor:
    return compute(kernels.DEQUANTIZE, impl, kernels.DequantizeCall(weight, dtype))


@pytest.fixture(params=[impl.name for impl in kernels.QUANTIZE.impls])
def _quantiser(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test of `quantize` is one of each of its implementations, where that takes the type."""

    impls = kernels.QUANTIZE.impls

    def chosen(call: kernels.QuantizeCall) -> tuple[Mxfp4, int]:
        impl = next(impl for impl in impls if impl.name == request.param)
        return (impl if impl.why_not(call) is None else impls[-1]).run(call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "QUANTIZE", chosen)
        yield


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, and zeros of the same sign; NaN equals NaN."""
    equal = (a == b) & (torch.signbit(a) == torch.signbit(b))
    return bool((equal | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("impl", IMPLS)
def test_every_byte_at_every_place_under_every_scale(impl: str, dtype: torch.dtype) -> None:
    if impl != "reference" and dtype == torch.float64:
        with use_impl(impl), pytest.raises(ImplError, match=r"gives fp32.* bf16.*, wanted torch\.float64"):
            dequantize(contiguous(every_code()), dtype)
        return
    weight = contiguous(every_code())
    codes = np.stack([weight.blocks.numpy() & 15, weight.blocks.numpy() >> 4], -1).reshape(256, 256, 32)
    numbers = np.array([number(code) for code in range(16)])[codes]
    with np.errstate(invalid="ignore"):
        wanted = numbers * np.array([2.0 ** (byte - 127) for byte in range(255)] + [math.nan])[:, None, None]
    got = as_dequantized(weight, dtype, impl)
    # What fp32 and bf16 cannot hold is infinite in them; all else is exact, so the cast rounds nothing.
    assert same_bits(got, torch.from_numpy(wanted).reshape(256, -1).to(dtype))
    assert bool(got[:253].isfinite().all())
    assert bool(got[255].isnan().all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (2, 5, 9), (0, 4), (3, 0)])
def test_shapes(shape: tuple[int, ...], impl: str) -> None:
    weight = random_weight(*shape)
    got = as_dequantized(weight, torch.bfloat16, impl)
    assert got.shape == weight.logical_shape == (*shape[:-1], 32 * shape[-1])
    low, high = (weight.blocks & 15).double(), (weight.blocks >> 4).double()
    codes = torch.stack([low, high], -1).flatten(-2).int()
    wanted = torch.tensor([number(c) for c in range(16)], dtype=torch.float64)[codes]
    wanted = torch.ldexp(wanted, weight.scales[..., None].int() - 127).flatten(-2)
    assert same_bits(got.double(), wanted)


def test_a_weight_with_gaps_and_fp16() -> None:
    weight = random_weight(6, 8)
    gaps = Mxfp4(weight.blocks[::2, 1::2], weight.scales[::2, 1::2])
    assert same_bits(dequantize(gaps), dequantize(contiguous(gaps)))
    narrow = Mxfp4(weight.blocks, torch.full_like(weight.scales, 127 - 12))
    assert same_bits(dequantize(narrow, torch.float16).double(), dequantize(narrow, torch.float64))


def by_hand(row: list[float]) -> tuple[list[int], int]:
    """Codes and scale byte of one block, with exact fractions: the nearest number, ties to the even code."""
    largest = max(abs(x) for x in row)
    if largest == 0:
        return [8 if math.copysign(1, x) < 0 else 0 for x in row], 0
    exponent = min(max(math.frexp(largest)[1] - 1 - 2, -127), 127)
    codes = []
    for x in row:
        size = math.ldexp(abs(x), -exponent)
        best = min(range(8), key=lambda code: (abs(NUMBERS[code] - size), code % 2))
        codes.append(best | (8 if math.copysign(1, x) < 0 else 0))
    return codes, exponent + 127


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("_quantiser")
def test_quantize_takes_the_nearest_number(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    grid = torch.arange(-32, 32) / 4.0  # every tie, every number, and beyond the largest
    rows = [grid.view(2, 32), torch.randn(40, 32, generator=g), torch.zeros(1, 32), -torch.zeros(1, 32)]
    rows += [torch.randn(6, 32, generator=g) * 10.0 ** torch.arange(-38, -8, 5)[:, None]]
    rows += [torch.randn(3, 32, generator=g).clamp(-1, 1) * torch.tensor([[3e38], [1e-45], [2.0**-126]])]
    x = torch.cat(rows).to(dtype)
    x = x[x.isfinite().all(-1)]
    got = quantize(x)
    codes = torch.stack([got.blocks & 15, got.blocks >> 4], -1).flatten(-2)
    for row, code, scale in zip(
        x.double().tolist(), codes.squeeze(1).tolist(), got.scales.flatten().tolist(), strict=True
    ):
        assert (code, scale) == by_hand(row)


@pytest.mark.usefixtures("_quantiser")
def test_round_trip_keeps_every_value() -> None:
    """Also of bytes that no quantiser would write: sub-maximal blocks, minus zero, the smallest scales."""
    weight = small_blocks_too()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        values = dequantize(weight, dtype)
        assert same_bits(dequantize(quantize(values), dtype), values)


@pytest.mark.usefixtures("_quantiser")
def test_round_trip_keeps_the_quantisers_own_bytes() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(200, 160, generator=g) * 2.0 ** torch.randint(-140, 120, (200, 1), generator=g)
    x[3], x[4, 32:64], x[5] = 0, -0.0, 1e-45
    weight = quantize(x)
    for dtype in (torch.bfloat16, torch.float32):
        again = quantize(dequantize(weight, dtype))
        assert torch.equal(again.blocks, weight.blocks)
        assert torch.equal(again.scales, weight.scales)


@pytest.mark.usefixtures("_quantiser")
def test_scales_give_any_bytes_back() -> None:
    weight = small_blocks_too()
    plain = quantize(dequantize(weight))
    assert not torch.equal(plain.scales, weight.scales)  # blocks of which the values say nothing of their scale
    same = quantize(dequantize(weight), weight.scales)
    assert torch.equal(same.blocks, weight.blocks)
    assert torch.equal(same.scales, weight.scales)


@pytest.mark.usefixtures("_quantiser")
def test_scales_that_do_not_fit_are_not_used() -> None:
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(3))
    plain = quantize(x)
    for byte in (0, 100, 130, 254, 255):
        wished = quantize(x, torch.full((20, 2), byte, dtype=torch.uint8))
        assert torch.equal(wished.blocks, plain.blocks)
        assert torch.equal(wished.scales, plain.scales)


@pytest.mark.usefixtures("_quantiser")
def test_bytes_are_canonical_if_the_largest_number_is_4_or_6() -> None:
    """What the docstring says of whose bytes come back."""
    weight = random_weight(4000, 3, seed=5)
    weight.blocks[:1000] &= 0xBB  # no magnitude above 1.5
    again = quantize(dequantize(weight))
    same = (again.blocks == weight.blocks).all(-1) & (again.scales == weight.scales)
    assert torch.equal(same, is_canonical(weight))
    assert 0 < int(same.sum()) < same.numel()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 33), r"quantize: got torch.float32 \[2, 33\], wanted floating point .* multiple of 32"),
        (torch.zeros(2, 32, dtype=torch.int64), "wanted floating point"),
        (torch.full((1, 32), math.nan), "1 blocks hold NaN or infinite values"),
        (torch.tensor([[math.inf] * 32, [0.0] * 32]), "1 blocks hold NaN or infinite values"),
    ],
)
@pytest.mark.usefixtures("_quantiser")
def test_what_cannot_be_quantized(tensor: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(tensor)


@pytest.mark.usefixtures("_quantiser")
def test_parts_that_do_not_belong_together() -> None:
    blocks, scales = random_weight(3, 2)
    for wrong in (Mxfp4(blocks, scales[:2]), Mxfp4(blocks[..., :8], scales), Mxfp4(blocks.int(), scales)):
        with pytest.raises(ValueError, match=r"MXFP4: blocks .* wanted uint8 \[\.\.\., out, G, 16\]"):
            dequantize(wrong)
    with pytest.raises(ValueError, match=r"scales are torch.uint8 \[2\], wanted uint8 \[1, 1\]"):
        quantize(torch.zeros(1, 32), torch.zeros(2, dtype=torch.uint8))
