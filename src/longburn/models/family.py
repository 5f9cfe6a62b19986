"""The decoders of Llama's plan: which of them a `config.json` stands for."""

from collections.abc import Mapping
from typing import Any

import torch

from longburn.cache import WindowPolicy
from longburn.models.llama import Llama, LlamaConfig
from longburn.models.qwen3 import Qwen3, Qwen3Config

_CONFIGS: tuple[type[LlamaConfig], ...] = (LlamaConfig, Qwen3Config)


def read_family(settings: Mapping[str, Any]) -> LlamaConfig:
    """The configuration that the dictionary of a `config.json` stands for.

    Raises:
        ValueError: a `model_type` that is not of the family, or what its configuration refuses.
    """
    known = {config.MODEL_TYPE: config for config in _CONFIGS}
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"config.json: model_type is {kind!r}, wanted {', '.join(map(repr, known))} or 'gpt_oss'")
    return known[kind].from_hf(settings)


def build(config: LlamaConfig, *, policy: WindowPolicy | None = None, dtype: torch.dtype = torch.float32) -> Llama:
    """The model of a configuration, with parameters that are not yet set."""
    kind = Qwen3 if isinstance(config, Qwen3Config) else Llama
    return kind(config, policy=policy, dtype=dtype)


def family_name(config: LlamaConfig) -> str:
    """What the model is called: "Llama" or "Qwen3"."""
    return "Qwen3" if isinstance(config, Qwen3Config) else "Llama"
