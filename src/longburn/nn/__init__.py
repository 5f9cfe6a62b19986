"""Small blocks that several models share."""

from longburn.nn.feedforward import SwiGLU, clamped_swiglu
from longburn.nn.moe import Experts, ExpertStorage, MoE, Mxfp4Weight
from longburn.nn.norm import RMSNorm

__all__ = ["ExpertStorage", "Experts", "MoE", "Mxfp4Weight", "RMSNorm", "SwiGLU", "clamped_swiglu"]
