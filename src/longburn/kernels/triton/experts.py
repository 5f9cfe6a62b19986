"""Experts on the GPU."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longburn.kernels.triton.experts_grouped import experts_grouped

if TYPE_CHECKING:
    from longburn.kernels.experts import ExpertsCall


def experts(call: "ExpertsCall") -> Tensor:
    """All of it, few choices or many."""
    if not call.chosen.numel():
        return torch.zeros_like(call.x) if call.residual is None else call.residual.to(call.x.dtype)
    return experts_grouped(call)
