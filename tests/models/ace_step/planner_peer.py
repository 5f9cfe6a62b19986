"""A small language model of ACE-Step's kind for the planner's tests: its tokenizer, and transformers' own Qwen3."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers, trainers
from tokenizers import Tokenizer as Core
from tokenizers.models import BPE

CODES = 40  # valid ones; four more have a name
# Letters with what stands before them, digits one by one, punctuation with the newlines after it, newlines, spaces.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "# Instruction\nGenerate audio semantic tokens based on the given conditions:\n\n",
    "# Caption\na calm piano\n\n# Lyric\n[Verse]\nla la\n",
    *("bpm: 120\ncaption: A song.\n  More of it.\nduration: 64\ngenres: pop\n" for _ in range(3)),
    *(
        f"keyscale: {note}{mark} {mode}\n"
        for note in "ABCDEFG"
        for mark in ("", "#", "♭")
        for mode in ("major", "minor")
    ),
    *(f"language: {code}\n" for code in ("en", "es", "de", "zh", "unknown")),
    "timesignature: 4\n system user assistant",
]


@cache
def core() -> Core:
    """Byte-level BPE of some 350 merges; codes end the vocabulary."""
    tokenizer = Core(BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    tokenizer.add_special_tokens([f"<|audio_code_{code}|>" for code in range(CODES + 4)])
    return tokenizer


def theirs(seed: int = 5, **settings: Any) -> Any:
    """transformers' model with random weights, in fp64 so that no choice is decided by rounding."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": core().get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    }
    model = Qwen3ForCausalLM(Qwen3Config(**sizes | settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name
            parameter.normal_(1.0 if norm else 0.0, 0.1 if norm else 0.2)
    return model


def save(directory: Path, model: Any) -> Path:
    """As a checkpoint's directory."""
    model.save_pretrained(directory)
    core().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return directory


class Guided:
    """Guided logits of transformers' model, over its own cache: of one row, or of a pair."""

    def __init__(self, model: Any, rows: list[list[int]], scale: float) -> None:
        self._model, self._scale = model, scale
        self._rows = [(row, None) for row in (rows if scale != 1 else rows[:1])]
        self._read = 0

    def __call__(self, made: list[int]) -> torch.Tensor:
        """Logits `[V]` after the rows and what was made, which goes on from the last call's."""
        new, self._read = made[self._read :], len(made)
        logits: list[torch.Tensor] = []
        with torch.no_grad():
            for i, (row, held) in enumerate(self._rows):
                out = self._model(torch.tensor([[*(row if held is None else ()), *new]]), past_key_values=held)
                self._rows[i] = (row, out.past_key_values)
                logits.append(out.logits[0, -1])
        return logits[0] if len(logits) == 1 else logits[1] + self._scale * (logits[0] - logits[1])
