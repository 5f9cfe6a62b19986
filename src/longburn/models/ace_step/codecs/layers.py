"""Convolutions whose results do not depend on how long the signal around them is.

On the CPU, PyTorch and oneDNN choose among several algorithms, which sum in different orders. Two of the choices hang
on the length of the signal, and so would break bits between one piece and windows of it; these layers avoid both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.models.ace_step.codecs.geometry import Conv


class Pointwise(nn.Conv1d):
    """A convolution over channels alone.

    With one thread, PyTorch would hand it to a matrix product that splits its sum by the number of columns. A dilation,
    which means nothing to a single tap, leads to oneDNN as with more threads.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1, dilation=2)


class Upsampling(nn.Module):
    """A transposed convolution with `2 * stride` taps, as the plain one that it is.

    Each output takes two neighbouring inputs, by taps that depend on its place between them: a convolution of two taps
    gives all `stride` places at once, `[out * stride, in, 2]`. So it is summed in the same order at every length,
    which oneDNN's transposed convolutions are not.

    Args:
        channels, out_channels, stride: sizes.
        padding: of the transposed convolution, the outputs dropped at either end.
    """

    def __init__(self, channels: int, out_channels: int, stride: int, padding: int) -> None:
        super().__init__()
        plain = nn.Conv1d(channels, out_channels * stride, 2)
        self.weight = plain.weight
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.stride, self.padding = stride, padding

    @property
    def geometry(self) -> Conv:
        """As a transposed convolution."""
        return Conv(2 * self.stride, self.stride, 1, self.padding, transposed=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, T]` to `[B, out, (T + 1) * stride - 2 * padding]`."""
        B, _, T = x.shape
        places = F.conv1d(x, self.weight, self.bias.repeat_interleave(self.stride), padding=1)
        joined = places.view(B, -1, self.stride, T + 1).transpose(2, 3).reshape(B, -1, (T + 1) * self.stride)
        return joined[..., self.padding : joined.shape[-1] - self.padding]


class TwoTaps:
    """The layout of `Upsampling`; checkpoints hold a transposed convolution's `[in, out, 2 * stride]`."""

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def to_ours(self, tensor: Tensor) -> Tensor:
        """`[in, out, 2 * stride]` to `[out * stride, in, 2]`; the later input comes with the earlier taps."""
        channels, out, _ = tensor.shape
        taps = tensor.reshape(channels, out, 2, self.stride).flip(2)
        return taps.permute(1, 3, 0, 2).reshape(out * self.stride, channels, 2)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """The inverse of `to_ours`."""
        rows, channels, _ = tensor.shape
        taps = tensor.reshape(rows // self.stride, self.stride, channels, 2).permute(2, 0, 3, 1).flip(2)
        return taps.reshape(channels, rows // self.stride, 2 * self.stride)


def convolutions(module: nn.Module) -> tuple[Conv, ...]:
    """The convolutions of a stack in which each follows the one before it, in the order of registration.

    What goes around some of them (a residual) must lie within what they read.
    """
    return tuple(_geometry(layer) for layer in module.modules() if isinstance(layer, nn.Conv1d | Upsampling))


def _geometry(layer: nn.Conv1d | Upsampling) -> Conv:
    if isinstance(layer, Upsampling):
        return layer.geometry
    assert not isinstance(layer.padding, str)
    return Conv(layer.kernel_size[0], layer.stride[0], layer.dilation[0], layer.padding[0])
