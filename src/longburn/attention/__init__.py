"""Attention layers over one function, `attend`."""

from longburn.attention.attention import Attention
from longburn.attention.core import attend, attend_with_lse
from longburn.attention.cross import CrossAttention, CrossKeyValues
from longburn.attention.linear import LinearAttention, LinearState
from longburn.kernels.attend import merge

__all__ = [
    "Attention",
    "CrossAttention",
    "CrossKeyValues",
    "LinearAttention",
    "LinearState",
    "attend",
    "attend_with_lse",
    "merge",
]
