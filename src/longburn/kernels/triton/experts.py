"""Experts on the GPU: which kernels compute a call."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longburn.kernels.triton import experts_few, experts_unpacked
from longburn.kernels.triton.experts_grouped import experts_grouped

if TYPE_CHECKING:
    from longburn.kernels.experts import ExpertsCall


def experts(call: "ExpertsCall") -> Tensor:
    """By the number of choices alone: few, many, or so many that weights are unpacked first."""
    if not call.chosen.numel():
        return torch.zeros_like(call.x) if call.residual is None else call.residual.to(call.x.dtype)
    if experts_few.why_not(call) is None:
        return experts_few.experts_few(call)
    if experts_unpacked.why_not(call) is None:
        return experts_unpacked.experts_unpacked(call)
    return experts_grouped(call)
