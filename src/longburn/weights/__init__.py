"""Reads checkpoints (safetensors, GGUF) into models by rules, and keeps the models that can be fetched by name."""

from longburn.weights.checkpoint import CheckpointMismatch, load_checkpoint, open_source, plan, save_checkpoint
from longburn.weights.gguf import GgufFile
from longburn.weights.packed import DerivedSource, PackedNames
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
from longburn.weights.sources import (
    CheckpointError,
    PlacingSource,
    Progress,
    SafetensorsSource,
    StateDictSource,
    TensorInfo,
    TensorSource,
)
from longburn.weights.store import ModelEntry, StoreError, available, fetch, locate
from longburn.weights.views import in_dtype, in_our_names, in_their_names
from longburn.weights.writer import write_file, write_shards

__all__ = [
    "CheckpointError",
    "CheckpointMismatch",
    "DerivedSource",
    "GgufFile",
    "InterleavedRows",
    "Layout",
    "Merge",
    "ModelEntry",
    "PackedNames",
    "Part",
    "PlacingSource",
    "Progress",
    "Rename",
    "Rule",
    "SafetensorsSource",
    "Skip",
    "Split",
    "Stack",
    "StateDictSource",
    "StoreError",
    "TensorInfo",
    "TensorSource",
    "Tied",
    "Transposed",
    "available",
    "fetch",
    "in_dtype",
    "in_our_names",
    "in_their_names",
    "load_checkpoint",
    "locate",
    "open_source",
    "plan",
    "save_checkpoint",
    "write_file",
    "write_shards",
]
