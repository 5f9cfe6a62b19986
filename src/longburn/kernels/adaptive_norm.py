"""Normalisation that conditions shift and scale, after an update that they gate (adaLN, arXiv 2212.09748)."""

from typing import NamedTuple

import torch
from torch import Tensor

from longburn.kernels import triton
from longburn.kernels.norm import LARGEST_ROW
from longburn.kernels.registry import Impl, Operation


class AdaptiveNormCall(NamedTuple):
    """x and update `[B, T, M]`; weight and bias `[M]`; shift, scale and gate `[B|1, G, M]`, a row for each of G
    stretches of T / G tokens.
    """

    x: Tensor
    eps: float
    centered: bool
    weight: Tensor | None = None
    bias: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    update: Tensor | None = None
    gate: Tensor | None = None


class AdaptiveNormResult(NamedTuple):
    """What is normalised, and x after its update (x itself where there is none)."""

    normed: Tensor
    x: Tensor


def _reference(call: AdaptiveNormCall) -> AdaptiveNormResult:
    x, (B, _, M) = call.x, call.x.shape
    wide = torch.promote_types(x.dtype, torch.float32)

    def stretches(y: Tensor, rows: Tensor) -> Tensor:
        return y.to(wide).reshape(B, rows.shape[1], -1, M)

    def spread(rows: Tensor) -> Tensor:
        return rows.to(wide)[:, :, None]

    if call.update is not None and call.gate is not None:
        gate = call.gate
        x = torch.addcmul(stretches(x, gate), stretches(call.update, gate), spread(gate)).view(x.shape).to(x.dtype)
    elif call.update is not None:
        x = (x.to(wide) + call.update.to(wide)).to(x.dtype)
    y = x.to(wide)
    if call.centered:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + call.eps)
    if call.weight is not None:
        y = y * call.weight.to(wide)
    if call.bias is not None:
        y = y + call.bias.to(wide)
    if call.shift is not None and call.scale is not None:
        scaled = (stretches(y, call.scale) * spread(call.scale)).view(x.shape)
        y = (stretches(scaled, call.shift) + spread(call.shift)).view(x.shape)
    return AdaptiveNormResult(y.to(x.dtype), x)


@triton.on_its_device
def _triton(call: AdaptiveNormCall) -> AdaptiveNormResult:
    from longburn.kernels.triton.adaptive_norm import adaptive_norm

    return AdaptiveNormResult(*adaptive_norm(call))


def _triton_why_not(call: AdaptiveNormCall) -> str | None:
    tensors = [t for t in call if isinstance(t, Tensor)]
    if reason := triton.why_not(*tensors):
        return reason
    if call.x.dtype not in triton.TYPES or (call.update is not None and call.update.dtype != call.x.dtype):
        return f"takes fp32, bf16 or fp16, one type for x and update, got {call.x.dtype}"
    if any(t.stride(-1) != 1 for t in tensors):
        return "channels have gaps"
    return None if call.x.shape[-1] <= LARGEST_ROW else f"takes {LARGEST_ROW} channels at most, got {call.x.shape[-1]}"


OPERATION: Operation[AdaptiveNormCall, AdaptiveNormResult] = Operation(
    "adaptive_norm", (Impl("triton", _triton, _triton_why_not), Impl("reference", _reference, lambda call: None))
)


def adaptive_norm(
    x: Tensor,
    *,
    eps: float,
    centered: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    update: Tensor | None = None,
    gate: Tensor | None = None,
) -> AdaptiveNormResult:
    """`norm(x') * scale + shift` with `x' = x + gate * update`, over the channels; and x'.

    Computed in fp32 at least. The result is rounded once, and so is x', which is normalised as it is rounded.

    Args:
        x: `[B, T, M]`.
        eps: added to the mean square, or to the variance.
        centered: subtract the mean (LayerNorm); otherwise divide by the root mean square alone (RMSNorm).
        weight, bias: `[M]`, of the norm itself.
        shift, scale: `[B|1, G, M]`, both or none: a row for each of G stretches of T / G tokens (frames, say). The
            scale is what one multiplies by: a model that learns it around 0 adds 1.
        update: added to x first, `[B, T, M]`.
        gate: `[B|1, G, M]`, times which it is added; None is 1.

    Raises:
        ValueError: shapes that disagree.
    """
    _check(x, weight, bias, shift, scale, update, gate)
    return OPERATION(AdaptiveNormCall(x, eps, centered, weight, bias, shift, scale, update, gate))


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    update: Tensor | None,
    gate: Tensor | None,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"adaptive_norm: x is {tuple(x.shape)}, wanted [B, T, M]")
    B, T, M = x.shape
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.shape != (M,):
            raise ValueError(f"adaptive_norm: {name} {tuple(given.shape)} beside x {tuple(x.shape)}, wanted ({M},)")
    for name, given in (("shift", shift), ("scale", scale), ("gate", gate)):
        if given is None:
            continue
        fits = given.dim() == 3 and given.shape[0] in (1, B) and given.shape[2] == M and given.shape[1] > 0
        if not fits or T % given.shape[1]:
            raise ValueError(
                f"adaptive_norm: {name} {tuple(given.shape)} beside x {tuple(x.shape)}, wanted [{B} or 1, G, {M}], "
                f"G a divisor of {T}"
            )
    if (shift is None) != (scale is None):
        raise ValueError(f"adaptive_norm: {'shift' if scale is None else 'scale'} alone, wanted both or none")
    if (update is None and gate is not None) or (update is not None and update.shape != x.shape):
        came = "none" if update is None else str(tuple(update.shape))
        raise ValueError(f"adaptive_norm: update is {came} beside x {tuple(x.shape)}, wanted x's shape")
