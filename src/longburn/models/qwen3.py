"""Qwen3 (Qwen team, arXiv 2505.09388): Llama's plan with an RMSNorm over every head's q and k.

Checkpoints: Hugging Face's layout (`Qwen3ForCausalLM`); the names are those of `longburn.models.llama.hf_rules`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from longburn.models.llama import Llama, LlamaConfig


@dataclass(frozen=True)
class Qwen3Config(LlamaConfig):
    """A model's sizes, under the names of a Hugging Face `config.json`."""

    MODEL_TYPE: ClassVar[str] = "qwen3"

    qk_norm: bool = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the dictionary of a `config.json`.

        Raises:
            ValueError: another architecture or activation, a missing key, a rope setting that is not known, or layers
                that were trained with a window.
        """
        if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
            raise ValueError(
                "Qwen3Config: layers with a window (use_sliding_window) are not known; wanted full attention in all"
            )
        return super().from_hf({**config, "head_dim": config.get("head_dim") or 128})  # not hidden_size / heads


class Qwen3(Llama):
    """A Qwen3 model; implements `AutoregressiveModel`. Arguments are those of `Llama`."""
