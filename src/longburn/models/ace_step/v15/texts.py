"""Captions and lyrics as numbers, by Qwen3-Embedding-0.6B: captions go through all its layers, lyrics through none.

Both become tokens by its own `tokenizer.json`, which also puts an end after every text.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longburn.models.ace_step.planner.prompts import MOST_LYRIC_TOKENS
from longburn.models.decoder import Decoder
from longburn.models.llama import hf_rules
from longburn.models.qwen3 import Qwen3, Qwen3Config
from longburn.models.settings import read_settings
from longburn.weights import Progress, SafetensorsSource, TensorSource, load_checkpoint
from longburn.weights.packed import Derived, DerivedSource

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CAPTION_TOKENS = 256  # that are read


class TextEncoder:
    """Texts `[1, T, M]` for `ConditionEncoder`.

    Args:
        model: a decoder whose last hidden states are read.
        tokenizer: of the `tokenizers` library, with what it adds to a text.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> TextEncoder:
        """From a directory with `config.json`, safetensors and `tokenizer.json`.

        A diffusers pipeline has the last one in a directory `tokenizer` beside it.

        Raises:
            CheckpointError: files that are missing or damaged, or that do not fit.
            ValueError: another architecture, or no tokenizer.
        """
        path = Path(path)
        config = Qwen3Config.from_hf({**read_settings(path), "tie_word_embeddings": True})
        with torch.device("meta"):
            model = Qwen3(config, dtype=dtype)
        source = _of_a_whole_model(SafetensorsSource(path))
        load_checkpoint(model, source, hf_rules(config), device=device, progress=progress)
        return cls(model.eval(), _read_tokenizer(path))

    @torch.no_grad()
    def caption(self, text: str) -> Tensor:
        """The last hidden states of a text; what follows its first 256 tokens is not read."""
        ids = self._ids(text)[:, :CAPTION_TOKENS]
        cache = self.model.init_cache(1, max_length=ids.shape[1])
        return self.model.forward_features(ids, cache, all_positions=True)

    @torch.no_grad()
    def lyrics(self, text: str) -> Tensor:
        """The embeddings of a text's tokens.

        Raises:
            ValueError: more than 2048 tokens.
        """
        embedded: Tensor = self.model.embed(self.lyric_ids(text).to(self.model.embed.weight.device))
        return embedded

    def lyric_ids(self, text: str) -> Tensor:
        """Tokens of a text for `lyrics`, `[1, T]`; raises what it raises."""
        ids = self._ids(text)
        if ids.shape[1] > MOST_LYRIC_TOKENS:
            raise ValueError(
                f"ACE-Step: the lyrics and the words around them are {ids.shape[1]} tokens, wanted at most "
                f"{MOST_LYRIC_TOKENS}; cut the lyrics"
            )
        return ids

    def _ids(self, text: str) -> Tensor:
        return torch.tensor([self.tokenizer.encode(text).ids])


def _of_a_whole_model(source: TensorSource) -> TensorSource:
    """The checkpoint as one with a head has it: an embedding model's names lack the `model.` before them."""
    bare = [name for name in source.tensors if not name.startswith(("model.", "lm_head."))]
    shown = {
        f"model.{name}": Derived(source.tensors[name], partial(lambda held, of: held.read(of), of=name))
        for name in bare
    }
    return DerivedSource(source, shown, bare) if bare else source


def _read_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    tried = [path / "tokenizer.json", path.parent / "tokenizer" / "tokenizer.json"]
    file = next((file for file in tried if file.is_file()), None)
    if file is None:
        raise ValueError(f"{path}: no tokenizer.json, nor {tried[1]}; the released checkpoints come with it")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer: {error}") from error
