"""Reads checkpoints (safetensors, GGUF) into models by rules, and keeps the models that can be fetched by name."""

from longburn.weights.checkpoint import CheckpointMismatch, load_checkpoint, open_source, save_checkpoint
from longburn.weights.gguf import GgufFile
from longburn.weights.packed import PackedNames
from longburn.weights.rules import (
    InterleavedRows,
    Layout,
    Merge,
    Part,
    Rename,
    Rule,
    Skip,
    Split,
    Stack,
    Tied,
    Transposed,
)
from longburn.weights.sources import CheckpointError, SafetensorsSource, TensorInfo, TensorSource
from longburn.weights.store import ModelEntry, StoreError, available, fetch, locate

__all__ = [
    "CheckpointError",
    "CheckpointMismatch",
    "GgufFile",
    "InterleavedRows",
    "Layout",
    "Merge",
    "ModelEntry",
    "PackedNames",
    "Part",
    "Rename",
    "Rule",
    "SafetensorsSource",
    "Skip",
    "Split",
    "Stack",
    "StoreError",
    "TensorInfo",
    "TensorSource",
    "Tied",
    "Transposed",
    "available",
    "fetch",
    "load_checkpoint",
    "locate",
    "open_source",
    "save_checkpoint",
]
