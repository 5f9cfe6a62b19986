"""Normalisation that conditions shift and scale, after an update that they gate (adaLN: Peebles & Xie, 2212.09748)."""

from typing import NamedTuple

import torch
from torch import Tensor

from longburn.kernels import triton
from longburn.kernels.norm import LARGEST_ROW
from longburn.kernels.registry import Impl, Operation


class AdaptiveNormCall(NamedTuple):
    """x and update `[..., n]`; weight and bias `[n]`; shift, scale and gate `[G, n]`, each for an equal share of the
    rows of x, in order.
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
    n = call.x.shape[-1]

    def of_rows(part: Tensor) -> Tensor:
        return part.unsqueeze(1)

    x = call.x
    if call.update is not None and call.gate is not None:
        groups = call.gate.shape[0]
        update = call.update.reshape(groups, -1, n)
        x = torch.addcmul(x.reshape(groups, -1, n), update, of_rows(call.gate)).view(x.shape)
    elif call.update is not None:
        x = x + call.update
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if call.centered:
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + call.eps)
    if call.weight is not None:
        y = y * call.weight
    if call.bias is not None:
        y = y + call.bias
    if call.shift is not None and call.scale is not None:
        grouped_y = y.view(call.scale.shape[0], -1, n)
        y = torch.addcmul(of_rows(call.shift).to(y.dtype), grouped_y, of_rows(call.scale).to(y.dtype)).view(x.shape)
    return AdaptiveNormResult(y.to(x.dtype), x)


@triton.on_its_device
def _triton(call: AdaptiveNormCall) -> AdaptiveNormResult:
    from longburn.kernels.triton.adaptive_norm import adaptive_norm

    return AdaptiveNormResult(*adaptive_norm(call))


def _triton_why_not(call: AdaptiveNormCall) -> str | None:
    tensors = [t for t in call if isinstance(t, Tensor)]
    if reason := triton.why_not(*tensors):
        return reason
    if call.x.dtype not in triton.TYPES or any(t.dtype != call.x.dtype for t in tensors):
        return f"takes fp32, bf16 or fp16, one type for all, got {', '.join(sorted({str(t.dtype) for t in tensors}))}"
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
    """`norm(x') * scale + shift` with `x' = x + gate * update`, over the last dimension; and x'.

    Normalised in fp32 at least. The result is rounded once, and so is x', which is normalised as it is rounded.

    Args:
        x: `[..., n]`.
        eps: added to the mean square, or to the variance.
        centered: subtract the mean (LayerNorm); otherwise divide by the root mean square alone (RMSNorm).
        weight, bias: `[n]`, of the norm itself.
        shift, scale: `[G, n]`, both or none. Each of G is for an equal share of the rows, in order: G is 1, or the
            batch, or batch times frames. The scale is what one multiplies by: a model that learns it around 0 adds 1.
        update: added to x first, `[..., n]`.
        gate: `[G, n]`, times which it is added; None is 1.

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
    n = x.shape[-1]
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.shape != (n,):
            raise ValueError(f"adaptive_norm: {name} {tuple(given.shape)} beside x {tuple(x.shape)}, wanted ({n},)")
    for name, given in (("shift", shift), ("scale", scale), ("gate", gate)):
        if given is not None and (given.dim() != 2 or given.shape[1] != n or x[..., 0].numel() % given.shape[0]):
            raise ValueError(
                f"adaptive_norm: {name} {tuple(given.shape)} beside x {tuple(x.shape)}, wanted [G, {n}], "
                f"G a divisor of {x[..., 0].numel()} rows"
            )
    if (shift is None) != (scale is None) or (shift is not None and scale is not None and shift.shape != scale.shape):
        came = " and ".join("none" if t is None else str(tuple(t.shape)) for t in (shift, scale))
        raise ValueError(f"adaptive_norm: shift and scale are {came}, wanted both alike or none")
    if (update is None and gate is not None) or (update is not None and update.shape != x.shape):
        came = "none" if update is None else str(tuple(update.shape))
        raise ValueError(f"adaptive_norm: update is {came} beside x {tuple(x.shape)}, wanted x's shape")
