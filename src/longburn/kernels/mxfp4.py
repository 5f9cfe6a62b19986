"""MXFP4 weights: blocks of 32 four-bit numbers that share a scale of eight bits (OCP Microscaling Formats v1.0).

A number is a sign and one of eight magnitudes (E2M1); a block's scale is a power of two (E8M0). 32 consecutive values
of a row are 16 bytes, value 2b in the low half of byte b and value 2b + 1 in its high half: 4.25 bits a value.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels import native, triton
from longburn.kernels.registry import Impl, Operation

BLOCK = 32  # values that share a scale
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS, NAN_SCALE = 127, 255


class Mxfp4(NamedTuple):
    """A weight `[..., out, 32 * G]` as blocks uint8 `[..., out, G, 16]` and scales uint8 `[..., out, G]`."""

    blocks: Tensor
    scales: Tensor

    @property
    def logical_shape(self) -> torch.Size:
        """The shape of the values."""
        return torch.Size([*self.scales.shape[:-1], BLOCK * self.scales.shape[-1]])


class DequantizeCall(NamedTuple):
    """The arguments of `dequantize`."""

    weight: Mxfp4
    dtype: torch.dtype


def _reference(call: DequantizeCall) -> Tensor:
    blocks, scales = call.weight
    # bf16 holds every value, subnormals included; fp16 does not, and is rounded once at the end.
    exact = torch.float32 if call.dtype == torch.float16 else call.dtype
    values = F.embedding(blocks.int(), _pairs(exact, blocks.device)).flatten(-2)  # [..., out, G, 32]
    values *= _powers(exact, scales.device)[scales.int()].unsqueeze(-1)
    return values.flatten(-2).to(call.dtype)


def _native(call: DequantizeCall) -> Tensor:
    values = torch.empty(call.weight.logical_shape, dtype=call.dtype)
    addresses = map(native.address, (*call.weight, values))
    native.launch("dequantize", *addresses, call.weight.scales.numel(), native.TYPES[call.dtype])
    return values


def _native_why_not(call: DequantizeCall) -> str | None:
    for tensor in call.weight:
        if tensor.device.type != "cpu":
            return f"runs on the CPU, got {tensor.device.type}"
        if not tensor.is_contiguous():
            return "the weight has gaps"
    if call.dtype not in native.TYPES:
        return f"gives fp32 or bf16, wanted {call.dtype}"
    return native.unavailable()


@triton.on_its_device
def _triton(call: DequantizeCall) -> Tensor:
    from longburn.kernels.triton.mxfp4 import dequantize

    return dequantize(call)


def _triton_why_not(call: DequantizeCall) -> str | None:
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"gives fp32, bf16 or fp16, wanted {call.dtype}"
    if not all(tensor.is_contiguous() for tensor in call.weight):
        return "the weight has gaps"
    return triton.unavailable(*call.weight)


DEQUANTIZE: Operation[DequantizeCall, Tensor] = Operation(
    "dequantize",
    (
        Impl("native", _native, _native_why_not),
        Impl("triton", _triton, _triton_why_not),
        Impl("reference", _reference, lambda call: None),
    ),
)


def dequantize(weight: Mxfp4, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The values of a weight, `[..., out, 32 * G]`.

    Exact in bf16, fp32 and fp64 as long as the value is in the range of the type (a scale byte below 253 always is);
    rounded in fp16, whose range is smaller. A block whose scale byte is 255 is NaN, as the format says.

    Raises:
        ValueError: blocks and scales that do not belong together.
    """
    _check(weight)
    return DEQUANTIZE(DequantizeCall(weight, dtype))


def quantize(tensor: Tensor, scales: Tensor | None = None) -> Mxfp4:
    """The MXFP4 weight nearest to `tensor` `[..., out, in]`, `in` a multiple of 32.

    The scale of a block is 2^(floor(log2 max|x|) - 2), the scale byte held to 0 .. 254; each value goes to the nearest
    magnitude, ties to the one whose code is even, and beyond 6 scales to 6 (OCP, section 6.3). A block of zeros has
    scale byte 0. Signs are kept, that of zero too.

    Quantising what `dequantize` gave changes no value. It gives the same bytes if they are canonical, which all that
    this function writes without `scales` are: the block's largest magnitude is 4 or 6, or its scale byte is 0. Another
    quantiser may have chosen a larger scale, or any scale for a block of zeros. Values do not tell; `scales` does.

    Args:
        scales: uint8 `[..., out, in / 32]`; the scale byte to use for each block whose values it represents exactly.
            Blocks that it does not are quantised as without it.

    Raises:
        ValueError: a row that is no multiple of 32, scales of another shape, or values that are NaN or infinite.
    """
    if not tensor.is_floating_point() or tensor.dim() < 1 or tensor.shape[-1] % BLOCK:
        raise ValueError(
            f"quantize: got {tensor.dtype} {list(tensor.shape)}, wanted floating point [..., out, in] "
            f"with in a multiple of {BLOCK}"
        )
    shape = (*tensor.shape[:-1], tensor.shape[-1] // BLOCK)
    if scales is not None and (scales.shape != shape or scales.dtype != torch.uint8):
        raise ValueError(f"quantize: scales are {scales.dtype} {list(scales.shape)}, wanted uint8 {list(shape)}")
    weight, bad = QUANTIZE(QuantizeCall(tensor.detach().reshape(*shape, BLOCK), scales))
    if bad:
        raise ValueError(f"quantize: {bad} blocks hold NaN or infinite values, which MXFP4 cannot")
    return weight


class QuantizeCall(NamedTuple):
    """x `[..., out, G, 32]`, and scales uint8 `[..., out, G]` or None, as of `quantize`."""

    x: Tensor
    scales: Tensor | None


def _quantize(call: QuantizeCall) -> tuple[Mxfp4, int]:
    """The weight, and the number of blocks that cannot be one."""
    x, scales = call.x if call.x.dtype == torch.float64 else call.x.float(), call.scales
    largest = x.abs().amax(-1)
    bad = int((~largest.isfinite()).sum())
    exponent = torch.frexp(largest.nan_to_num()).exponent - 1  # floor(log2 largest), of subnormals too
    chosen = (exponent - 2 + BIAS).clamp(0, NAN_SCALE - 1) * (largest > 0)
    codes = _codes(x, chosen)
    if scales is not None:
        wished = scales.int()
        exact = _codes(x, wished)
        magnitudes = torch.tensor(MAGNITUDES, dtype=x.dtype, device=x.device)[(exact & 7).int()]
        fits = (torch.ldexp(magnitudes, wished[..., None] - BIAS) == x.abs()).all(-1) & (wished < NAN_SCALE)
        chosen, codes = torch.where(fits, wished, chosen), torch.where(fits[..., None], exact, codes)
    return Mxfp4(codes[..., 0::2] | codes[..., 1::2] << 4, chosen.to(torch.uint8)), bad


def _quantize_native(call: QuantizeCall) -> tuple[Mxfp4, int]:
    x, scales = call.x.contiguous(), None if call.scales is None else call.scales.contiguous()
    shape = x.shape[:-1]
    weight = Mxfp4(torch.empty(*shape, BLOCK // 2, dtype=torch.uint8), torch.empty(shape, dtype=torch.uint8))
    bad = torch.empty((), dtype=torch.int64)
    addresses = map(native.address, (x, scales, *weight, bad))
    native.launch("quantize", *addresses, weight.scales.numel(), native.TYPES[x.dtype])
    return weight, int(bad)


def _quantize_native_why_not(call: QuantizeCall) -> str | None:
    return f"runs on the CPU, got {call.x.device.type}" if call.x.device.type != "cpu" else native.why_not(call.x)


QUANTIZE: Operation[QuantizeCall, tuple[Mxfp4, int]] = Operation(
    "quantize",
    (
        Impl("native", _quantize_native, _quantize_native_why_not),
        Impl("reference", _quantize, lambda call: None),
    ),
)


def is_canonical(weight: Mxfp4) -> Tensor:
    """For each block `[..., out, G]`: whether its values alone say its bytes, which `quantize` then writes again."""
    low, high = weight.blocks & 7, (weight.blocks >> 4) & 7
    return (torch.maximum(low, high).amax(-1) >= 6) | (weight.scales == 0)


def _codes(x: Tensor, scales: Tensor) -> Tensor:
    """The four bits of each value `[..., G, 32]` under the scale bytes `[..., G]`."""
    size = torch.ldexp(x.abs(), (BIAS - scales)[..., None])
    # Half-way between two magnitudes goes to the even code: down from 0.25, 1.25, 2.5 and 5, up from the others.
    code = torch.signbit(x).to(torch.uint8) << 3
    for down, up in ((0.25, 0.75), (1.25, 1.75), (2.5, 3.5)):
        code += (size > down).to(torch.uint8) + (size >= up)
    return code + (size > 5)


def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[256, 2]`: the two numbers of each byte."""
    numbers = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([numbers[byte % 16], numbers[byte // 16]], -1)


def _powers(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[256]`: the scale of each scale byte."""
    powers = torch.exp2(torch.arange(256, dtype=torch.float64, device=device) - BIAS)
    powers[NAN_SCALE] = torch.nan
    return powers.to(dtype)


def _check(weight: Mxfp4) -> None:
    blocks, scales = weight
    if (blocks.dtype, scales.dtype) != (torch.uint8, torch.uint8) or blocks.shape != (*scales.shape, BLOCK // 2):
        raise ValueError(
            f"MXFP4: blocks {blocks.dtype} {list(blocks.shape)} and scales {scales.dtype} {list(scales.shape)}, "
            f"wanted uint8 [..., out, G, {BLOCK // 2}] and uint8 [..., out, G]"
        )
