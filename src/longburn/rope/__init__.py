"""Rotary position encodings: every published context extension, 3-D axial ones, and ACE-Step v1's mismatched one."""

from longburn.rope.axial import Coordinates, Rope3dEncoding
from longburn.rope.mismatched import MismatchedRotaryEncoding
from longburn.rope.pairs import Angles
from longburn.rope.rotary import RotaryEncoding, ntk_yarn
from longburn.rope.scaling import (
    DynamicNtkScaling,
    Frequencies,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    ProportionalScaling,
    RopeScaling,
    YarnScaling,
)

__all__ = [
    "Angles",
    "Coordinates",
    "DynamicNtkScaling",
    "Frequencies",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "MismatchedRotaryEncoding",
    "NtkScaling",
    "ProportionalScaling",
    "Rope3dEncoding",
    "RopeScaling",
    "RotaryEncoding",
    "YarnScaling",
    "ntk_yarn",
]
