"""From one format of GPT-OSS checkpoints to the other, and from MXFP4 to bf16 and back, one tensor at a time."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from longburn.kernels.mxfp4 import Mxfp4, is_canonical
from longburn.models.gpt_oss.config import GptOssConfig
from longburn.models.gpt_oss.model import GptOss
from longburn.models.gpt_oss.names import HF_EXPERTS, ORIGINAL_EXPERTS, hf_rules, is_original, original_rules
from longburn.models.settings import read_settings
from longburn.weights import (
    CheckpointError,
    DerivedSource,
    PackedNames,
    Progress,
    SafetensorsSource,
    TensorSource,
    in_dtype,
    in_our_names,
    in_their_names,
    write_file,
    write_shards,
)

Format = Literal["original", "hf"]
Storage = Literal["mxfp4", "bf16"]

SCALES = (
    "mxfp4.scales"  # beside bf16 experts: scales that their values do not tell; safetensors, named as the model does
)
OURS = PackedNames(("experts.gate_up", "experts.down"), ".")
BESIDE = (  # what belongs to a model and is the same in both formats
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "USAGE_POLICY",
)
_RELEASED_TOKENS = {
    "eos_token_id": 200002,
    "pad_token_id": 199999,
}  # of the released vocabulary, in Hugging Face's form
_NOT_PACKED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    format: Format | None = None,
    experts: Storage | None = None,
    max_shard_size: int | None = 5 * 10**9,
    replace: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the GPT-OSS checkpoint in the directory `source` as the directory `target`.

    The host holds one tensor at a time. `target` appears when it is complete. Other tensors than the experts keep
    their bytes. MXFP4 experts unpack to bf16 without loss. bf16 experts that were unpacked here pack to the same bytes:
    scales that their values do not tell are kept in the file `mxfp4.scales`, which travels along. All others are
    rounded to the nearest MXFP4 weight, which changes no value that MXFP4 can hold.

    Args:
        format: "original" (OpenAI's) or "hf" (Hugging Face's); default as it is.
        experts: "mxfp4" or "bf16"; default as they are stored.
        max_shard_size: bytes of tensors in one file; None puts all into one.
        replace: an existing checkpoint at `target` may be replaced; it goes when the new one is complete.
        progress: called with (bytes written, bytes in all).

    Raises:
        CheckpointError: the source is damaged or does not fit its configuration, or holds NaN scales.
        FileExistsError: there is something at `target`.
        ValueError: a setting or a size that the other format cannot express.
    """
    source, target = Path(source), Path(target)
    check_target(source, target, replace)
    settings = read_settings(source)
    config = GptOssConfig.from_config(settings)
    stored = SafetensorsSource(source)
    original = is_original(stored)
    to_original = original if format is None else format == "original"
    view, packed = _in_our_names(stored, config, original)
    pack = packed if experts is None else experts == "mxfp4"
    known = SafetensorsSource(source / SCALES) if not packed and (source / SCALES).is_file() else None
    kept: TensorSource | None = None  # scales that only the file beside the weights can tell
    if pack and not packed:
        _check_sizes(config)
        view = OURS.packed(view, known)
    elif packed and not pack:
        kept, view = _untold_scales(view), OURS.dense(view)
    elif not packed:
        kept = known
    if experts == "bf16":
        view = in_dtype(view, [name for name in view.tensors if name.endswith(OURS.endings)], torch.bfloat16)
    rules = (original_rules if to_original else hf_rules)(config, "mxfp4" if pack else "dense")
    new = _settings(settings, config, original, to_original, pack)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch, "new")
        made.mkdir()
        write_shards(made, in_their_names(view, rules), max_shard_size=max_shard_size, progress=progress)
        if kept is not None and kept.tensors:
            write_file(made / SCALES, kept)
        (made / "config.json").write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
        for name in BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, made / name)
        if target.exists():
            os.rename(target, Path(scratch, "old"))
        os.rename(made, target)


def check_target(source: Path, target: Path, replace: bool) -> None:
    """Raises FileExistsError unless `target` is free, or a checkpoint to `replace` that does not hold `source`."""
    if not target.exists() and not target.is_symlink():
        return
    if not replace:
        raise FileExistsError(f"{target} exists: choose another place, or allow that it is replaced")
    if not target.is_dir() or target.is_symlink() or (any(target.iterdir()) and not (target / "config.json").is_file()):
        raise FileExistsError(f"{target} is not a model directory (it has no config.json), so it is not replaced")
    if source.resolve().is_relative_to(target.resolve()):
        raise FileExistsError(f"{target} holds the source {source}: write to another place")


def _in_our_names(stored: TensorSource, config: GptOssConfig, original: bool) -> tuple[TensorSource, bool]:
    """The checkpoint as the model names it, and whether its experts are packed."""
    names = ORIGINAL_EXPERTS if original else HF_EXPERTS
    storage: Literal["mxfp4", "dense"] = "mxfp4" if names.are_packed(stored) else "dense"
    with torch.device("meta"):
        model = GptOss(config, experts=storage, dtype=torch.bfloat16)
    rules = (original_rules if original else hf_rules)(config, storage)
    view = names.packed(stored) if storage == "mxfp4" else names.dense(stored)
    return in_our_names(view, model, rules), storage == "mxfp4"


def _untold_scales(view: TensorSource) -> TensorSource:
    """The scales of those packed weights that their values alone would not pack to the same bytes.

    Raises:
        CheckpointError: scales that stand for NaN.
    """
    untold = []
    for name in view.tensors:
        if not name.endswith(".scales"):
            continue
        weight = Mxfp4(view.read(name.removesuffix("scales") + "blocks"), view.read(name))
        if (weight.scales == 255).any():
            raise CheckpointError(f"{name} holds MXFP4 scales that stand for NaN (byte 255)")
        if not all(is_canonical(Mxfp4(*expert)).all() for expert in zip(*weight, strict=True)):
            untold.append(name)
    return DerivedSource(view, {}, [name for name in view.tensors if name not in untold])


def _check_sizes(config: GptOssConfig) -> None:
    for name in ("hidden_size", "intermediate_size"):
        if getattr(config, name) % 32:
            raise ValueError(f"MXFP4 packs 32 values: {name} is {getattr(config, name)}, wanted a multiple of 32")


def _settings(
    given: Mapping[str, Any], config: GptOssConfig, original: bool, to_original: bool, pack: bool
) -> dict[str, Any]:
    """The new `config.json`. In the same format it is the old one but for what says how the experts are stored."""
    if to_original:
        return dict(given) if original else config.to_original()
    settings = dict(given) if not original else config.to_hf()
    if original and config.vocab_size == 201088:
        settings |= _RELEASED_TOKENS
    settings.pop("quantization_config", None)
    if pack:
        settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": _NOT_PACKED}
    return settings | {"dtype": "bfloat16"}
