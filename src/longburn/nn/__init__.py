"""Small blocks that several models share."""

from longburn.nn.feedforward import SwiGLU, clamped_swiglu
from longburn.nn.moe import Experts, ExpertStorage, MoE, Mxfp4Weight
from longburn.nn.norm import RMSNorm
from longburn.nn.residual import Residual

__all__ = ["ExpertStorage", "Experts", "MoE", "Mxfp4Weight", "RMSNorm", "Residual", "SwiGLU", "clamped_swiglu"]
