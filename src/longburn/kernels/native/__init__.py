"""Plain C for decode steps on the CPU, compiled once by the machine's own compiler and kept in the user's cache.

Nothing depends on it: without a compiler, or with `LONGBURN_NATIVE=0`, `why_not` says so and PyTorch's own kernels do
the work. Every function of the library takes one structure of 64-bit words: `launch` makes it from addresses, integers
and floats, in the order of the structure in the C file. Nothing is checked there: who launches has asked `why_not`.
"""

import ctypes
import struct
import threading
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from longburn.kernels.native.build import library

TYPES = {torch.float32: 0, torch.bfloat16: 1}

Launch = tuple["ctypes._NamedFuncPointer", "ctypes.Array[ctypes.c_int64]"]
_listener: Callable[[Launch], None] | None = None  # hears of every launch of one thread while that records a tape
_listening_thread = 0


def why_not(*tensors: Tensor | None) -> str | None:
    """Why the compiled kernels cannot take these tensors."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in TYPES:
            return f"takes fp32 or bf16, got {tensor.dtype}"
    first = next((t.dtype for t in tensors if t is not None), None)
    if any(tensor is not None and tensor.dtype != first for tensor in tensors):
        return f"takes one type for all, got {', '.join(sorted({str(t.dtype) for t in tensors if t is not None}))}"
    return unavailable()


def unavailable() -> str | None:
    """Why there are no compiled kernels at all, on this machine or at this moment."""
    if torch.compiler.is_compiling():
        return "cannot be traced"
    built = library()
    return built if isinstance(built, str) else None


def launch(name: str, *words: "int | float") -> None:
    """Call `longburn_<name>`; a float becomes a double."""
    arguments = (ctypes.c_int64 * len(words))(*[_bits(word) if isinstance(word, float) else word for word in words])
    function = _function(name)
    if _listener is not None and _listening_thread == threading.get_ident():
        _listener((function, arguments))
    function(arguments)


def listen(listener: "Callable[[Launch], None] | None") -> None:
    """Hand every further launch of this thread to the listener as well (None: to nobody)."""
    global _listener, _listening_thread
    _listening_thread = threading.get_ident()
    _listener = listener


def is_listening() -> bool:
    """Whether this thread's launches are heard."""
    return _listener is not None and _listening_thread == threading.get_ident()


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def row_stride(tensor: Tensor) -> int:
    """Of the first dimension; 0 if all rows share the one that is there."""
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)


@cache
def _bits(value: float) -> int:
    """The bits of a double as an integer."""
    return int(struct.unpack("q", struct.pack("d", value))[0])


@cache
def _function(name: str) -> "ctypes._NamedFuncPointer":
    built = library()
    assert not isinstance(built, str)
    function = getattr(built, f"longburn_{name}")
    function.argtypes, function.restype = [ctypes.c_void_p], None
    return function  # type: ignore[no-any-return]
