"""Rotary position encoding (RoPE): angles from absolute positions, and the rotation of queries and keys.

Shapes: B batch, H heads, T tokens, D = head_dim, R = rotary_dim <= D channels that rotate.

    rope = RotaryEncoding(64, theta=150_000.0)
    angles = rope.angles(positions)      # once per step, shared by all layers
    q, k = rope.rotate(q, angles), rope.rotate(k, angles)

Angles are computed in float64 from int64 positions. In float32 (theta 10,000, 32 pairs) they are off by up to 3e-4
radians at position 10,000 and by 0.25 at 10 million, and beyond 2^24 not even the position is exact.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from longburn.kernels.rotate import angles, rotate
from longburn.rope.config import read_config
from longburn.rope.pairs import (
    Angles,
    DeviceConstant,
    check_geometry,
    check_operands,
    check_positions,
    signed_frequencies,
)
from longburn.rope.scaling import Frequencies, RopeScaling, YarnScaling, unscaled


@dataclass(frozen=True)
class RotaryEncoding:
    """RoPE over one axis of positions, with any frequency scaling; holds no parameters and no state.

    head_dim: channels per head, D.
    theta: base of the frequencies theta^(-2j/R).
    rotary_dim: channels that rotate, R, the first ones of each head; even; None for all of them.
    interleaved: pair channels (2j, 2j + 1), as in RoFormer, GPT-J and Wan; otherwise (j, j + R/2), as in GPT-NeoX,
        GPT-OSS and transformers' Llama. A checkpoint is trained for one of the two.
    scaling: how to go beyond the trained context, see `longburn.rope.scaling`; None for plain RoPE.
    length: declared total length of the stream in tokens, for the scalings that depend on it (dynamic NTK, LongRoPE);
        None for the trained context.

    Derived: `inv_freq`, radians per token of each pair after scaling, float64 [R / 2] on the CPU; `attention_factor`,
    multiplied into cos and sin. Raises ValueError for sizes or a base out of range.
    """

    head_dim: int
    _: KW_ONLY
    theta: float = 10000.0
    rotary_dim: int | None = None
    interleaved: bool = False
    scaling: RopeScaling | None = None
    length: int | None = None
    inv_freq: Tensor = field(init=False, compare=False, repr=False)
    attention_factor: float = field(init=False, compare=False, repr=False)
    _signed: DeviceConstant = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        rotary_dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        check_geometry("RotaryEncoding", self.head_dim, rotary_dim, self.theta, self.interleaved)
        if self.length is not None and self.length < 1:
            raise ValueError(f"RotaryEncoding: length = {self.length}; want the stream's total tokens, at least 1")
        if self.scaling is None:
            inv_freq, attention_factor = Frequencies(unscaled(self.theta, rotary_dim), 1.0)
        else:
            inv_freq, attention_factor = self.scaling.frequencies(self.theta, rotary_dim, self.length)
        signed = DeviceConstant(signed_frequencies(inv_freq, interleaved=self.interleaved))
        object.__setattr__(self, "rotary_dim", rotary_dim)
        object.__setattr__(self, "inv_freq", inv_freq)
        object.__setattr__(self, "attention_factor", attention_factor)
        object.__setattr__(self, "_signed", signed)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        layer_type: str | None = None,
        interleaved: bool | None = None,
        length: int | None = None,
    ) -> "RotaryEncoding":
        """Build from a Hugging Face `config.json`.

        Reads `head_dim` (or `hidden_size` and `num_attention_heads`), `rope_theta`, `partial_rotary_factor`,
        `max_position_embeddings`, and `rope_scaling` or `rope_parameters`.

        layer_type: which entry to take where `rope_parameters` has one per layer type ("full_attention", ...).
        interleaved: the pairing where it is fixed by the model's code; None takes `rope_interleaved`, else half-split.
        length: see the class.

        Raises ValueError that names the key: unknown (in the RoPE dicts, or "rope"/"rotary" keys of the top level),
        missing, out of range, or given twice with different values.
        """
        settings = read_config(config, layer_type)
        return cls(
            settings.head_dim,
            theta=settings.theta,
            rotary_dim=settings.rotary_dim,
            interleaved=settings.interleaved if interleaved is None else interleaved,
            scaling=settings.scaling,
            length=length,
        )

    def for_length(self, length: int) -> "RotaryEncoding":
        """The same encoding for streams of `length` tokens in total. Keys cached under another length do not fit it."""
        return replace(self, length=length)

    def angles(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Angles:
        """Return the rotation of every position.

        positions: int64 [B or 1, T], absolute; -1 (no token) gives finite values like any other number.
        dtype: of the result; the computation is float64 whatever it says.

        Any positions will do: to clamp a query's distance to some keys, ask for the angles of its clamped position.
        The first eager call on a device leaves the frequencies there; call once before capturing a CUDA graph.
        """
        check_positions("RotaryEncoding.angles", positions)
        return Angles(*angles(positions, self._signed.on(positions.device), self.attention_factor, dtype))

    def rotate(self, x: Tensor, angles: Angles) -> Tensor:
        """Rotate x [B, H, T, D] by `angles` of its T positions; channels beyond R pass through unchanged.

        Computed in float32 at least and returned in x's dtype. Queries and keys of one projection can be rotated in one
        call, as heads of one tensor. Raises ValueError when D or T do not fit.
        """
        check_operands("RotaryEncoding.rotate", x, angles, self.head_dim)
        return rotate(x, angles.cos, angles.sin, interleaved=self.interleaved)


def ntk_yarn(
    head_dim: int,
    *,
    theta: float,
    factor: float,
    original_context: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    attention_factor: float | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> RotaryEncoding:
    """RoPE with YaRN ("NTK by parts"), stretched from `original_context` to `factor * original_context` tokens.

    See `YarnScaling` for the settings. GPT-OSS is
    `ntk_yarn(64, theta=150_000, factor=32, original_context=4096, truncate=False)`; its config calls the settings
    `rope_scaling_factor`, `rope_ntk_beta` (beta_fast), `rope_ntk_alpha` (beta_slow) and `initial_context_length`.
    """
    scaling = YarnScaling(
        factor,
        original_context,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=truncate,
        attention_factor=attention_factor,
    )
    return RotaryEncoding(head_dim, theta=theta, rotary_dim=rotary_dim, interleaved=interleaved, scaling=scaling)
