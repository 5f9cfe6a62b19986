"""What every rotary encoding shares: channel pairs, angles, checks. The rotation itself is `longburn.kernels.rotate`.

Shapes: B batch, H heads, T tokens, D channels per head, R <= D channels that rotate.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longburn.rope.scaling import is_number


class Angles(NamedTuple):
    """What a rotation needs: y = x * cos + partner(x) * sin, channel by channel.

    cos, sin: [B or 1, 1, T, R], an entry per channel rather than per pair. `partner(x)` is the other channel of each
    pair, and `sin` carries the rotation's sign: minus on a pair's first channel, plus on its second. The attention
    factor is multiplied into both. In this form a rotation takes three operations, where a small model's step on the
    CPU is paid by the operation.
    """

    cos: Tensor
    sin: Tensor


class DeviceConstant:
    """A tensor that never changes, copied once to every device it is asked for.

    A copy made while tracing is not kept, being a value of the trace. For compiled code or a CUDA graph to find the
    copy there as an input, ask for it once on that device before.
    """

    def __init__(self, value: Tensor) -> None:
        self._copies = {value.device: value}

    def on(self, device: torch.device) -> Tensor:
        if device in self._copies:
            return self._copies[device]
        copy = next(iter(self._copies.values())).to(device)
        if not torch.compiler.is_compiling():
            self._copies[device] = copy
        return copy


def signed_frequencies(inv_freq: Tensor, *, interleaved: bool) -> Tensor:
    """Spread frequencies [..., R / 2] over channels [..., R], negative on the first channel of each pair.

    Since cos is even and sin is odd, cos and sin of position * this are the `Angles`, signs included.
    """
    if interleaved:
        return torch.stack((-inv_freq, inv_freq), -1).flatten(-2)
    return torch.cat((-inv_freq, inv_freq), -1)


def check_geometry(owner: str, head_dim: int, rotary_dim: int, theta: float, interleaved: bool) -> None:
    """Raise ValueError unless the channels can be paired and the base gives falling frequencies."""
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise ValueError(
            f"{owner}: rotary_dim = {rotary_dim} with head_dim = {head_dim}; want an even number from 2 to head_dim"
        )
    if not (is_number(theta) and theta > 1):
        raise ValueError(f"{owner}: theta = {theta!r}; want a number above 1, such as 10000.0")
    if not isinstance(interleaved, bool):
        raise ValueError(f"{owner}: interleaved = {interleaved!r}; want True or False")


def check_positions(owner: str, positions: Tensor) -> None:
    """Raise ValueError unless positions are int64 [B, T]: floats would round beyond 2^24."""
    if positions.dtype != torch.int64 or positions.ndim != 2:
        raise ValueError(
            f"{owner}: positions are {positions.dtype} {list(positions.shape)}; want int64 [batch or 1, tokens]"
        )


def check_operands(owner: str, x: Tensor, angles: Angles, head_dim: int) -> None:
    """Raise ValueError unless x [B, H, T, head_dim] and the angles speak of the same rows and tokens."""
    batch, _, tokens, _ = angles.cos.shape
    if x.ndim != 4 or x.shape[-1] != head_dim or x.shape[-2] != tokens or batch not in (1, x.shape[0]):
        raise ValueError(
            f"{owner}: x is {list(x.shape)} and the angles are for batch {batch}, {tokens} tokens; "
            f"want x [batch, heads, {tokens}, {head_dim}]"
        )
