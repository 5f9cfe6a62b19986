"""Launching a kernel without looking at all its arguments again."""

from collections.abc import Hashable, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

_compiled: dict[Hashable, Any] = {}
_ALIGNMENT = 16  # bytes; Triton compiles another kernel for pointers that are less aligned
_LARGEST = (1 << 31) - 1  # and for numbers beyond it


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    constants: tuple[Hashable, ...],
    **options: Any,
) -> None:
    """`kernel[grid](*tensors, *numbers, *constants, **options)`, at a fraction of its cost on the host.

    Triton derives from every argument of every launch for which types, divisors and constants the kernel must have been
    compiled. Here the types of the tensors and the constants decide (strides among them): the parameters of the numbers
    must be named in the kernel's `do_not_specialize`.
    """
    device = next(x.device for x in tensors if x is not None)
    if device.type == "cuda" and device.index != torch.cuda.current_device():  # where Triton launches
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, constants, **options)
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    types = tuple([None if x is None else x.dtype for x in tensors])
    usual = reduce(or_, filter(None, addresses)) % _ALIGNMENT == 0 and max(numbers) <= _LARGEST
    key = (kernel, device, types, constants, *options.values())
    found = _compiled.get(key) if usual else None
    if found is not None:
        found[grid](*addresses, *numbers, *constants)
        return
    result = kernel[grid](*tensors, *numbers, *constants, **options)
    if usual and result is not None:  # the interpreter compiles nothing
        _compiled[key] = result
