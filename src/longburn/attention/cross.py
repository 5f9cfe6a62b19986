"""Attention to another sequence, whose keys and values are computed once."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longburn.attention.core import attend
from longburn.cache import AttnWindow
from longburn.kernels.attend import Known
from longburn.kernels.linear import linear
from longburn.kernels.norm import rms_norm


class CrossKeyValues(NamedTuple):
    """The context's keys and values `[B, K, S, D]` and its positions `[B|1, S]`, -1 where the context has no token.

    They depend on the context alone, so they are kept over all steps of a decoding or denoising loop. `full`: the host
    knows that the context has a token everywhere, which only ever saves work.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    full: bool = False


class CrossAttention(nn.Module):
    """Multi-head attention from x to a context: every query sees every token of the context.

    Args:
        dim: size M of x.
        heads, kv_heads, head_dim: H, K (default H) and D (default `dim // heads`).
        context_dim: size of the context; default `dim`.
        qk_norm: epsilon of an RMSNorm over D of every head's q and k; None for none.
        qkv_bias, out_bias: biases of the projections.
        scale: of the scores; default `1 / sqrt(D)`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        context_dim: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: float | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads or (head_dim is None and dim % heads):
            raise ValueError(
                f"CrossAttention: dim {dim}, heads {heads}, kv_heads {kv_heads}, head_dim {head_dim}: "
                "wanted heads a multiple of kv_heads, and dim a multiple of heads or a head_dim"
            )
        D = dim // heads if head_dim is None else head_dim
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, D
        self.scale = 1.0 / math.sqrt(D) if scale is None else scale
        self.q = nn.Linear(dim, heads * D, bias=qkv_bias, dtype=dtype, device=device)
        self.kv = nn.Linear(context_dim or dim, 2 * kv_heads * D, bias=qkv_bias, dtype=dtype, device=device)
        self.out = nn.Linear(heads * D, dim, bias=out_bias, dtype=dtype, device=device)
        self.q_norm = None if qk_norm is None else nn.RMSNorm(D, eps=qk_norm, dtype=dtype, device=device)
        self.k_norm = None if qk_norm is None else nn.RMSNorm(D, eps=qk_norm, dtype=dtype, device=device)

    def keys_values(self, context: Tensor, mask: Tensor | None = None) -> CrossKeyValues:
        """Compute the context's keys and values once.

        Args:
            context: `[B, S, context_dim]`.
            mask: bool `[B, S]`, True where the context has a token; None: everywhere. What is masked may be NaN.
        """
        B, S, _ = context.shape
        if mask is not None and (mask.shape != (B, S) or mask.dtype != torch.bool):
            raise ValueError(
                f"CrossAttention.keys_values: mask is {mask.dtype} {tuple(mask.shape)}, wanted bool ({B}, {S})"
            )
        k, v = linear(context, self.kv.weight, self.kv.bias).view(B, S, 2, self.kv_heads, self.head_dim).unbind(2)
        k, v = _normed(k, self.k_norm).transpose(1, 2), v.transpose(1, 2)
        pos = torch.arange(S, device=context.device)[None]
        return CrossKeyValues(k, v, pos if mask is None else torch.where(mask, pos, -1), mask is None)

    def forward(self, x: Tensor, context: Tensor | CrossKeyValues, *, bias: Tensor | None = None) -> Tensor:
        """`[B, T, M]` to `[B, T, M]`.

        Args:
            x: the queries' tokens.
            context: a tensor `[B, S, context_dim]`, or what `keys_values` made of it.
            bias: added to the scores, `[B|1, H|1, T, S]`.
        """
        B, T, _ = x.shape
        k, v, k_pos, full = context if isinstance(context, CrossKeyValues) else self.keys_values(context)
        q = linear(x, self.q.weight, self.q.bias).view(B, T, self.heads, self.head_dim)
        q = _normed(q, self.q_norm).transpose(1, 2)
        everything = AttnWindow(lookahead=None)
        q_pos = torch.arange(T, device=x.device)[None]  # where a query stands changes nothing: it sees everything
        known = (Known(0, T, k.shape[2], 0, 0, True),) if full else None
        out = attend(q, k, v, q_pos=q_pos, k_pos=k_pos, window=everything, bias=bias, scale=self.scale, known=known)
        return linear(out.transpose(1, 2).reshape(B, T, -1), self.out.weight, self.out.bias)


def _normed(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """`[..., D]`, before heads and tokens change places: rows then lie one after the other."""
    if norm is None:
        return x
    assert norm.eps is not None
    return rms_norm(x, norm.weight, norm.eps, round_last=True)
