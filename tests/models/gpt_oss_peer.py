"""transformers' GPT-OSS with small random weights in which nothing is close to zero, to compare with."""

from pathlib import Path
from typing import Any

import torch

WINDOW, VOCABULARY = 8, 256
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "sliding_window": WINDOW,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "eos_token_id": None,
    "pad_token_id": None,
}


def peer(seed: int = 0, **settings: Any) -> Any:
    """The model in fp32: sinks N(0, 1), norms N(1, 0.1), weights and biases N(0, 0.2)."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(seed)
    theirs = GptOssForCausalLM(GptOssConfig(**SIZES | settings)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            mean, deviation = (0.0, 1.0) if "sinks" in name else (1.0, 0.1) if "norm" in name else (0.0, 0.2)
            parameter.normal_(mean, deviation)
    return theirs


def save(theirs: Any, directory: Path) -> Path:
    """Written by transformers itself."""
    theirs.save_pretrained(directory)
    return directory


def tokens(batch: int = 2, length: int = 45, seed: int = 1) -> torch.Tensor:
    """Random ids; the default is more than five windows long."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
