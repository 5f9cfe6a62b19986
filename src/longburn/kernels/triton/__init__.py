"""Kernels for GPUs, in Triton. Its modules import Triton, so others import them inside functions, when first used."""

from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from longburn.kernels.registry import chosen

Call = TypeVar("Call")
Result = TypeVar("Result")

NAME = "triton"
TYPES = (torch.float32, torch.bfloat16, torch.float16)


# Not a cached function: the compiler reads a constant, but warns of caches.
_MISSING = None if find_spec("triton") else "needs the package triton"


@cache
def interprets() -> bool:
    """Whether Triton computes on the CPU, slowly, to test kernels without a GPU (`TRITON_INTERPRET=1`)."""
    if _MISSING:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def unavailable(*tensors: Tensor | None) -> str | None:
    """Why Triton's kernels cannot run on these tensors (None among them are skipped), or None.

    On the CPU they run only by name, `use_impl("triton")`, and only in Triton's interpreter.
    """
    if _MISSING:
        return _MISSING
    for tensor in tensors:
        if tensor is None or tensor.device.type == "cuda":
            continue
        if tensor.device.type != "cpu" or not (chosen() == NAME and interprets()):
            return f"needs CUDA, got {tensor.device.type}"
    return None


def overlaps(device: torch.device) -> bool:
    """Whether a kernel there can start while the one before it ends (programmatic dependent launch, from Hopper on).

    Such a kernel says `gdc_wait` before it reads or overwrites what another has touched.
    """
    return device.type == "cuda" and _capability(device)[0] >= 9


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def has_gradients(*tensors: Tensor | None) -> bool:
    """Whether somebody wants the gradient of one of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def why_not(*tensors: Tensor | None) -> str | None:
    """Why kernels that have no gradients and cannot be traced cannot take these tensors, or None."""
    if torch.compiler.is_compiling():
        return "cannot be traced"
    return unavailable(*tensors) or ("has no gradients" if has_gradients(*tensors) else None)


def on_its_device(run: Callable[[Call], Result]) -> Callable[[Call], Result]:
    """`run(call)` with the GPU of the call's first tensor as the current one, because Triton launches on that one."""

    @wraps(run)
    def there(call: Call) -> Result:
        device = _first_tensor(call).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return run(call)
        with torch.cuda.device(device):
            return run(call)

    return there


def _first_tensor(call: object) -> Tensor:
    while not isinstance(call, Tensor):
        call = call[0] if isinstance(call, tuple) else next(iter(vars(call).values()))
    return call
