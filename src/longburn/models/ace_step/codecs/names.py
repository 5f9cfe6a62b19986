"""The names of codec checkpoints, both ways, and their weight normalisation.

Weight normalisation (Salimans and Kingma, arXiv 1602.07868) keeps a weight as a magnitude g for every entry of its
first dimension and a direction v; it acts as `g * v / ||v||`. A model that is not trained needs only that.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from longburn.models.ace_step.codecs.layers import TwoTaps
from longburn.weights import DerivedSource, Rename, Rule, TensorInfo, TensorSource
from longburn.weights.packed import Derived

# How the two halves are called: by the function that PyTorch had first, and by the one that replaced it.
_HALVES = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))

_UNIT = {
    **{f"snake{n}.{part}": f"snake{n}.{part}" for n in (1, 2) for part in ("alpha", "beta")},
    **{f"conv{n}.{part}": f"conv{n}.{part}" for n in (1, 2) for part in ("weight", "bias")},
}
_BLOCK = {
    **{f"res_unit{n + 1}.{theirs}": f"units.{n}.{ours}" for n in range(3) for theirs, ours in _UNIT.items()},
    **{f"snake1.{part}": f"snake.{part}" for part in ("alpha", "beta")},
}
_ENDS = {
    **{f"conv1.{part}": f"entry.{part}" for part in ("weight", "bias")},
    **{f"snake1.{part}": f"snake.{part}" for part in ("alpha", "beta")},
    **{f"conv2.{part}": f"exit.{part}" for part in ("weight", "bias")},
}


def oobleck_rules(downsampling_ratios: Sequence[int]) -> tuple[Rule, ...]:
    """Names of `AutoencoderOobleck`, official and diffusers' alike, without weight normalisation."""
    rules = [
        Rename(f"{half}.{theirs}", f"{half}.{ours}")
        for half in ("encoder", "decoder")
        for theirs, ours in _ENDS.items()
    ]
    for half in ("encoder", "decoder"):
        rules += [
            Rename(f"{half}.block.{{i}}.{theirs}", f"{half}.blocks.{{i}}.{ours}") for theirs, ours in _BLOCK.items()
        ]
    for part in ("weight", "bias"):
        rules.append(Rename(f"encoder.block.{{i}}.conv1.{part}", f"encoder.blocks.{{i}}.down.{part}"))
    rules.append(Rename("decoder.block.{i}.conv_t1.bias", "decoder.blocks.{i}.up.bias"))
    for i, stride in enumerate(reversed(downsampling_ratios)):
        rules.append(Rename(f"decoder.block.{i}.conv_t1.weight", f"decoder.blocks.{i}.up.weight", TwoTaps(stride)))
    return tuple(rules)


def without_weight_norm(source: TensorSource) -> TensorSource:
    """The checkpoint with every `X.weight_g` and `X.weight_v` shown as the `X.weight` that they make, in fp32."""
    shown: dict[str, Derived] = {}
    replaced: list[str] = []
    for stem, (g, v) in _normalised(source.tensors).items():
        shape, damage = source.tensors[v].shape, source.tensors[g].damage or source.tensors[v].damage
        shown[f"{stem}weight"] = Derived(TensorInfo(shape, torch.float32, damage), partial(_joined, g=g, v=v))
        replaced += [g, v]
    return DerivedSource(source, shown, replaced)


def with_weight_norm(source: TensorSource, names: Sequence[str]) -> TensorSource:
    """The checkpoint with the weights `names` shown as `..._g` and `..._v`: the inverse of `without_weight_norm`."""
    shown: dict[str, Derived] = {}
    for name in names:
        info = source.tensors[name]
        magnitudes = TensorInfo((info.shape[0], *(1 for _ in info.shape[1:])), info.dtype, info.damage)
        shown[f"{name}_g"] = Derived(magnitudes, partial(_magnitudes, name=name))
        shown[f"{name}_v"] = Derived(info, partial(_direction, name=name))
    return DerivedSource(source, shown, list(names))


def _normalised(names: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    found = {}
    for g, v in _HALVES:
        for name in names:
            stem = name.removesuffix(g)
            if stem != name and stem + v in names:
                found[stem] = (name, stem + v)
    return found


def _norm(v: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(v, dim=tuple(range(1, v.dim())), keepdim=True)
    return norm


def _joined(source: TensorSource, g: str, v: str) -> Tensor:
    direction = source.read(v).float()
    return direction * (source.read(g).float() / _norm(direction))


def _magnitudes(source: TensorSource, name: str) -> Tensor:
    return _norm(source.read(name))


def _direction(source: TensorSource, name: str) -> Tensor:
    return source.read(name)
