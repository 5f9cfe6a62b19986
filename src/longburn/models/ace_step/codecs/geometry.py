"""What convolutions along time read: how far apart two moments of a signal can be and still touch each other."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Conv:
    """The geometry of a convolution, or of a `transposed` one, along time."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    transposed: bool = False

    @property
    def span(self) -> int:
        """From the first tap to the last."""
        return self.dilation * (self.kernel - 1)

    def reads(self, start: int, stop: int) -> tuple[int, int]:
        """The inputs (first, one past the last) on which outputs `start .. stop - 1` depend."""
        if self.transposed:  # output o takes input i at tap o + padding - i * stride
            return -((self.span - start - self.padding) // self.stride), (stop - 1 + self.padding) // self.stride + 1
        first = start * self.stride - self.padding
        return first, first + (stop - 1 - start) * self.stride + self.span + 1

    def length(self, inputs: int) -> int:
        """The number of outputs."""
        if self.transposed:
            return (inputs - 1) * self.stride - 2 * self.padding + self.span + 1
        return (inputs + 2 * self.padding - self.span - 1) // self.stride + 1


class Reach(NamedTuple):
    """How many frames before and after its own one frame depends on."""

    before: int
    after: int


def reads(path: Iterable[Conv], start: int, stop: int) -> tuple[int, int]:
    """The inputs on which outputs `start .. stop - 1` of a stack depend, as if it had neither beginning nor end."""
    for conv in reversed(tuple(path)):
        start, stop = conv.reads(start, stop)
    return start, stop


def length(path: Iterable[Conv], inputs: int) -> int:
    """The number of outputs of a stack."""
    for conv in path:
        inputs = conv.length(inputs)
    return inputs


def reach(path: Iterable[Conv], *, inputs: int, outputs: int) -> Reach:
    """The frames that one frame depends on, where a frame is so many inputs, and outputs, of the stack."""
    start, stop = reads(path, 0, outputs)
    return Reach(-(start // inputs), (stop - 1) // inputs)
