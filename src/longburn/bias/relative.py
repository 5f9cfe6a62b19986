"""Relative attention of Transformer-XL (Dai et al., arXiv 1901.02860): a bias that depends on query and distance."""

from typing import Self

import torch
from torch import Tensor, nn

from longburn.bias.policy import BiasContext, Policy
from longburn.kernels.attend import BiasTerms


def sinusoids(distances: Tensor, dim: int, *, base: float = 10000.0) -> Tensor:
    """`R(m)` `[..., dim]` of integer distances m `[...]`, fp64: sine and cosine of `m * base^(-2f / dim)` in turn."""
    frequencies = base ** (torch.arange(0, dim, 2, dtype=torch.float64, device=distances.device) / -dim)
    angles = distances.unsqueeze(-1) * frequencies
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


class RelativeBias(Policy):
    """Scores `scale * ((q + u) . k + (q + v) . W R(i - j))` of query i and key j instead of `scale * q . k`.

    u and v are learned for every head, and W `[H * D, M]` projects the sinusoids R of the distance, which is negative
    for later keys. The bias is the second product; `queries` adds u for the first. Nothing is kept for a token. Rows
    `W R(m)` are kept for every distance m within the window (without one, for as many as there are keys), once while W
    stays the same (after writing to its `.data`, say `eval()`). Kept sink tokens beyond the window are seen at their
    true distance.

    Args:
        dim: model size M, an even number.
        heads: query heads H.
        head_dim: D; default `dim // heads`.
        base: of the sinusoids' wavelengths.

    Raises:
        ValueError: an odd dim, or one that is no multiple of heads without a head_dim.
    """

    rows = True

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        base: float = 10000.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim % 2 or heads < 1 or (head_dim is None and dim % heads):
            raise ValueError(
                f"RelativeBias: dim {dim}, heads {heads}, head_dim {head_dim}: wanted an even dim, "
                "and one that is a multiple of heads or a head_dim"
            )
        self.dim, self.heads, self.base = dim, heads, base
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.u = nn.Parameter(torch.zeros(heads, self.head_dim, dtype=dtype, device=device))
        self.v = nn.Parameter(torch.zeros(heads, self.head_dim, dtype=dtype, device=device))
        self.project = nn.Linear(dim, heads * self.head_dim, bias=False, dtype=dtype, device=device)
        self._kept: dict[tuple[int, int, torch.dtype, torch.device], tuple[object, Tensor]] = {}

    def queries(self, q: Tensor) -> Tensor:
        return q + self.u[:, None]

    def train(self, mode: bool = True) -> Self:
        """As any module's; W may have been written to in ways that leave no trace (`.data`), so rows are made anew."""
        self._kept = {key: (None, rows) for key, (_, rows) in self._kept.items()}
        return super().train(mode)

    def terms(self, context: BiasContext) -> BiasTerms:
        wide = torch.promote_types(context.q.dtype, torch.float32)
        q = (context.q.to(wide) + (self.v - self.u).to(wide)[:, None]) * context.scale
        low, high = _distances(context)
        by_distance = q @ self._table(low, high, wide).transpose(1, 2)  # [B, H, T, n]
        distance = (context.q_pos[:, :, None] - context.k_pos[:, None])[:, None]  # [B|1, 1, T, S]
        B, H, T, n = by_distance.shape
        dense = by_distance.gather(3, (distance - low).clamp(0, n - 1).expand(B, H, T, -1))
        if context.sink_tokens and context.window is not None:
            slot = context.k_pos[:, None, None]
            sinks = self._sinks(q, context).gather(3, slot.clamp(0, context.sink_tokens - 1).expand(B, H, T, -1))
            dense = torch.where(slot < context.sink_tokens, sinks, dense)
        return BiasTerms(dense=dense)

    def _sinks(self, q: Tensor, context: BiasContext) -> Tensor:
        """The bias of kept sink tokens, at any distance, `[B, H, T, sink_tokens]`."""
        sinks = torch.arange(context.sink_tokens, device=q.device)
        waves = sinusoids(context.q_pos[:, :, None] - sinks, self.dim, base=self.base).to(q.dtype)
        weight = self.project.weight.to(q.dtype).view(self.heads, self.head_dim, self.dim)
        return ((q @ weight).transpose(1, 2) @ waves.transpose(2, 3)).transpose(1, 2)

    def _table(self, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """`W R(m)` of every head, `[H, n, D]`, for m from low to high at least."""
        weight = self.project.weight
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and weight.requires_grad):
            return self._rows(low, high, dtype)
        key = (low, high, dtype, weight.device)
        of = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        kept = self._kept.get(key)
        if kept is None or kept[0] != of:
            with torch.inference_mode(False), torch.no_grad():
                made = self._rows(low, high, dtype)
                # Where there was one it stays in its place: a recorded step reads it there.
                self._kept[key] = of, made if kept is None else kept[1].copy_(made)
        return self._kept[key][1]

    def _rows(self, low: int, high: int, dtype: torch.dtype) -> Tensor:
        weight = self.project.weight.to(dtype)
        waves = sinusoids(torch.arange(low, high + 1, device=weight.device), self.dim, base=self.base).to(dtype)
        return (waves @ weight.T).view(-1, self.heads, self.head_dim).transpose(0, 1)


def _distances(context: BiasContext) -> tuple[int, int]:
    """The distances `i - j` at which a query sees keys, lowest and highest; kept sink tokens may be farther.

    Where the window does not say, they are those of as many consecutive tokens as there are keys.
    """
    keys = context.k_pos.shape[1]
    reach = (1 << (keys - 1).bit_length()) - 1  # 0, 1, 3, 7, ...: few tables for a growing cache
    earlier = None if context.window is None else context.window - 1
    later = None if context.lookahead is None else max(context.lookahead, context.block - 1)
    high = reach if earlier is None else min(earlier, reach)
    low = -(reach if later is None else min(later, reach))
    far = torch.iinfo(torch.int64).max // 2
    first_q, first_k = (torch.where(pos < 0, far, pos).amin(1) for pos in (context.q_pos, context.k_pos))
    within = []
    if earlier is None or earlier > reach:
        within.append(context.q_pos.amax(1) - first_k <= high)
    if later is None or later > reach:
        within.append(context.k_pos.amax(1) - first_q <= -low)
    for row in within:
        message = (
            f"RelativeBias: of {keys} keys some are more than {reach} positions away from a query; "
            "give every row consecutive positions"
        )
        if row.device.type != "cpu":
            torch._assert_async(row.all(), message)
        elif not bool(row.all()):
            raise ValueError(message)
    return low, high
