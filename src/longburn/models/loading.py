"""A model and its tokenizer, from a name, a GGUF file or a directory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from longburn.cache import AttnWindow, WindowPolicy
from longburn.kernels import native
from longburn.models.decoder import Decoder
from longburn.models.family import build, read_family
from longburn.models.gpt_oss import GptOss, GptOssConfig, is_gpt_oss
from longburn.models.llama import Llama, LlamaConfig, gguf_rules, hf_rules
from longburn.models.settings import read_settings
from longburn.text import Tokenizer, harmony_tokenizer
from longburn.weights import GgufFile, SafetensorsSource, load_checkpoint, locate

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, and the tokenizer that belongs to it."""

    name: str
    path: Path
    model: Decoder
    tokenizer: Tokenizer


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    window: AttnWindow | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a model: a Llama, a Qwen3 or a GPT-OSS.

    Args:
        name: a name from `longburn.weights.available()`, a `.gguf` file, or a directory with `config.json` and
            safetensors. It also holds its `tokenizer.json`; only a GPT-OSS without one gets `harmony_tokenizer()`.
        dtype: of the weights and the cache. Experts that are stored as MXFP4 stay so.
        device: where they go.
        window: of every layer that sees all keys as it was trained; default that it does. GPT-OSS's other layers keep
            the window that is theirs.
        progress: called with (elements placed, elements in all) while the weights are read.

    Raises:
        CheckpointError: the files are missing, damaged, or do not fit together.
        ValueError: the architecture or one of its settings is not known.
        ImportError, StoreError: the tokenizer of a GPT-OSS needs a package or a file that is not here.
    """
    path = Path(name)
    if not path.exists():
        path = locate(str(name))
    if path.suffix == ".safetensors":  # the weights that name a model: what else it needs lies beside them
        path = path.parent
    model, tokenizer = (_from_directory if path.is_dir() else _from_gguf)(path, dtype, device, window, progress)
    native.unavailable()  # compiles, where this machine has not yet: no prompt should have to wait for it
    return LoadedModel(str(name), path, model.eval(), tokenizer)


Device = torch.device | str
Loaded = tuple[Decoder, Tokenizer]


def _from_gguf(
    path: Path, dtype: torch.dtype, device: Device, window: AttnWindow | None, progress: Progress | None
) -> Loaded:
    file = GgufFile(path)
    config = LlamaConfig.from_gguf(file.metadata, tied="output.weight" not in file.tensors)
    tokenizer = Tokenizer.from_gguf(file.metadata)
    model = _on_meta(config, dtype, window)
    load_checkpoint(model, file, gguf_rules(config), device=device, progress=progress)
    return model, tokenizer


def _from_directory(
    path: Path, dtype: torch.dtype, device: Device, window: AttnWindow | None, progress: Progress | None
) -> Loaded:
    settings = read_settings(path)
    if is_gpt_oss(settings):
        policy = GptOssConfig.from_config(settings).policy(window)
        # First: what is wrong with it shows before gigabytes are read.
        tokenizer = Tokenizer.from_file(path) if (path / "tokenizer.json").exists() else harmony_tokenizer()
        return GptOss.from_checkpoint(path, dtype=dtype, device=device, policy=policy, progress=progress), tokenizer
    config = read_family(settings)
    tokenizer = Tokenizer.from_file(path)
    model = _on_meta(config, dtype, window)
    load_checkpoint(model, SafetensorsSource(path), hf_rules(config), device=device, progress=progress)
    return model, tokenizer


def _on_meta(config: LlamaConfig, dtype: torch.dtype, window: AttnWindow | None) -> Llama:
    with torch.device("meta"):
        return build(config, policy=WindowPolicy.uniform(window or AttnWindow()), dtype=dtype)
