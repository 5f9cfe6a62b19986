"""longburn: building blocks for fast, long-context streaming inference on PyTorch.

Positions travel with keys, the mask is arithmetic on positions, and streaming equals the full forward however the stream
is cut into chunks.
"""

from importlib.metadata import version

from longburn.attention import (
    Attention,
    CrossAttention,
    CrossKeyValues,
    LinearAttention,
    LinearState,
    attend,
    attend_with_lse,
    merge,
)
from longburn.bias import Alibi, BiasPolicy, BiasTerms, DenseBias, sinks_from_per_head
from longburn.cache import AttnWindow, CacheManager, RollingKVCache, WindowPolicy
from longburn.kernels.registry import ImplError, use_impl
from longburn.rope import Rope3dEncoding, RotaryEncoding, ntk_yarn

__version__ = version("longburn")
