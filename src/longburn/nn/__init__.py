"""Small blocks that several models share."""

from longburn.nn.feedforward import SwiGLU
from longburn.nn.norm import RMSNorm

__all__ = ["RMSNorm", "SwiGLU"]
