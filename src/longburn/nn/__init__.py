"""Small blocks that several models share."""

from longburn.nn.feedforward import SwiGLU

__all__ = ["SwiGLU"]
