"""RoPE over three axes, for tokens of a video: time, height, width (Wan 2.1, Matrix-Game 2)."""

from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from longburn.kernels.rotate import rotate
from longburn.rope.pairs import (
    Angles,
    DeviceConstant,
    check_geometry,
    check_operands,
    check_positions,
    signed_frequencies,
)
from longburn.rope.scaling import unscaled


class Coordinates(NamedTuple):
    """Where tokens lie: frame number, row and column, each int64 [B or 1, T]."""

    time: Tensor
    row: Tensor
    column: Tensor


@dataclass(frozen=True)
class Rope3dEncoding:
    """Axial RoPE: each axis rotates its own share of a head's pairs by its own coordinate.

    Tokens are numbered through the whole video, frame after frame, row by row: with a grid of (height, width) tokens
    per frame, position p lies in frame p // (height * width). Positions are unbounded: there is no table to run out of.

    head_dim: channels per head, D.
    grid: (height, width) of one frame, in tokens; Matrix-Game 2 has (22, 40).
    theta: base of the frequencies. Axis a with D_a channels uses theta^(-2j/D_a), j from 0: each starts at 1 again.
    split: channels (D_t, D_h, D_w) of time, height and width, in this order, all even, together D. None is Wan's:
        D // 6 pairs for height and for width, all others for time; (44, 42, 42) for D = 128.
    interleaved: pair channels (2j, 2j + 1), as Wan does; otherwise (j, j + D/2), pairs still counted time first.

    Raises ValueError for a grid, base or split out of range.
    """

    head_dim: int
    grid: tuple[int, int]
    _: KW_ONLY
    theta: float = 10000.0
    split: tuple[int, int, int] | None = None
    interleaved: bool = True
    _signed: DeviceConstant = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_geometry("Rope3dEncoding", self.head_dim, self.head_dim, self.theta, self.interleaved)
        if min(self.grid) < 1:
            raise ValueError(f"Rope3dEncoding: grid = {self.grid}; want (height, width) of a frame, in tokens")
        spatial = 2 * (self.head_dim // 6)
        split = (self.head_dim - 2 * spatial, spatial, spatial) if self.split is None else self.split
        if len(split) != 3 or sum(split) != self.head_dim or any(size < 0 or size % 2 for size in split):
            raise ValueError(
                f"Rope3dEncoding: split = {split}; want even channel counts of time, height and width that add up to "
                f"head_dim = {self.head_dim}"
            )
        # One row per axis, zero outside its own pairs: a matrix product with (t, y, x) then gives every pair its angle.
        per_axis = [unscaled(self.theta, size)[None] for size in split]
        frequencies = torch.block_diag(*per_axis)  # type: ignore[no-untyped-call]
        object.__setattr__(self, "split", split)
        object.__setattr__(
            self, "_signed", DeviceConstant(signed_frequencies(frequencies, interleaved=self.interleaved))
        )

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame: height * width."""
        return self.grid[0] * self.grid[1]

    def coordinates(self, positions: Tensor) -> Coordinates:
        """Return frame, row and column of absolute token positions, int64 [B or 1, T]."""
        within = positions % self.frame_tokens
        return Coordinates(positions // self.frame_tokens, within // self.grid[1], within % self.grid[1])

    def angles(self, positions: Tensor, dtype: torch.dtype = torch.float32, *, time: Tensor | None = None) -> Angles:
        """Return the rotation of every token, for `rotate`; computed in float64, rounded once, to `dtype`.

        positions: int64 [B or 1, T], absolute token positions; -1 (no token) gives finite values.
        time: int64 [B or 1, T], used in place of the frame number, for instance counted from a window's first frame.
            Attention sees time differences only, so a shift common to queries and keys changes nothing.
        """
        check_positions("Rope3dEncoding.angles", positions)
        place = self.coordinates(positions)
        if time is not None:
            check_positions("Rope3dEncoding.angles (time)", time)
            place = place._replace(time=time.expand_as(positions))
        phase = torch.stack(place, -1).double() @ self._signed.on(positions.device)
        phase = phase[:, None]
        return Angles(phase.cos().to(dtype), phase.sin().to(dtype))

    def rotate(self, x: Tensor, angles: Angles) -> Tensor:
        """Rotate x [B, H, T, D] by `angles` of its T tokens; float32 at least inside, x's dtype outside."""
        check_operands("Rope3dEncoding.rotate", x, angles, self.head_dim)
        return rotate(x, angles.cos, angles.sin, interleaved=self.interleaved)
