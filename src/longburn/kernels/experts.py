"""A mixture of experts: each token's k chosen feed-forward blocks with a clamped SwiGLU, weighted and summed.

N tokens, M model size, I hidden size of an expert, E experts, k chosen for each token.
"""

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels import experts_grouped as grouped
from longburn.kernels import native, triton
from longburn.kernels.feedforward import clamped_swiglu
from longburn.kernels.mxfp4 import Mxfp4, dequantize
from longburn.kernels.registry import Impl, Operation

FEW = 4  # choices for each expert there is, up to which weights are read packed; beyond, it pays to unpack them first
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MXFP4 = 2  # beside native.TYPES, for weights


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
    residual: Tensor | None = None


def _reference(call: ExpertsCall) -> Tensor:
    sums = torch.promote_types(call.x.dtype, torch.float32)
    y = torch.zeros(call.x.shape, dtype=sums, device=call.x.device)
    for expert, tokens, places in _by_expert(call.chosen, call.gate_up_bias.shape[0]):
        out = _one_expert(call, expert, call.x[tokens])
        y = y.index_add(0, tokens, out.to(sums) * call.weights[tokens, places, None].to(sums))
    return (y if call.residual is None else y + call.residual.to(sums)).to(call.x.dtype)


def _by_expert(chosen: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each expert that any token chose: its number, those tokens, and which of their k choices it is."""
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < experts:
        raise _no_such_expert(chosen, experts)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=experts).tolist()
    for expert, places in enumerate(torch.split(order, counts)):
        if len(places):
            yield expert, places // chosen.shape[1], places % chosen.shape[1]


def _one_expert(call: ExpertsCall, expert: int, x: Tensor) -> Tensor:
    """`[n, M]` to `[n, M]`. The weight of one expert is unpacked at a time, and gone before the next."""
    hidden = F.linear(x, _dense(call.gate_up, expert, x), call.gate_up_bias[expert].to(x.dtype))
    gated = clamped_swiglu(hidden, alpha=call.alpha, limit=call.limit)
    return F.linear(gated, _dense(call.down, expert, x), call.down_bias[expert].to(x.dtype))


def _dense(weight: Tensor | Mxfp4, expert: int, like: Tensor) -> Tensor:
    if isinstance(weight, Mxfp4):
        return dequantize(Mxfp4(weight.blocks[expert], weight.scales[expert]), like.dtype)
    return weight[expert].to(like.dtype)


def _native(call: ExpertsCall) -> Tensor:
    x, chosen, weights = call.x.contiguous(), call.chosen.contiguous(), call.weights.contiguous()
    y, failed = torch.empty_like(x), torch.empty(1, dtype=torch.int64)
    (n, m), (count, both) = x.shape, call.gate_up_bias.shape
    native.launch(
        "experts",
        *map(native.address, (x, chosen, weights, y, failed)),
        *_matrix(call.gate_up, call.gate_up_bias, both, m),
        *_matrix(call.down, call.down_bias, m, both // 2),
        *(n, chosen.shape[1], count, native.TYPES[x.dtype], native.TYPES[weights.dtype]),
        *(float(call.alpha), float(call.limit)),
    )
    if ctypes.c_int64.from_address(failed.data_ptr()).value:  # a read that costs no operator
        raise _no_such_expert(chosen, count)
    return y if call.residual is None else (y + call.residual).to(y.dtype)


def _matrix(weight: Tensor | Mxfp4, bias: Tensor, out: int, size: int) -> tuple[int, ...]:
    """`matrix` of experts.c."""
    blocks, scales = weight if isinstance(weight, Mxfp4) else (weight, None)
    kind = native.TYPES[blocks.dtype] if scales is None else MXFP4
    return *map(native.address, (blocks, scales, bias)), out, size, kind, native.TYPES[bias.dtype]


def _native_why_not(call: ExpertsCall) -> str | None:
    most = FEW * call.gate_up_bias.shape[0]
    if call.chosen.numel() > most:
        return f"computes up to {most} choices of an expert, got {call.chosen.numel()}"
    weights = (call.gate_up, call.down)
    dense = [call.gate_up_bias, call.down_bias, *(w for w in weights if not isinstance(w, Mxfp4))]
    read = [*dense, *(part for w in weights if isinstance(w, Mxfp4) for part in w)]
    for tensor in (call.x, call.chosen, call.weights, *read):
        if tensor.device.type != "cpu":
            return f"runs on the CPU, got {tensor.device.type}"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "has no gradients"
    if not all(tensor.is_contiguous() for tensor in read):
        return "a weight has gaps"
    for tensor in (call.x, call.weights, *dense):
        if tensor.dtype not in native.TYPES:
            return f"takes fp32 or bf16, got {tensor.dtype}"
    return native.unavailable()


def _tensors(weight: Tensor | Mxfp4) -> tuple[Tensor, ...]:
    return tuple(weight) if isinstance(weight, Mxfp4) else (weight,)


@triton.on_its_device
def _triton(call: ExpertsCall) -> Tensor:
    from longburn.kernels.triton.experts import experts

    return experts(call)


def _triton_why_not(call: ExpertsCall) -> str | None:
    read = (*_tensors(call.gate_up), call.gate_up_bias, *_tensors(call.down), call.down_bias)
    floating = [t for t in (call.x, call.weights, call.residual, *read) if t is not None and t.dtype != torch.uint8]
    if reason := triton.unavailable(call.x, call.chosen, call.weights, call.residual, *read):
        return reason
    if triton.has_gradients(*floating):
        return "has no gradients"
    if not all(tensor.is_contiguous() for tensor in read):
        return "a weight has gaps"
    for tensor in floating:
        if tensor.dtype not in TRITON_TYPES:
            return f"takes fp32, bf16 or fp16, got {tensor.dtype}"
    return None


OPERATION: Operation[ExpertsCall, Tensor] = Operation(
    "experts",
    (
        Impl("native", _native, _native_why_not),
        Impl("triton", _triton, _triton_why_not),
        Impl("grouped", grouped.experts_grouped, grouped.why_not),
        Impl("reference", _reference, lambda call: None),
    ),
)


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
    residual: Tensor | None = None,
) -> Tensor:
    """`sum over the chosen e of w_e (down_e a + bias) + residual`, `[N, M]`, where `a = g sigmoid(alpha g) (u + 1)`.

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
        residual: `[N, M]`, added to the sum before it is rounded to the type of x (on the CPU, after); default none.

    Raises:
        ValueError: shapes that do not belong together, or an expert that does not exist. On CUDA, where the host does
            not read `chosen`, a number beyond the experts there are counts as the nearest one.
    """
    call = ExpertsCall(x, chosen, weights, gate_up, gate_up_bias, down, down_bias, alpha, limit, residual)
    _check(call)
    return OPERATION(call)


def _no_such_expert(chosen: Tensor, experts: int) -> ValueError:
    return ValueError(f"experts: chosen holds {chosen.min()} .. {chosen.max()}, wanted 0 .. {experts - 1}")


def _check(call: ExpertsCall) -> None:
    if call.chosen.dtype != torch.int64:
        raise ValueError(f"experts: chosen is {call.chosen.dtype}, wanted torch.int64")
    n, m = call.x.shape
    e, both = call.gate_up_bias.shape
    wanted = {
        "chosen": (n, call.chosen.shape[-1]),
        "weights": tuple(call.chosen.shape),
        "gate_up": (e, both, m),
        "down": (e, m, both // 2),
        "down_bias": (e, m),
    }
    if call.residual is not None:
        wanted["residual"] = (n, m)
    for name, shape in wanted.items():
        tensor = getattr(call, name)
        found = tuple(tensor.logical_shape if isinstance(tensor, Mxfp4) else tensor.shape)
        if found != shape:
            raise ValueError(f"experts: {name} is {list(found)}, wanted {list(shape)} (x {n, m}, bias {e, both})")
