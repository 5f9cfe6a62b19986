"""How the tensors of a checkpoint correspond to those of a model: rules as data, good for both directions.

*Theirs* are the names of the checkpoint, *ours* those of the model. In a rule, `{i}` (or any other letter in
braces) stands for a number, the same on both sides:

    Rename("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.mlp.down.weight")

Every rule comes down to `Link`s: this range of that tensor of theirs is this range of that tensor of ours, in
this layout. Loading and saving read the same links from opposite ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Layout(Protocol):
    """An order of the elements of a tensor that can be changed and changed back."""

    def to_ours(self, tensor: Tensor) -> Tensor:
        """From the checkpoint's order to the model's."""

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """The inverse of `to_ours`."""


@dataclass(frozen=True)
class AsIs:
    """The same order on both sides."""

    def to_ours(self, tensor: Tensor) -> Tensor:
        return tensor

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True)
class InterleavedRows:
    """Query or key rows ordered for interleaved rotary pairs (0, 1), (2, 3), ...; ours are half-split (0, d/2), ...

    GGUF files of the `llama` architecture store the rows of each head so. Per head: `[d/2, 2] <-> [2, d/2]`; any
    further dimensions are left alone, so it serves weights `[heads * d, D]` and biases `[heads * d]`.
    """

    heads: int

    def to_ours(self, tensor: Tensor) -> Tensor:
        return self._swap(tensor, (self._half(tensor), 2))

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return self._swap(tensor, (2, self._half(tensor)))

    def _half(self, tensor: Tensor) -> int:
        if tensor.dim() == 0 or tensor.shape[0] % (2 * self.heads):
            raise ValueError(f"{list(tensor.shape)} is not {self.heads} heads of rotary pairs")
        return tensor.shape[0] // (2 * self.heads)

    def _swap(self, tensor: Tensor, pair: tuple[int, int]) -> Tensor:
        return tensor.reshape(self.heads, *pair, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class NewAxis:
    """Ours has an axis of size 1 at `dim` that theirs lacks."""

    dim: int

    def to_ours(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(self.dim)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor.squeeze(self.dim)


@dataclass(frozen=True)
class Transposed:
    """Ours has the last two dimensions of theirs swapped (dense experts of Hugging Face's GPT-OSS: `[E, in, out]`)."""

    def to_ours(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2)


@dataclass(frozen=True)
class Range:
    """Entries `start` to `start + size` of dimension `dim`, which has `total` entries."""

    dim: int
    start: int
    size: int
    total: int

    def of(self, tensor: Tensor) -> Tensor:
        """The view of `tensor` that this range names.

        Raises:
            ValueError: the tensor's dimension `dim` is not of size `total`.
        """
        if tensor.dim() <= self.dim or tensor.shape[self.dim] != self.total:
            raise ValueError(f"the parts make {self.total} in dimension {self.dim}, the whole is {list(tensor.shape)}")
        return tensor.narrow(self.dim, self.start, self.size)

    def __str__(self) -> str:
        return f"[{':, ' * self.dim}{self.start}:{self.start + self.size}]"


@dataclass(frozen=True)
class Link:
    """`theirs[their_range]`, put into our layout, is `ours[our_range]`; no range means all of it."""

    theirs: str
    ours: str
    their_range: Range | None = None
    our_range: Range | None = None
    layout: Layout = AsIs()


@dataclass(frozen=True)
class Part:
    """One piece of a concatenation: the name it has when it stands alone, its size along the dimension, its layout."""

    name: str
    size: int
    layout: Layout = AsIs()


@dataclass(frozen=True)
class Rename:
    """One tensor of theirs is one of ours."""

    theirs: str
    ours: str
    layout: Layout = AsIs()

    def links(self) -> tuple[Link, ...]:
        """The one link."""
        return (Link(self.theirs, self.ours, layout=self.layout),)


@dataclass(frozen=True)
class Merge:
    """Several tensors of theirs are one of ours, in this order along `dim` (q, k, v -> one fused weight)."""

    theirs: tuple[Part, ...]
    ours: str
    dim: int = 0

    def links(self) -> tuple[Link, ...]:
        """One link for each part."""
        return tuple(Link(p.name, self.ours, None, r, p.layout) for p, r in _ranges(self.theirs, self.dim))


@dataclass(frozen=True)
class Split:
    """One tensor of theirs is several of ours, in this order along `dim` (a fused q, k, v -> three weights)."""

    theirs: str
    ours: tuple[Part, ...]
    dim: int = 0

    def links(self) -> tuple[Link, ...]:
        """One link for each part."""
        return tuple(Link(self.theirs, p.name, r, None, p.layout) for p, r in _ranges(self.ours, self.dim))


@dataclass(frozen=True)
class Stack:
    """`count` tensors of theirs, numbered by `{e}`, are the entries of a new axis `dim` of ours (experts)."""

    theirs: str
    ours: str
    count: int
    dim: int = 0

    def links(self) -> tuple[Link, ...]:
        """One link for each entry."""
        if "{e}" not in self.theirs:
            raise ValueError(f"{self}: theirs must say with {{e}} where the number of the entry stands")
        parts = tuple(Part(self.theirs.replace("{e}", str(e)), 1, NewAxis(self.dim)) for e in range(self.count))
        return Merge(parts, self.ours, self.dim).links()


@dataclass(frozen=True)
class Tied:
    """A tensor of theirs that may be absent and, when there, must equal `ours`, which another rule fills.

    For the copy of the embedding that some checkpoints of tied models store as the head. It is not saved.
    """

    theirs: str
    ours: str

    def links(self) -> tuple[Link, ...]:
        """The comparison, as a link."""
        return (Link(self.theirs, self.ours),)


@dataclass(frozen=True)
class Skip:
    """A tensor of theirs that is left out on purpose."""

    theirs: str
    reason: str

    def links(self) -> tuple[Link, ...]:
        """None: nothing is read."""
        return ()


Rule = Rename | Merge | Split | Stack | Tied | Skip


def _ranges(parts: Sequence[Part], dim: int) -> Iterator[tuple[Part, Range]]:
    start, total = 0, sum(part.size for part in parts)
    for part in parts:
        yield part, Range(dim, start, part.size, total)
        start += part.size
