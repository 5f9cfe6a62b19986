"""Layer normalisation with a scale and shift from outside, and the gated sum before it (adaLN, arXiv 2212.09748)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels import triton
from longburn.kernels.registry import Impl, Operation

LARGEST_ROW = 16384  # channels that one program of the Triton kernel holds


class AdaptiveNormCall(NamedTuple):
    """x and branch `[B, T, M]`; scale, shift and gate `[B|1, G, M]`, a row for each of G stretches of tokens."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    eps: float
    branch: Tensor | None = None
    gate: Tensor | None = None


Sum = tuple[Tensor, Tensor]  # x + gate * branch, and its norm


def _reference(call: AdaptiveNormCall) -> Sum:
    x, (B, T, M) = call.x, call.x.shape
    wide = torch.promote_types(x.dtype, torch.float32)

    def spread(row: Tensor) -> Tensor:
        return row.to(wide)[:, :, None]

    def stretched(y: Tensor, rows: Tensor) -> Tensor:
        return y.to(wide).view(B, rows.shape[1], -1, M)

    if call.branch is not None:
        branch = call.branch.to(wide)
        if call.gate is not None:
            branch = (stretched(branch, call.gate) * spread(call.gate)).view(B, T, M)
        x = (x.to(wide) + branch).to(x.dtype)
    normed = F.layer_norm(x.to(wide), (M,), eps=call.eps)
    normed = (stretched(normed, call.scale) * spread(call.scale)).view(B, T, M)
    return x, (stretched(normed, call.shift) + spread(call.shift)).view(B, T, M).to(x.dtype)


@triton.on_its_device
def _triton(call: AdaptiveNormCall) -> Sum:
    from longburn.kernels.triton.adaptive import adaptive_norm

    return adaptive_norm(call)


def _triton_why_not(call: AdaptiveNormCall) -> str | None:
    x, rows = call.x, (call.scale, call.shift, call.gate)
    if reason := triton.why_not(x, call.branch, *rows):
        return reason
    if x.dtype not in triton.TYPES or (call.branch is not None and call.branch.dtype != x.dtype):
        return f"takes fp32, bf16 or fp16, one type for x and branch, got {x.dtype}"
    if not x.is_contiguous() or (call.branch is not None and not call.branch.is_contiguous()):
        return "x or branch has gaps"
    if any(row is not None and row.stride(-1) != 1 for row in rows):
        return "scale, shift or gate has gaps between channels"
    return None if x.shape[-1] <= LARGEST_ROW else f"takes {LARGEST_ROW} channels at most, got {x.shape[-1]}"


OPERATION: Operation[AdaptiveNormCall, Sum] = Operation(
    "adaptive_norm", (Impl("triton", _triton, _triton_why_not), Impl("reference", _reference, lambda call: None))
)


def adaptive_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    *,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
) -> Sum:
    """`s = x + gate * branch`, and `(s - mean) / sqrt(variance + eps) * scale + shift` over its channels.

    Each is computed in fp32 at least and rounded once. What is normalised is the rounded sum.

    Args:
        x: `[B, T, M]`.
        scale, shift: `[B|1, G, M]`, G a divisor of T: a row for each of G stretches of T / G tokens. What multiplies:
            a learned offset from 1 has to be added to it before.
        branch: `[B, T, M]`; None adds nothing.
        gate: like scale; None is 1.

    Raises:
        ValueError: shapes that disagree, or a gate without a branch.
    """
    for name, row in (("scale", scale), ("shift", shift), ("gate", gate)):
        if row is None:
            continue
        fits = row.dim() == 3 and row.shape[0] in (1, x.shape[0]) and row.shape[2] == x.shape[2]
        if not fits or not row.shape[1] or x.shape[1] % row.shape[1]:
            raise ValueError(
                f"adaptive_norm: {name} is {tuple(row.shape)} for x {tuple(x.shape)}; wanted [B|1, G, M], G a divisor "
                "of the tokens"
            )
    if (branch is None and gate is not None) or (branch is not None and branch.shape != x.shape):
        came = None if branch is None else tuple(branch.shape)
        raise ValueError(f"adaptive_norm: branch is {came} for x {tuple(x.shape)}; wanted the same shape")
    return OPERATION(AdaptiveNormCall(x, scale, shift, eps, branch, gate))
