"""Additive attention bias, by absolute positions."""

from longburn.bias.alibi import Alibi, alibi_slopes
from longburn.bias.cope import Cope
from longburn.bias.curves import DistanceCurves
from longburn.bias.dape import Dape
from longburn.bias.dense import DenseBias
from longburn.bias.distance import KerpleLog, KerplePower, Sandwich, T5Buckets
from longburn.bias.fire import Fire
from longburn.bias.forget import ForgetBias
from longburn.bias.policy import BiasContext, BiasPolicy, Bound, Policy
from longburn.bias.relative import RelativeBias
from longburn.bias.selective import SelectiveBias
from longburn.bias.sinks import sinks_from_per_head
from longburn.kernels.attend import BiasTerms

__all__ = [
    "Alibi",
    "BiasContext",
    "BiasPolicy",
    "BiasTerms",
    "Bound",
    "Cope",
    "Dape",
    "DenseBias",
    "DistanceCurves",
    "Fire",
    "ForgetBias",
    "KerpleLog",
    "KerplePower",
    "Policy",
    "RelativeBias",
    "Sandwich",
    "SelectiveBias",
    "T5Buckets",
    "alibi_slopes",
    "sinks_from_per_head",
]
