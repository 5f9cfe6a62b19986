"""A dense fp64 oracle in NumPy that shares no code with the package: loops over queries and keys, and one law."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Weights:
    q: np.ndarray  # [H, D, M]
    k: np.ndarray  # [K, D, M]
    v: np.ndarray  # [K, D, M]
    out: np.ndarray  # [M, H * D]


def rotate(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Half-split RoPE of one vector `[D]` to several positions `[n]`, textbook form: `[n, D]`."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-2.0 * np.arange(half) / x.shape[-1])
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def attention(
    x: np.ndarray,  # [T, M], the tokens at positions 0 .. T - 1
    w: Weights,
    *,
    window: int | None,
    sink_tokens: int,
    relative: bool,
    theta: float | None,
    sinks: np.ndarray | None,
    slopes: np.ndarray | None,
    dense: np.ndarray | None,  # [H, T, T] by positions
    block: int = 1,
) -> np.ndarray:
    """The output `[T, M]` of one attention layer over one stream."""
    T = x.shape[0]
    H, D, _ = w.q.shape
    groups = H // w.k.shape[0]
    queries, keys, values = (np.einsum("hdm,tm->htd", weight, x) for weight in (w.q, w.k, w.v))
    result = np.zeros((T, w.out.shape[0]))
    for p in range(T):
        seen = []
        for j in range(T):
            reached = j <= p or j // block == p // block
            kept = window is None or p - j < window or j < sink_tokens
            if reached and kept:
                seen.append(j)
        j = np.array(seen)
        distance = p - j
        if relative and window is not None:
            distance = np.where(j < sink_tokens, min(p, sink_tokens + window - 1) - j, distance)
        heads = []
        for h in range(H):
            q = queries[h, p]
            rotated = rotate(q, distance, theta) if theta else np.tile(q, (len(j), 1))
            scores = (rotated * keys[h // groups, j]).sum(-1) / np.sqrt(D)
            if slopes is not None:
                scores = scores - slopes[h] * np.abs(p - j)
            if dense is not None:
                scores = scores + dense[h, p, j]
            attended = values[h // groups, j]
            if sinks is not None:
                scores, attended = np.append(scores, sinks[h]), np.vstack([attended, np.zeros(D)])
            e = np.exp(scores - scores.max())
            heads.append((e / e.sum()) @ attended)
        result[p] = w.out @ np.concatenate(heads)
    return result
