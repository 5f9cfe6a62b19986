"""A trained model as files: OpenAI's original format, experts as MXFP4, and beside it everything in bf16."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longburn.kernels.mxfp4 import quantize
from longburn.models.gpt_oss import GptOss, GptOssConfig, original_rules
from longburn.nn import ExpertStorage
from longburn.weights import save_checkpoint
from tiny_training.corpus import END
from tiny_training.training import EXPERTS

FILE = "model.safetensors"
SHARD = 14_000_000  # bytes of tensors in one file of the bf16 checkpoint
LIMIT = 12_000_000  # bytes of all that is shipped

CARD = """# tiny-gpt-oss

A language model of the GPT-OSS architecture with {parameters:.1f} million parameters, trained from nothing by
`examples/train_tiny_gpt_oss.py` in {minutes:.1f} minutes on one {device}. OpenAI's original checkpoint format, experts
in MXFP4. It continues English prose in the manner of old books; it knows no facts and follows no instructions.

- Licence of the weights: Apache-2.0 (`LICENSE`).
- Training texts: public domain, {megabytes:.1f} MB, every package and checksum in `provenance.json`.
- Held out: *{test}*: {test_bits:.3f} bits per byte; a part of each source: {validation_bits:.3f}.
- Training log: `log.json`.
"""


def save(weights: Mapping[str, Tensor], config: GptOssConfig, folder: Path) -> None:
    """Write `folder/mxfp4` and `folder/bf16`, each a checkpoint directory; an earlier one is replaced file by file."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / FILE
        _write(weights, config, "dense", whole)
        _split(whole, folder / "bf16")
    (folder / "mxfp4").mkdir(parents=True, exist_ok=True)
    _write(weights, config, "mxfp4", folder / "mxfp4" / FILE)
    for name in ("bf16", "mxfp4"):
        (folder / name / "config.json").write_text(json.dumps(config.to_original(), indent=1) + "\n", encoding="utf-8")


def _write(weights: Mapping[str, Tensor], config: GptOssConfig, storage: ExpertStorage, path: Path) -> None:
    with torch.device("meta"):
        model = GptOss(config, experts=storage, dtype=torch.bfloat16)
    state = {}
    for name, weight in weights.items():
        if storage == "mxfp4" and name.endswith(EXPERTS):
            state[f"{name}.blocks"], state[f"{name}.scales"] = quantize(weight)
        else:
            state[name] = weight.bfloat16()
    model.load_state_dict(state, assign=True)
    save_checkpoint(model, path, original_rules(config, storage))


def _split(whole: Path, folder: Path) -> None:
    """The tensors of a file over several of at most SHARD bytes, in the order of their names."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in sorted(load_file(whole).items()):
        if size and size + tensor.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    for index, shard in enumerate(shards, 1):
        save_file(shard, folder / f"model-{index:05}-of-{len(shards):05}.safetensors", metadata={"format": "pt"})


def export(results: Path, corpus: Path, licence: Path, target: Path) -> int:
    """Put what `train` wrote, its tokenizer and the account of its texts where the package keeps it; returns the bytes.

    Raises:
        CheckpointError: the checkpoint does not load.
        ValueError: it is larger than LIMIT. Nothing is written then.
    """
    log = json.loads((results / "log.json").read_text(encoding="utf-8"))
    provenance = json.loads((corpus / "provenance.json").read_text(encoding="utf-8"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "made"
        shutil.copytree(results / "mxfp4", made)
        for source in (results / "log.json", corpus / "provenance.json", corpus / "tokenizer.json", licence):
            shutil.copy(source, made)
        special = {"bos_token": END, "eos_token": END}
        (made / "tokenizer_config.json").write_text(json.dumps(special) + "\n", encoding="utf-8")
        (made / "README.md").write_text(_card(log, provenance), encoding="utf-8")
        GptOss.from_checkpoint(made)
        for file in made.iterdir():
            file.chmod(0o644)
        size = sum(file.stat().st_size for file in made.iterdir())
        if size > LIMIT:
            raise ValueError(f"{size:,} bytes are to be shipped, wanted at most {LIMIT:,}; train a smaller model")
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    return size


def _card(log: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    return CARD.format(
        parameters=log["parameters"] / 1e6,
        minutes=log["seconds"] / 60,
        device=log["device"],
        megabytes=provenance["splits"]["train"]["bytes"] / 1e6,
        test=provenance["test"],
        test_bits=log["bits_per_byte"]["mxfp4"]["test"],
        validation_bits=log["bits_per_byte"]["mxfp4"]["validation"],
    )
