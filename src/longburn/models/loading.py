"""A model and its tokenizer, from a name, a GGUF file or a directory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from longburn.cache import AttnWindow, WindowPolicy
from longburn.models.llama import Llama, LlamaConfig, gguf_rules, hf_rules
from longburn.models.settings import read_settings
from longburn.text import Tokenizer
from longburn.weights import GgufFile, Rule, SafetensorsSource, TensorSource, load_checkpoint, locate

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, and the tokenizer that belongs to it."""

    name: str
    path: Path
    model: Llama
    tokenizer: Tokenizer


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    window: AttnWindow | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a model.

    Args:
        name: a name from `longburn.weights.available()`, a `.gguf` file, or a directory in Hugging Face layout
            (`config.json`, safetensors, `tokenizer.json`).
        dtype: of the weights and the cache.
        device: where they go.
        window: of every layer; default all keys, as the models were trained.
        progress: called with (elements placed, elements in all) while the weights are read.

    Raises:
        CheckpointError: the files are missing, damaged, or do not fit together.
        ValueError: the architecture or one of its settings is not known.
    """
    path = Path(name)
    if not path.exists():
        path = locate(str(name))
    source, config, rules, tokenizer = _from_directory(path) if path.is_dir() else _from_gguf(path)
    with torch.device("meta"):
        model = Llama(config, policy=WindowPolicy.uniform(window or AttnWindow()), dtype=dtype)
    load_checkpoint(model, source, rules, device=device, progress=progress)
    return LoadedModel(str(name), path, model.eval(), tokenizer)


Parts = tuple[TensorSource, LlamaConfig, tuple[Rule, ...], Tokenizer]


def _from_gguf(path: Path) -> Parts:
    file = GgufFile(path)
    config = LlamaConfig.from_gguf(file.metadata, tied="output.weight" not in file.tensors)
    return file, config, gguf_rules(config), Tokenizer.from_gguf(file.metadata)


def _from_directory(path: Path) -> Parts:
    config = LlamaConfig.from_hf(read_settings(path))
    return SafetensorsSource(path), config, hf_rules(config), Tokenizer.from_file(path)
