"""Learned sink logits: one a query head, in the softmax's denominator (GPT-OSS)."""

from torch import Tensor


def sinks_from_per_head(sinks: Tensor, kv_heads: int) -> Tensor:
    """Per-head sinks `[H]` by kv head and group, `[kv_heads, H // kv_heads]`: head h is group `h % G` of kv head `h //
    G`.

    Raises:
        ValueError: not one-dimensional, or H is not a multiple of kv_heads.
    """
    if sinks.dim() != 1 or kv_heads < 1 or sinks.shape[0] % kv_heads:
        raise ValueError(
            f"sinks_from_per_head: sinks are {tuple(sinks.shape)} for {kv_heads} kv heads; "
            "wanted [H], H a multiple of them"
        )
    return sinks.reshape(kv_heads, -1)
