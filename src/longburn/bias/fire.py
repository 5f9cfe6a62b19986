"""FIRE (Li et al., arXiv 2310.04418): a learned function of the distance, in proportion to the query's position."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.bias.distance import check_heads, fewer_numbers, last_query, seen_distances, written_out
from longburn.bias.policy import BiasContext, Policy
from longburn.kernels.attend import BiasTerms


class Fire(Policy):
    """The bias `mlp(psi(p - j) / (psi(max(p, length)) + 1e-6))` of query position p and key position j, where
    `psi(x) = log(|c x| + 1)`.

    Up to `length` it depends on the distance alone and is a table. Beyond it every query has a curve of its own, which
    changes with each position, so nothing of it can be kept: one query a row is then one number a key, computed anew,
    and more of them are rows written out. On other devices than the CPU, the host knows a learned length no more than
    any other result, and assumes the second case.

    Args:
        heads: query heads H.
        width: of the hidden layer (ReLU) of `mlp`, from 1 to H numbers.
        c: the parameter `c` at the start.
        length: below it, distances are compared with it instead of the query's position.
        learn_length: multiply it by a learned parameter `multiplier`, 1 at the start, in magnitude.

    Raises:
        ValueError: a size or length below 1.
    """

    def __init__(
        self,
        heads: int,
        *,
        width: int = 32,
        c: float = 0.1,
        length: float = 512.0,
        learn_length: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or width < 1 or length < 1:
            raise ValueError(f"Fire: heads {heads}, width {width}, length {length}: wanted at least 1 of each")
        self.heads, self.length = heads, float(length)
        self.mlp = nn.Sequential(
            nn.Linear(1, width, dtype=dtype, device=device),
            nn.ReLU(),
            nn.Linear(width, heads, dtype=dtype, device=device),
        )
        self.c = nn.Parameter(torch.tensor(c, dtype=dtype, device=device))
        self.multiplier = nn.Parameter(torch.tensor(1.0, dtype=dtype, device=device)) if learn_length else None

    def terms(self, context: BiasContext) -> BiasTerms:
        check_heads(self, self.heads, context)
        dtype = torch.promote_types(context.q.dtype, torch.float32)
        span = self._span(context)
        if span is not None:
            distance = torch.arange(span[0], span[1] + 1, device=context.q.device)
            return BiasTerms(table=self._of(distance, self._shortest(dtype), dtype), zero=-span[0])
        distance = context.q_pos[:, :, None] - context.k_pos[:, None, :]
        against = torch.maximum(context.q_pos.to(dtype), self._shortest(dtype))
        return written_out(self._of(distance, against[:, :, None], dtype))

    def writes_rows(self, context: BiasContext) -> bool:
        return self._span(context) is None

    def _of(self, distance: Tensor, against: Tensor, dtype: torch.dtype) -> Tensor:
        """The bias `[H, *shape]` at distances `[*shape]`, seen in proportion to `against`."""
        c = self.c.to(dtype)

        def psi(x: Tensor) -> Tensor:
            return torch.log1p((c * x.to(dtype)).abs())

        share = psi(distance) / (psi(against) + 1e-6)
        first, first_bias, second, second_bias = (x.to(dtype) for x in self.mlp.parameters())
        return F.linear(F.linear(share[..., None], first, first_bias).relu(), second, second_bias).movedim(-1, 0)

    def _shortest(self, dtype: torch.dtype) -> Tensor:
        """What no query is compared with less than."""
        if self.multiplier is None:
            return torch.full((), self.length, dtype=dtype, device=self.c.device)
        return (self.multiplier.to(dtype) * self.length).abs()

    def _span(self, context: BiasContext) -> tuple[int, int] | None:
        """The distances of the table, if no query is beyond the length and the table is less than rows."""
        if self.multiplier is not None and self.c.device.type != "cpu":
            return None
        last = last_query(context)
        length = self.length if self.multiplier is None else float(self._shortest(torch.float64).detach())
        if last is None or last > length:
            return None
        return fewer_numbers(seen_distances(context), context)
