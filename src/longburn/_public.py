"""The public names of longburn, which `longburn/__init__.py` hands out on first use."""

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
from longburn.bias import (
    Alibi,
    BiasPolicy,
    BiasTerms,
    DenseBias,
    DistanceCurves,
    ForgetBias,
    RelativeBias,
    sinks_from_per_head,
)
from longburn.cache import AttnWindow, CacheManager, RollingKVCache, WindowPolicy
from longburn.generation import AutoregressiveModel, GenerationConfig, TokenEvent, generate
from longburn.kernels.registry import ImplError, use_impl
from longburn.rope import Rope3dEncoding, RotaryEncoding, ntk_yarn
from longburn.sampling import Sampler, SamplerConfig, sample
from longburn.weights import load_checkpoint

__all__ = [
    "Alibi",
    "Attention",
    "AttnWindow",
    "AutoregressiveModel",
    "BiasPolicy",
    "BiasTerms",
    "CacheManager",
    "CrossAttention",
    "CrossKeyValues",
    "DenseBias",
    "DistanceCurves",
    "ForgetBias",
    "GenerationConfig",
    "ImplError",
    "LinearAttention",
    "LinearState",
    "RelativeBias",
    "RollingKVCache",
    "Rope3dEncoding",
    "RotaryEncoding",
    "Sampler",
    "SamplerConfig",
    "TokenEvent",
    "WindowPolicy",
    "attend",
    "attend_with_lse",
    "generate",
    "load_checkpoint",
    "merge",
    "ntk_yarn",
    "sample",
    "sinks_from_per_head",
    "use_impl",
]
