"""The position encoding of ACE-Step v1: written as RoPE, but neither a rotation nor relative.

Shapes: B batch, H heads, T tokens, D channels per head.
"""

from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from longburn.kernels.rotate import angles, rotate
from longburn.rope.pairs import Angles, DeviceConstant, check_geometry, check_operands, check_positions
from longburn.rope.scaling import unscaled


@dataclass(frozen=True)
class MismatchedRotaryEncoding:
    """RoPE whose frequencies lie in half-split order while its pairs are adjacent channels.

    Channel n has the phase `a_n = position * theta^(-2 (n mod D/2) / D)`, the order of half-split pairs (n, n + D/2),
    but the pairs are (2m, 2m + 1):

        y[2m]     = x[2m]     * cos(a_2m)     - x[2m + 1] * sin(a_2m)
        y[2m + 1] = x[2m + 1] * cos(a_{2m+1}) + x[2m]     * sin(a_{2m+1})

    The two members of a pair turn at different speeds. So this is not a rotation: the norm of x changes. And it is not
    relative: q.k depends on both positions, not on their difference alone. What rests on that difference does not hold
    here: positions cannot be shifted, re-indexed or clamped, and keys cannot be turned on to another position. The
    weights were trained with it, so it is reproduced as it is. Only D = 2 is a rotation.

    It takes the place of a `RotaryEncoding` where all that is asked is `angles(positions)` and `rotate(x, angles)`.

    head_dim: channels per head, D, even; all of them take part.
    theta: base of the frequencies.

    Raises ValueError for an odd head size or a base out of range.
    """

    interleaved: ClassVar[bool] = True  # how the channels are paired; the frequencies follow the other order

    head_dim: int
    _: KW_ONLY
    theta: float = 10000.0
    _signed: DeviceConstant = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_geometry("MismatchedRotaryEncoding", self.head_dim, self.head_dim, self.theta, self.interleaved)
        frequencies = unscaled(self.theta, self.head_dim).repeat(2)
        frequencies[0::2] *= -1  # the sign that `Angles` wants on a pair's first channel
        object.__setattr__(self, "_signed", DeviceConstant(frequencies))

    def angles(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Angles:
        """cos and sin of every position's phases, computed in float64 and rounded once, to `dtype`.

        positions: int64 [B or 1, T], absolute; -1 (no token) gives finite values.
        """
        check_positions("MismatchedRotaryEncoding.angles", positions)
        return Angles(*angles(positions, self._signed.on(positions.device), 1.0, dtype))

    def rotate(self, x: Tensor, angles: Angles) -> Tensor:
        """Apply the formula to x [B, H, T, D] at its T positions; float32 at least inside, x's dtype outside."""
        check_operands("MismatchedRotaryEncoding.rotate", x, angles, self.head_dim)
        return rotate(x, angles.cos, angles.sin, interleaved=self.interleaved)
