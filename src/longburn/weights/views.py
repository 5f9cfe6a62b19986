"""A checkpoint under other names: as a model calls its tensors, and as another format does. Nothing is read ahead."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from longburn.weights.checkpoint import plan
from longburn.weights.match import match_to_save
from longburn.weights.packed import Derived, DerivedSource
from longburn.weights.rules import Range, Rule
from longburn.weights.sources import TensorInfo, TensorSource


@dataclass(frozen=True)
class _Piece:
    """A range of a stored tensor, changed, is this range of the tensor to make."""

    stored: str
    stored_range: Range | None
    change: Callable[[Tensor], Tensor]
    place: Range | None


def in_our_names(source: TensorSource, model: nn.Module, rules: Sequence[Rule]) -> TensorSource:
    """The checkpoint as `model` (which may be on the meta device) calls and shapes its tensors, in their own dtypes.

    Raises:
        CheckpointMismatch: lists every missing, unused and mis-shaped tensor.
    """
    pieces: dict[str, list[_Piece]] = {}
    for link in plan(source.tensors, model.state_dict(keep_vars=True), rules)[0]:
        piece = _Piece(link.theirs, link.their_range, link.layout.to_ours, link.our_range)
        pieces.setdefault(link.ours, []).append(piece)
    return _assembled(source, pieces)


def in_their_names(source: TensorSource, rules: Sequence[Rule]) -> TensorSource:
    """What `in_our_names` gave, as the format of `rules` calls and shapes it.

    Raises:
        ValueError: a tensor that the rules cannot name.
    """
    pieces: dict[str, list[_Piece]] = {}
    for link in match_to_save(rules, source.tensors.keys()):
        piece = _Piece(link.ours, link.our_range, link.layout.to_theirs, link.their_range)
        pieces.setdefault(link.theirs, []).append(piece)
    return _assembled(source, pieces)


def in_dtype(source: TensorSource, names: Iterable[str], dtype: torch.dtype) -> TensorSource:
    """The same with these tensors in another dtype."""
    cast = {
        name: Derived(TensorInfo(source.tensors[name].shape, dtype), partial(_cast, name=name, dtype=dtype))
        for name in names
        if source.tensors[name].dtype != dtype
    }
    return DerivedSource(source, cast, [])


def _assembled(source: TensorSource, pieces: Mapping[str, Sequence[_Piece]]) -> TensorSource:
    derived = {}
    for name, group in pieces.items():
        shape = _join(_empty(source), group)  # tried out on a tensor without data
        derived[name] = Derived(TensorInfo(tuple(shape.shape), shape.dtype), partial(_make, pieces=group))
    return DerivedSource(source, derived, list(source.tensors))


def _empty(source: TensorSource) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        return torch.empty(source.tensors[name].shape, dtype=source.tensors[name].dtype, device="meta")

    return read


def _make(source: TensorSource, pieces: Sequence[_Piece]) -> Tensor:
    return _join(source.read, pieces)


def _join(read: Callable[[str], Tensor], pieces: Sequence[_Piece]) -> Tensor:
    def part(piece: _Piece) -> Tensor:
        stored = read(piece.stored)
        return piece.change(stored if piece.stored_range is None else piece.stored_range.of(stored))

    place = pieces[0].place
    if place is None:
        return part(pieces[0])
    in_order = sorted(pieces, key=lambda piece: piece.place.start if piece.place else 0)
    return torch.cat([part(piece) for piece in in_order], place.dim)


def _cast(source: TensorSource, name: str, dtype: torch.dtype) -> Tensor:
    return source.read(name).to(dtype)
