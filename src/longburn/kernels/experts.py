"""A mixture of experts: each token's k chosen feed-forward blocks with a clamped SwiGLU, weighted and summed.

N tokens, M model size, I hidden size of an expert, E experts, k chosen for each token.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels.mxfp4 import Mxfp4, dequantize
from longburn.kernels.registry import Impl, Operation


class ExpertsCall(NamedTuple):
    """The arguments of `experts`."""

    x: Tensor
    chosen: Tensor
    weights: Tensor
    gate_up: Tensor | Mxfp4
    gate_up_bias: Tensor
    down: Tensor | Mxfp4
    down_bias: Tensor
    alpha: float
    limit: float


def _reference(call: ExpertsCall) -> Tensor:
    sums = torch.promote_types(call.x.dtype, torch.float32)
    y = torch.zeros(call.x.shape, dtype=sums, device=call.x.device)
    for expert, tokens, places in _by_expert(call.chosen, call.gate_up_bias.shape[0]):
        out = _one_expert(call, expert, call.x[tokens])
        y = y.index_add(0, tokens, out.to(sums) * call.weights[tokens, places, None].to(sums))
    return y.to(call.x.dtype)


def _by_expert(chosen: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each expert that any token chose: its number, those tokens, and which of their k choices it is."""
    if chosen.numel() and not 0 <= (low := int(chosen.min())) <= (high := int(chosen.max())) < experts:
        raise ValueError(f"experts: chosen holds {low} .. {high}, wanted 0 .. {experts - 1}")
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=experts).tolist()
    for expert, places in enumerate(torch.split(order, counts)):
        if len(places):
            yield expert, places // chosen.shape[1], places % chosen.shape[1]


def _one_expert(call: ExpertsCall, expert: int, x: Tensor) -> Tensor:
    """`[n, M]` to `[n, M]`. The weight of one expert is unpacked at a time, and gone before the next."""
    hidden = F.linear(x, _dense(call.gate_up, expert, x), call.gate_up_bias[expert].to(x.dtype))
    # In fp32 at least, and rounded once, as a fused kernel would.
    hidden = hidden.to(torch.promote_types(x.dtype, torch.float32))
    gate, up = hidden[:, 0::2].clamp(max=call.limit), hidden[:, 1::2].clamp(-call.limit, call.limit)
    gated = gate * torch.sigmoid(call.alpha * gate) * (up + 1)
    return F.linear(gated.to(x.dtype), _dense(call.down, expert, x), call.down_bias[expert].to(x.dtype))


def _dense(weight: Tensor | Mxfp4, expert: int, like: Tensor) -> Tensor:
    if isinstance(weight, Mxfp4):
        return dequantize(Mxfp4(weight.blocks[expert], weight.scales[expert]), like.dtype)
    return weight[expert].to(like.dtype)


OPERATION: Operation[ExpertsCall, Tensor] = Operation("experts", (Impl("reference", _reference, lambda call: None),))


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor | Mxfp4,
    gate_up_bias: Tensor,
    down: Tensor | Mxfp4,
    down_bias: Tensor,
    *,
    alpha: float,
    limit: float,
) -> Tensor:
    """`sum over the chosen e of w_e (down_e a + bias)`, `[N, M]`, where `a = g sigmoid(alpha g) (u + 1)`.

    g and u are the even and the odd rows of `gate_up_e x + bias`; g is clamped to at most `limit`, u to within
    `-limit .. limit`. Products are formed in the type of x with fp32 sums; the rest is fp32 (fp64 for fp64). Only
    weights of experts that were chosen are read, and at most one of them is unpacked at a time.

    Args:
        x: `[N, M]`.
        chosen: int64 `[N, k]`, the numbers of each token's experts.
        weights: `[N, k]`, how much each counts.
        gate_up: `[E, 2 I, M]`, dense or MXFP4.
        gate_up_bias: `[E, 2 I]`.
        down: `[E, M, I]`, dense or MXFP4.
        down_bias: `[E, M]`.

    Raises:
        ValueError: shapes that do not belong together, or an expert that does not exist.
    """
    call = ExpertsCall(x, chosen, weights, gate_up, gate_up_bias, down, down_bias, alpha, limit)
    _check(call)
    return OPERATION(call)


def _check(call: ExpertsCall) -> None:
    n, m = call.x.shape
    e, both = call.gate_up_bias.shape
    wanted = {
        "chosen": (n, call.chosen.shape[-1]),
        "weights": tuple(call.chosen.shape),
        "gate_up": (e, both, m),
        "down": (e, m, both // 2),
        "down_bias": (e, m),
    }
    for name, shape in wanted.items():
        tensor = getattr(call, name)
        found = tuple(tensor.logical_shape if isinstance(tensor, Mxfp4) else tensor.shape)
        if found != shape:
            raise ValueError(f"experts: {name} is {list(found)}, wanted {list(shape)} (x {n, m}, bias {e, both})")
