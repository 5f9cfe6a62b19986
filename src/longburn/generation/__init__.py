"""The generation harness: any `AutoregressiveModel`, driven over its caches."""

from longburn.generation.graph import DecodeStep
from longburn.generation.loop import GenerationConfig, GenerationError, TokenEvent, generate
from longburn.generation.model import AutoregressiveModel, check_tokens, last_of_rows
from longburn.generation.stop import TextStream

__all__ = [
    "AutoregressiveModel",
    "DecodeStep",
    "GenerationConfig",
    "GenerationError",
    "TextStream",
    "TokenEvent",
    "check_tokens",
    "generate",
    "last_of_rows",
]
