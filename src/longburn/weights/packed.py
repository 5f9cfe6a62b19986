"""Weights that one format stores packed as MXFP4 and another dense: each shown as the other while it is read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from longburn.kernels.mxfp4 import BLOCK, Mxfp4, dequantize, quantize
from longburn.weights.sources import PlacingSource, TensorInfo, TensorSource


@dataclass(frozen=True)
class PackedNames:
    """Which tensors `[E, out, in]` of a format may be packed, and how it names their two halves.

    A packed weight `NAME` is uint8 `NAME{separator}blocks` `[E, out, in / 32, 16]` and uint8 `NAME{separator}scales`
    `[E, out, in / 32]`. A floating-point `NAME{separator}blocks` of three dimensions without scales is the dense weight
    under a wrong name, which some programs write; it is taken for what it is.

    Args:
        endings: how the names of these tensors end.
        separator: between the name and "blocks" or "scales".
        transposed: dense weights are stored `[E, in, out]`.
    """

    endings: tuple[str, ...]
    separator: str
    transposed: bool = False

    def are_packed(self, source: TensorSource) -> bool:
        """Whether any of these tensors is packed."""
        return any(not info.dtype.is_floating_point for _, info in self._blocks(source))

    def dense(self, source: TensorSource) -> TensorSource:
        """The checkpoint with packed weights shown dense, in bf16, which holds every MXFP4 value exactly."""
        shown: dict[str, Derived] = {}
        replaced: list[str] = []
        for name, info in self._blocks(source):
            blocks, scales = self._halves(name)
            if _is_mislabelled(info):
                shown[name] = Derived(info, partial(_renamed, stored=blocks))
                replaced.append(blocks)
            elif scales in source.tensors and len(info.shape) == 4:
                experts, out, groups, _ = info.shape
                shape = (experts, groups * BLOCK, out) if self.transposed else (experts, out, groups * BLOCK)
                make = partial(_unpack, blocks=blocks, scales=scales, transposed=self.transposed)
                damage = info.damage or source.tensors[scales].damage
                shown[name] = Derived(TensorInfo(shape, torch.bfloat16, damage), make)
                replaced += [blocks, scales]
        return DerivedSource(source, shown, replaced)

    def packed(self, source: TensorSource, scales: TensorSource | None = None) -> TensorSource:
        """The checkpoint with dense weights shown packed: each rounded to the nearest MXFP4 weight.

        Args:
            scales: may hold, under the name of a packed weight's scales, those to use where they are exact.
        """
        shown: dict[str, Derived] = {}
        replaced: list[str] = []
        for name, stored, info in self._dense(source):
            experts, rows, columns = info.shape
            out, size = (columns, rows) if self.transposed else (rows, columns)
            for index, (half, tail) in enumerate(zip(self._halves(name), ((BLOCK // 2,), ()), strict=True)):
                shape = (experts, out, size // BLOCK, *tail)
                known = scales if scales is not None and self._halves(name)[1] in scales.tensors else None
                read = partial(known.read, self._halves(name)[1]) if known else None
                make = partial(_pack, stored=stored, half=index, transposed=self.transposed, scales=read)
                shown[half] = Derived(TensorInfo(shape, torch.uint8, info.damage), make)
            replaced.append(stored)
        return DerivedSource(source, shown, replaced)

    def _halves(self, name: str) -> tuple[str, str]:
        return f"{name}{self.separator}blocks", f"{name}{self.separator}scales"

    def _blocks(self, source: TensorSource) -> Iterator[tuple[str, TensorInfo]]:
        """The weights that have blocks, by the weight's own name."""
        for stored, info in source.tensors.items():
            name = stored.removesuffix(f"{self.separator}blocks")
            if name != stored and name.endswith(self.endings):
                yield name, info

    def _dense(self, source: TensorSource) -> Iterator[tuple[str, str, TensorInfo]]:
        """The dense weights: the weight's own name, the name under which it is stored."""
        for name, info in source.tensors.items():
            if name.endswith(self.endings) and len(info.shape) == 3:
                yield name, name, info
        for name, info in self._blocks(source):
            if _is_mislabelled(info):
                yield name, self._halves(name)[0], info


@dataclass(frozen=True)
class Derived:
    """A tensor that is computed from tensors of a source."""

    info: TensorInfo
    make: Callable[[TensorSource], Tensor]


class DerivedSource:
    """A source in which some tensors are `replaced` by others that are computed when they are read."""

    def __init__(self, source: TensorSource, derived: Mapping[str, Derived], replaced: list[str]) -> None:
        self._source, self._derived = source, derived
        kept = {name: info for name, info in source.tensors.items() if name not in replaced}
        self._tensors = kept | {name: tensor.info for name, tensor in derived.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU."""
        return self._derived[name].make(self._source) if name in self._derived else self._source.read(name)

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill `target`, contiguous and of the tensor's shape and dtype."""
        if name not in self._derived and isinstance(self._source, PlacingSource):
            self._source.read_into(name, target)
        else:
            target.copy_(self.read(name))


def _is_mislabelled(info: TensorInfo) -> bool:
    return info.dtype.is_floating_point and len(info.shape) == 3


def _renamed(source: TensorSource, stored: str) -> Tensor:
    return source.read(stored)


def _unpack(source: TensorSource, blocks: str, scales: str, transposed: bool) -> Tensor:
    weight = Mxfp4(source.read(blocks), source.read(scales))
    values = torch.empty(weight.logical_shape, dtype=torch.bfloat16)
    for expert in range(values.shape[0]):  # one at a time: the way there takes several times its size
        values[expert] = dequantize(Mxfp4(weight.blocks[expert], weight.scales[expert]), torch.bfloat16)
    return values.mT if transposed else values


def _pack(
    source: TensorSource, stored: str, half: int, transposed: bool, scales: Callable[[], Tensor] | None
) -> Tensor:
    values = source.read(stored)
    values = values.mT if transposed else values
    given = None if scales is None else scales()
    experts, out, size = values.shape
    packed = torch.empty((experts, out, size // BLOCK, *((BLOCK // 2,), ())[half]), dtype=torch.uint8)
    for expert in range(experts):
        packed[expert] = quantize(values[expert], None if given is None else given[expert])[half]
    return packed
