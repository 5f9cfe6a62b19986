"""Linear attention (Katharopoulos et al., arXiv 2006.16236): a kernel feature map instead of the softmax.

`o_i = phi(q_i) M / (phi(q_i) z + eps)` with `M = sum_j phi(k_j) v_j^T` and `z = sum_j phi(k_j)`, over all tokens or,
when causal, over those up to i. M and z are all that a stream has to remember.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.cache import Step
from longburn.kernels.linear import linear
from longburn.rope import MismatchedRotaryEncoding, RotaryEncoding

CHUNK = 64  # queries that see each other directly; everything before them is in the state


class LinearState:
    """The state of a causal stream: `[B, H, D, D + 1]`, M and z side by side, in fp32 (or fp64 beside fp64 tokens)."""

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sum = torch.zeros(batch, heads, head_dim, head_dim + 1, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.sum.nbytes

    def reset(self, rows: list[int] | None = None) -> None:
        """Clear some rows (None: all)."""
        self.sum[slice(None) if rows is None else rows] = 0


class LinearAttention(nn.Module):
    """Multi-head linear attention with ReLU features, bidirectional or causal.

    Args:
        dim, heads, head_dim: M, H and D (default `dim // heads`).
        causal: whether a token sees later ones; only a causal layer streams.
        rope: rotation of q and k, before the feature map; None for none.
        qkv_bias, out_bias: biases of the projections.
        eps: added to the denominator.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        causal: bool = False,
        rope: RotaryEncoding | MismatchedRotaryEncoding | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        eps: float = 1e-15,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or (head_dim is None and dim % heads):
            raise ValueError(f"LinearAttention: dim {dim} is not a multiple of heads {heads}; give a head_dim")
        self.heads = heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.causal, self.rope, self.eps = causal, rope, eps
        self.qkv = nn.Linear(dim, 3 * heads * self.head_dim, bias=qkv_bias, dtype=dtype, device=device)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=out_bias, dtype=dtype, device=device)

    def forward(
        self,
        x: Tensor,
        positions: Step | Tensor | None = None,
        *,
        mask: Tensor | None = None,
        state: LinearState | None = None,
    ) -> Tensor:
        """`[B, T, M]` to `[B, T, M]`.

        Args:
            x: the tokens.
            positions: for rope, `[B|1, T]`, default `0 .. T - 1`; -1 is no token.
            mask: bool `[B, T]`, True where there is a token (default: where positions are not -1). What is masked may
            be NaN.
            state: of a causal stream; x is added to it. None: x is all there is.

        Raises:
            ValueError: a state for a bidirectional layer, or a state without positions when there is a rope.
        """
        B, T, _ = x.shape
        if state is not None and not self.causal:
            raise ValueError(
                "LinearAttention: a bidirectional layer sees later tokens and cannot stream; state wants causal"
            )
        if state is not None and positions is None and self.rope is not None:
            raise ValueError(
                "LinearAttention: rope over a stream needs positions; take them from CacheManager.positions"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        step = Step.of(torch.arange(T, device=x.device)[None] if positions is None else positions, read=False)
        held = step.positions >= 0 if mask is None else mask & (step.positions >= 0)
        qkv = linear(x, self.qkv.weight, self.qkv.bias).view(B, T, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        rope = self.rope
        if rope is not None:
            angles = step.share(("angles", id(rope), wide), lambda: rope.angles(step.positions, wide))
            q, k = rope.rotate(q, angles), rope.rotate(k, angles)
        token = held[:, None, :, None]
        q, k = F.relu(q.to(wide)), torch.where(token, F.relu(k.to(wide)), 0)
        v = F.pad(torch.where(token, v.to(wide), 0), (0, 1), value=1.0)  # the column of ones sums the denominator
        total = _causal(q, k, v, state) if self.causal else q @ (k.transpose(-1, -2) @ v)
        out = total[..., :-1] / (total[..., -1:] + self.eps)
        out = torch.where(token, out, 0).to(x.dtype)
        return linear(out.transpose(1, 2).reshape(B, T, -1), self.out.weight, self.out.bias)


def _causal(q: Tensor, k: Tensor, v: Tensor, state: LinearState | None) -> Tensor:
    """Numerator and denominator of every token over those up to it, in chunks; the state takes in all of them."""
    T = q.shape[2]
    before = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state.sum.to(q.dtype)
    parts = []
    for a in range(0, T, CHUNK):
        qc, kc, vc = (x[:, :, a : a + CHUNK] for x in (q, k, v))
        parts.append(qc @ before + (qc @ kc.transpose(-1, -2)).tril() @ vc)
        before = before + kc.transpose(-1, -2) @ vc
    if state is not None:
        state.sum = before.to(state.sum.dtype)
    return torch.cat(parts, 2)
