"""What experts share beside their products: the activation, and the weighted sum of what a token's choices gave."""

import triton
import triton.language as tl
from torch import Tensor

SUM = 1024  # columns of a program


@triton.jit
def swiglu(gate, up, alpha, limit):
    """The clamped SwiGLU, in fp32. Clamping leaves a NaN what it is."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return gate / (1 + tl.exp(-alpha * gate)) * (up + 1)


@triton.jit
def _combine(parts, back, chosen, bias, weights, residual, y, k, size, experts, BLOCK: tl.constexpr):
    """The weighted sum of what a token's choices gave, in their order, and the residual."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for choice in range(row * k, row * k + k):
        place = choice if back is None else tl.load(back + choice).to(tl.int64)
        part = tl.load(parts + place * size + column, mask=inside, other=0).to(tl.float32)
        if bias is not None:
            expert = tl.minimum(tl.maximum(tl.load(chosen + choice), 0), experts - 1)
            part += tl.load(bias + expert * size + column, mask=inside, other=0).to(tl.float32)
        acc += part * tl.load(weights + choice).to(tl.float32)
    if residual is not None:
        acc += tl.load(residual + row * size + column, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * size + column, acc.to(y.dtype.element_ty), mask=inside)


def combine(
    parts: Tensor,
    weights: Tensor,
    residual: Tensor | None,
    y: Tensor,
    back: Tensor | None = None,
    chosen: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """y `[N, M]`: what choices gave, parts `[N k, M]`, weighted, and the residual.

    Args:
        back: the row of parts of each choice; default the choice itself.
        chosen, bias: `[N, k]` and `[E, M]`; the bias of the chosen expert is added to each part.
    """
    (n, size), k = y.shape, weights.shape[1]
    experts = 0 if bias is None else len(bias)
    _combine[n, triton.cdiv(size, SUM)](
        parts, back, chosen, bias, weights, residual, y, k, size, experts, BLOCK=SUM, num_warps=4
    )
