"""MXFP4 on the device: bytes to values on their way through registers, and whole weights unpacked."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from longburn.kernels.triton import interprets

if TYPE_CHECKING:
    from longburn.kernels.mxfp4 import DequantizeCall

BYTES = tl.constexpr(16)  # of a block of 32 values
PROGRAM = 128  # blocks a program unpacks

# Four bytes to two pairs of bf16 from their low halves and two from their high ones. A number's three low bits are the
# low bits of an exponent and the first one of a mantissa: in bits 8 to 6 of a bf16 they are the number times 2^-126,
# zero and the half (a subnormal) too. One multiplication by 4160 or 260 copies four bits both there and to the sign.
# The product with 2^126 is exact, and then the one with the block's scale ($6, $5) is rounded as a bf16 is.
_UNPACK = """
{
    .reg .b32 w, u, a, b, c, d, grow, none;
    mov.b32 grow, 0x7E807E80;
    mov.b32 none, 0x80008000;
    prmt.b32 w, $4, $4, 0x3120;
    shr.u32 u, w, 8;
    and.b32 a, w, 0x000F000F;
    and.b32 b, w, 0x00F000F0;
    and.b32 c, u, 0x000F000F;
    and.b32 d, u, 0x00F000F0;
    mul.lo.u32 a, a, 4160;
    mul.lo.u32 b, b, 260;
    mul.lo.u32 c, c, 4160;
    mul.lo.u32 d, d, 260;
    and.b32 a, a, 0x81C081C0;
    and.b32 b, b, 0x81C081C0;
    and.b32 c, c, 0x81C081C0;
    and.b32 d, d, 0x81C081C0;
    fma.rn.bf16x2 a, a, grow, none;
    fma.rn.bf16x2 b, b, grow, none;
    fma.rn.bf16x2 c, c, grow, none;
    fma.rn.bf16x2 d, d, grow, none;
    fma.rn.bf16x2 $0, a, $5, none;
    fma.rn.bf16x2 $1, c, $6, none;
    fma.rn.bf16x2 $2, b, $5, none;
    fma.rn.bf16x2 $3, d, $6, none;
}
"""
UNPACK = tl.constexpr(_UNPACK)


@triton.jit
def power(scale):
    """What a scale byte stands for, in fp32: 2^(byte - 127), NaN for 255."""
    bits = tl.maximum(scale.to(tl.int32) << 23, 1 << 22)
    return tl.where(scale == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _number(code):
    """The number of four bits, in fp32."""
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126, as above


@triton.jit
def _narrow(value, TYPE: tl.constexpr):
    """An fp32 value in TYPE. In bf16 every value of a weight is exact, so it is the upper half."""
    if tl.bfloat16 == TYPE:
        value = (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(TYPE, bitcast=True)
    else:
        value = value.to(TYPE)
    return value


@triton.jit
def unpack(packed, scale, TYPE: tl.constexpr, FAST: tl.constexpr):
    """The even and the odd values of bytes `[R, C]` under scale bytes `[R, C / 16]`, each `[R, C]` of TYPE.

    FAST: by instructions of the GPU, for bf16; else by what Triton's interpreter knows too, for every type.
    """
    R: tl.constexpr = packed.shape[0]
    C: tl.constexpr = packed.shape[1]
    size = power(scale)
    if FAST:
        size = size.to(tl.bfloat16)
    size = tl.broadcast_to(size[:, :, None], R, C // BYTES, BYTES).reshape(R, C)
    if FAST:
        even, odd = tl.inline_asm_elementwise(
            UNPACK, "=r,=r,=r,=r,r,r,r", [packed, size], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        code = packed.to(tl.int32)
        even = _narrow(_number(code & 15) * size, TYPE)
        odd = _narrow(_number(code >> 4) * size, TYPE)
    return even, odd


@triton.jit
def _dequantize(blocks, scales, y, count, BLOCKS: tl.constexpr, FAST: tl.constexpr):
    """BLOCKS blocks of 32 values of a contiguous weight."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < count
    byte = block[:, None] * BYTES + tl.arange(0, BYTES)[None]
    packed = tl.load(blocks + byte, mask=there[:, None], other=0)
    scale = tl.load(scales + block, mask=there, other=0)[:, None]
    even, odd = unpack(packed, scale, y.dtype.element_ty, FAST)
    values = tl.join(even, odd).reshape(BLOCKS, 2 * BYTES)
    at = block[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None]
    tl.store(y + at, values, mask=there[:, None])


def is_fast(dtype: torch.dtype) -> bool:
    """Whether `unpack` gives this type by instructions of the GPU."""
    return dtype == torch.bfloat16 and not interprets()


def operand_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which products of this type are formed; the interpreter takes bf16 for integers there."""
    if dtype == torch.float32 or interprets():
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def dequantize(call: "DequantizeCall") -> Tensor:
    """A whole weight, unpacked."""
    blocks, scales = call.weight
    values = torch.empty(call.weight.logical_shape, dtype=call.dtype, device=blocks.device)
    count = scales.numel()
    if count:
        _dequantize[triton.cdiv(count, PROGRAM),](
            blocks, scales, values, count, BLOCKS=PROGRAM, FAST=is_fast(call.dtype), num_warps=4
        )
    return values
