"""Additive attention bias, by absolute positions."""

from longburn.bias.alibi import Alibi, alibi_slopes
from longburn.bias.dense import DenseBias
from longburn.bias.policy import BiasContext, BiasPolicy, Bound, Policy
from longburn.bias.sinks import sinks_from_per_head
from longburn.kernels.attend import BiasTerms

__all__ = [
    "Alibi",
    "BiasContext",
    "BiasPolicy",
    "BiasTerms",
    "Bound",
    "DenseBias",
    "Policy",
    "alibi_slopes",
    "sinks_from_per_head",
]
