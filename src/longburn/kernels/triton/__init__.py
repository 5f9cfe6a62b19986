"""Kernels for GPUs, in Triton. Its modules import Triton, so others import them inside functions, when first used."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from longburn.kernels.registry import chosen

NAME = "triton"
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _missing() -> str | None:
    return None if find_spec("triton") else "needs the package triton"


@cache
def interprets() -> bool:
    """Whether Triton computes on the CPU, slowly, to test kernels without a GPU (`TRITON_INTERPRET=1`)."""
    if _missing():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def unavailable(*tensors: Tensor | None) -> str | None:
    """Why Triton's kernels cannot run on these tensors (None among them are skipped), or None.

    On the CPU they run only by name, `use_impl("triton")`, and only in Triton's interpreter.
    """
    if reason := _missing():
        return reason
    for tensor in tensors:
        if tensor is None or tensor.device.type == "cuda":
            continue
        if tensor.device.type != "cpu" or not (chosen() == NAME and interprets()):
            return f"needs CUDA, got {tensor.device.type}"
    return None


def has_gradients(*tensors: Tensor | None) -> bool:
    """Whether somebody wants the gradient of one of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def why_not(*tensors: Tensor | None) -> str | None:
    """Why kernels that have no gradients and cannot be traced cannot take these tensors, or None."""
    if torch.compiler.is_compiling():
        return "cannot be traced"
    return unavailable(*tensors) or ("has no gradients" if has_gradients(*tensors) else None)
