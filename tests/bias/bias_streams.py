"""Streams through a layer with a bias, and what they must give: attention as loops in fp64, with NumPy alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longburn import Attention, AttnWindow, BiasPolicy, CacheManager

M, H, K, D = 5, 4, 2, 6
T = 30  # tokens: beyond every window and sink token here

WINDOWS = [
    AttnWindow(),
    AttnWindow(1),
    AttnWindow(7),
    AttnWindow(7, sink_tokens=2),
    AttnWindow(1, sink_tokens=3),
]
CHUNKS = [(1,), (2, 5), (3, 11), (30,), (9, 1)]


@dataclass(frozen=True)
class Row:
    """What a bias may be made of: one row's queries `[H, T, D]`, scaled scores `[H, T, T]`, and the keys each sees."""

    q: np.ndarray
    scores: np.ndarray
    seen: list[list[int]]

    @property
    def length(self) -> int:
        return len(self.seen)

    def fill(self, bias: Callable[[int, int, int], float]) -> np.ndarray:
        """`bias(h, p, j)` for every query and every key it sees."""
        matrix = np.zeros_like(self.scores)
        for h in range(matrix.shape[0]):
            for p, keys in enumerate(self.seen):
                for j in keys:
                    matrix[h, p, j] = bias(h, p, j)
        return matrix


BiasOf = Callable[[Row], np.ndarray]  # [H, T, T]


def layer(window: AttnWindow, *, sinks: bool = False, seed: int = 0, **settings: object) -> Attention:
    """A layer with random fp64 weights; learned sinks far from 0."""
    g = torch.Generator().manual_seed(seed)
    made = Attention(M, H, kv_heads=K, head_dim=D, window=window, sinks=sinks, dtype=torch.float64, **settings)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.startswith("bias."):
                noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
                parameter.copy_(noise * (3 if name == "sinks" else 0.6))
    return made.requires_grad_(False)


def randomise(policy: torch.nn.Module, seed: int = 0, scale: float = 1.0) -> torch.nn.Module:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return policy


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wanted(made: Attention, x: Tensor, bias: BiasOf) -> Tensor:
    """The output `[T, M]` for one row of tokens `[T, M]` at the positions 0, 1, ..."""
    window, n = made.window, x.shape[0]
    heads = (x @ made.qkv.weight.T).numpy().reshape(n, H + 2 * K, D).transpose(1, 0, 2)
    q, k, v = heads[:H], heads[H : H + K], heads[H + K :]
    seen: list[list[int]] = []
    for p in range(n):
        reach = n - 1 if window.lookahead is None else p + window.lookahead
        near = [j for j in range(n) if j <= reach]
        seen.append([j for j in near if window.size is None or p - j < window.size or j < window.sink_tokens])
    scores = np.zeros((H, n, n))
    for h in range(H):
        for p in range(n):
            for j in range(n):
                scores[h, p, j] = q[h, p] @ k[h // (H // K), j] * made.scale
    biased = scores + bias(Row(q, scores, seen))
    out = np.zeros((n, H * D))
    for h in range(H):
        for p in range(n):
            row, values = biased[h, p, seen[p]], v[h // (H // K), seen[p]]
            if made.sinks is not None:
                row, values = np.append(row, made.sinks[h].item()), np.vstack([values, np.zeros(D)])
            e = np.exp(row - row.max())
            out[p, h * D : (h + 1) * D] = (e / e.sum()) @ values
    return torch.tensor(out) @ made.out.weight.T


def streamed(
    made: Attention,
    policy: BiasPolicy | None,
    rows: Sequence[Tensor],
    chunks: Sequence[int],
    *,
    slack: int = 0,
    left: bool = True,
) -> list[Tensor]:
    """Rows of any lengths through one cache in chunks of these sizes in turn; -1 and NaN where a row has no token.

    Slots that nothing was written to are poisoned with NaN.
    """
    cache = CacheManager.for_layers([made], len(rows), slack=slack)
    poison(cache)
    at, out, turn = [0] * len(rows), [[] for _ in rows], 0
    while any(a < len(row) for a, row in zip(at, rows, strict=True)):
        size = chunks[turn % len(chunks)]
        take = [min(size, len(row) - a) for a, row in zip(at, rows, strict=True)]
        if turn % 3 == 2 and any(take[1:]):
            take[0] = 0  # a row that pauses
        width = max(take)
        x, ids = torch.zeros(len(rows), width, M, dtype=torch.float64), torch.full((len(rows), width), -1)
        columns = [slice(width - n, width) if left else slice(0, n) for n in take]
        for b, n in enumerate(take):
            x[b, columns[b]], ids[b, columns[b]] = rows[b][at[b] : at[b] + n], 0
        step = cache.positions(width if all(n == width for n in take) and len(set(at)) == 1 else ids)
        with torch.no_grad():
            y = made(x, step, cache=cache[0], bias=policy)
        cache.advance(step)
        poison(cache)
        for b, n in enumerate(take):
            out[b].append(y[b, columns[b]])
            at[b] += n
        turn += 1
    return [torch.cat(parts) for parts in out]


def poison(cache: CacheManager) -> None:
    """NaN in every slot that holds no token, unless kept sink tokens lie apart from the others (fp8)."""
    for one in cache:
        *memory, pos = one.memory
        memory = [tensor for tensor in memory if tensor.shape[2] == pos.shape[1]]
        for tensor in memory:
            for b in range(tensor.shape[0]):
                empty = pos[b if pos.shape[0] > 1 else 0] < 0
                tensor[b][:, empty] = float("nan")


def largest_difference(made: Attention, policy: BiasPolicy | None, bias: BiasOf) -> float:
    """Over the full forward, every chunking, and ragged rows, of one layer."""
    rows = [tokens(T), tokens(T - 7, seed=2), tokens(3, seed=3)]
    truth = [wanted(made, row, bias) for row in rows]
    with torch.no_grad():
        found = [(made(rows[0][None], bias=policy)[0] - truth[0]).abs().max()]
    if made.window.streams:
        for chunks in CHUNKS:
            got = streamed(made, policy, rows[:1], chunks, slack=chunks[0] % 3)
            found.append((got[0] - truth[0]).abs().max())
        for left, chunks in ((True, (1, 4)), (False, (13, 2, 1))):
            got = streamed(made, policy, rows, chunks, left=left)
            found += [(g - t).abs().max() for g, t in zip(got, truth, strict=True)]
    largest = torch.stack(found).max()
    return float("inf") if bool(largest.isnan()) else float(largest)
