"""The generation harness: any `AutoregressiveModel`, driven over its caches."""

from longburn.generate.loop import GenerationConfig, GenerationError, TokenEvent, generate
from longburn.generate.model import AutoregressiveModel, check_tokens, last_of_rows
from longburn.generate.stop import TextStream

__all__ = [
    "AutoregressiveModel",
    "GenerationConfig",
    "GenerationError",
    "TextStream",
    "TokenEvent",
    "check_tokens",
    "generate",
    "last_of_rows",
]
