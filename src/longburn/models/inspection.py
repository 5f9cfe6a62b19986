"""What a checkpoint holds and whether it would load, told without reading its data."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from longburn.models.decoder import Decoder
from longburn.models.family import build, family_name, read_family
from longburn.models.gpt_oss import GptOss, GptOssConfig, hf_rules, is_gpt_oss, original_rules
from longburn.models.gpt_oss.names import HF_EXPERTS, ORIGINAL_EXPERTS, is_original
from longburn.models.llama import LlamaConfig, gguf_rules
from longburn.models.llama import hf_rules as llama_rules
from longburn.models.settings import read_settings
from longburn.weights import CheckpointError, CheckpointMismatch, GgufFile, Rule, TensorSource, open_source, plan
from longburn.weights.sources import SAFETENSORS_DTYPES

_KINDS = {dtype: kind for kind, dtype in SAFETENSORS_DTYPES.items()}


class StoredTensor(NamedTuple):
    """A tensor of a file: its type as the file calls it, and its bytes there."""

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        path: what was looked at.
        architecture: one line, or None if the model is not known.
        config: the model's sizes and constants.
        parameters: numbers that the model has (MXFP4 values counted one by one).
        tensors: all that the checkpoint holds.
        problems: why it would not load, a line for each; none if it would.
    """

    path: Path
    architecture: str | None
    config: Mapping[str, Any]
    parameters: int
    tensors: tuple[StoredTensor, ...]
    problems: tuple[str, ...]


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Looks at a safetensors file (with the `config.json` beside it) or directory, or a GGUF file.

    What is wrong is part of the answer: every missing, surplus, mis-shaped or cut-off tensor, by the same comparison
    that `load_checkpoint` makes.
    """
    path = Path(path)
    try:
        source = open_source(path)
    except CheckpointError as error:
        return Inspection(path, None, {}, 0, (), (str(error),))
    tensors = tuple(StoredTensor(name, info.shape, *_stored(source, name)) for name, info in source.tensors.items())
    try:
        known = _recognise(path, source)
    except ValueError as error:
        return Inspection(path, None, {}, 0, tensors, (str(error),))
    problems: list[str] = []
    try:
        plan(known.source.tensors, known.model.state_dict(keep_vars=True), known.rules)
    except CheckpointMismatch as error:
        kinds = {"missing": error.missing, "surplus": error.unused}
        kinds |= {"mis-shaped": error.misshapen, "damaged": error.damaged}
        problems += [f"{kind}: {line}" for kind, lines in kinds.items() for line in lines]
    except ValueError as error:
        problems.append(str(error))
    return Inspection(path, known.title, known.config, count_parameters(known.model), tensors, tuple(problems))


class _Known(NamedTuple):
    title: str
    config: dict[str, Any]
    model: Decoder
    source: TensorSource
    rules: Sequence[Rule]


def _recognise(path: Path, source: TensorSource) -> _Known:
    """The model on the meta device, and the rules by which the source would fill it."""
    if isinstance(source, GgufFile):
        llama = LlamaConfig.from_gguf(source.metadata, tied="output.weight" not in source.tensors)
        return _Known("Llama, GGUF", _stated(llama), _on_meta(llama), source, gguf_rules(llama))
    settings = read_settings(path if path.is_dir() else path.parent)
    if not is_gpt_oss(settings):
        llama = read_family(settings)
        title = f"{family_name(llama)}, Hugging Face's format"
        return _Known(title, _stated(llama), _on_meta(llama), source, llama_rules(llama))
    config, original = GptOssConfig.from_config(settings), is_original(source)
    names = ORIGINAL_EXPERTS if original else HF_EXPERTS
    storage: Literal["mxfp4", "dense"] = "mxfp4" if names.are_packed(source) else "dense"
    view = names.packed(source) if storage == "mxfp4" else names.dense(source)
    rules = (original_rules if original else hf_rules)(config, storage)
    title = f"GPT-OSS, {'OpenAI' if original else 'Hugging Face'}'s format, {storage.replace('mxfp4', 'MXFP4')} experts"
    return _Known(title, _stated(config), _on_meta(config, storage), view, rules)


def _on_meta(config: LlamaConfig | GptOssConfig, storage: Literal["mxfp4", "dense"] = "dense") -> Decoder:
    with torch.device("meta"):
        if isinstance(config, LlamaConfig):
            return build(config)
        return GptOss(config, experts=storage, dtype=torch.bfloat16)


def _stated(settings: Any) -> dict[str, Any]:
    """What was said of a dataclass, without what is not set or was computed from the rest."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings) if field.init}
    nested = {name: _stated(value) if is_dataclass(value) else value for name, value in values.items()}
    return {name: value for name, value in nested.items() if value is not None}


def _stored(source: TensorSource, name: str) -> tuple[str, int]:
    if isinstance(source, GgufFile):
        return source.kind(name), source.nbytes(name)
    info = source.tensors[name]
    return _KINDS[info.dtype], math.prod(info.shape) * info.dtype.itemsize


def count_parameters(model: torch.nn.Module) -> int:
    """Numbers in a model: those of its parameters, and two for every byte of MXFP4."""
    packed = sum(2 * buffer.numel() for name, buffer in model.named_buffers() if name.endswith(".blocks"))
    return packed + sum(parameter.numel() for parameter in model.parameters())


class Group(NamedTuple):
    """Tensors of one shape and type whose names differ in numbers only, written `layers.{0..23}.weight`."""

    name: str
    shape: tuple[int, ...]
    kind: str
    copies: int
    nbytes: int


def group_tensors(tensors: Iterable[StoredTensor]) -> list[Group]:
    """Tensors grouped over layers, in the order of their first ones."""
    groups: dict[tuple[tuple[str, ...], tuple[int, ...], str], list[StoredTensor]] = {}
    for tensor in tensors:
        groups.setdefault((tuple(_NUMBER.split(tensor.name)), tensor.shape, tensor.kind), []).append(tensor)
    found = []
    for (words, shape, kind), members in groups.items():
        numbers = zip(*(map(int, _NUMBER.findall(tensor.name)) for tensor in members), strict=True)
        ranges = [_ranges(sorted(set(values))) for values in numbers]
        name = "".join(word + number for word, number in zip(words, [*ranges, ""], strict=True))
        found.append(Group(name, shape, kind, len(members), sum(tensor.nbytes for tensor in members)))
    return found


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _ranges(values: Sequence[int]) -> str:
    """7 alone, {0..23}, {0,2..4}."""
    if len(values) == 1:
        return str(values[0])
    parts: list[list[int]] = []
    for value in values:
        if parts and parts[-1][-1] == value - 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return "{" + ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}..{p[-1]}" for p in parts) + "}"
