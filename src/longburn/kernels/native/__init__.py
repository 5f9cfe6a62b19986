"""Plain C for decode steps on the CPU, compiled once by the machine's own compiler and kept in the user's cache.

Nothing depends on it: without a compiler, or with `LONGBURN_NATIVE=0`, `why_not` says so and PyTorch's own kernels do
the work. The functions below take tensors, check nothing and return nothing: who calls them has asked `why_not`.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from longburn.kernels.native.build import library

TYPES = {torch.float32: 0, torch.bfloat16: 1}


def why_not(*tensors: Tensor | None) -> str | None:
    """Why the compiled kernels cannot take these tensors."""
    if torch.compiler.is_compiling():
        return "cannot be traced"
    kinds = {t.dtype for t in tensors if t is not None}
    if len(kinds) != 1 or not kinds <= TYPES.keys():
        return f"takes fp32 or bf16, one type for all, got {', '.join(sorted(map(str, kinds)))}"
    built = library()
    return built if isinstance(built, str) else None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _function(name: str) -> "ctypes._NamedFuncPointer":
    built = library()
    assert not isinstance(built, str)
    return getattr(built, name)  # type: ignore[no-any-return]


def linear(weight: Tensor, x: Tensor, bias: Tensor | None, y: Tensor, out: int, size: int) -> None:
    """y `[out]` = weight `[out, size]` x + bias."""
    _function("longburn_linear")(
        weight.data_ptr(), x.data_ptr(), _pointer(bias), y.data_ptr(), out, size, TYPES[x.dtype]
    )


def swiglu(
    gate_up: Tensor, gate_up_bias: Tensor | None, down: Tensor, bias: Tensor | None, x: Tensor, y: Tensor
) -> None:
    """y `[out]` = down `[out, hidden]` (silu(gate) * up) + bias, gate and up the halves of gate_up x + its bias."""
    out, hidden = down.shape
    _function("longburn_swiglu")(
        gate_up.data_ptr(),
        _pointer(gate_up_bias),
        down.data_ptr(),
        _pointer(bias),
        x.data_ptr(),
        y.data_ptr(),
        out,
        hidden,
        x.shape[-1],
        TYPES[x.dtype],
    )


def rms_norm(x: Tensor, weight: Tensor, y: Tensor, eps: float) -> None:
    """y = normalised x, by rows of the last dimension."""
    n = x.shape[-1]
    _function("longburn_rms_norm")(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // n, n, eps, TYPES[x.dtype]
    )


class AttendArgs(ctypes.Structure):
    """`attend_args` of rows.c."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "q_sink", "k", "v", "sinks", "slopes", "q_pos", "k_pos", "out", "lse")
        ),
        *((name, ctypes.c_int64) for name in ("B", "H", "K", "T", "S", "D")),
        *((name, ctypes.c_int64) for name in ("k_row", "k_head", "k_slot", "v_row", "v_head", "v_slot")),
        *((name, ctypes.c_int64) for name in ("q_pos_row", "k_pos_row", "window", "sink_tokens")),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int),
        ("splits", ctypes.c_int64),
    )


def attend(args: AttendArgs) -> None:
    """Attention of a few queries; see rows.c."""
    _function("longburn_attend")(ctypes.byref(args))
