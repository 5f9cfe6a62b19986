"""Attention calls of every kind, and a dense answer that shares no code with the package.

The law is written out with Python's own comparisons, one query and one key at a time; the scores, the bias and the
sinks are one einsum, one softmax and one more column, in the precision that is asked for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from covering import pairwise
from torch import Tensor

from longburn.kernels.attend import AttendCall, BiasTerms, Known

NAN = float("nan")


@dataclass(frozen=True)
class Positions:
    """Where the queries and the keys of a call stand, and what the host is told of it."""

    q: tuple[tuple[int, ...], ...]  # by row (or one for all rows); -1: no token
    k: tuple[tuple[int, ...], ...]  # -1: empty slot
    known: tuple[Known, ...] | None = None


@dataclass(frozen=True)
class Case:
    """One call. Its tensors follow from the fields and a seed."""

    name: str
    at: Positions
    B: int = 2
    H: int = 4
    K: int = 2
    D: int = 32
    window: int | None = None
    sink_tokens: int = 0
    lookahead: int | None = 0
    block: int = 1
    bias: str | None = None  # words of slope, key, row, table, dense; or all
    sinks: tuple[float, float] | None = None  # range of the learned logits
    q_sink: bool = False
    scale: float | None = None

    @property
    def queries(self) -> int:
        return len(self.at.q[0])

    @property
    def slots(self) -> int:
        return len(self.at.k[0])


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case, with NaN wherever nothing may be read."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_sink: Tensor | None
    sinks: Tensor | None
    bias: BiasTerms | None

    def to(self, dtype: torch.dtype) -> "Inputs":
        """q, k, v in this type (rounded); sinks and bias in at least fp32, as parameters of a model would be."""
        wide = torch.promote_types(dtype, torch.float32)

        def cast(x: Tensor | None, to: torch.dtype) -> Tensor | None:
            return None if x is None else x.to(to)

        bias = self.bias and BiasTerms(*(cast(x, wide) if isinstance(x, Tensor) else x for x in self.bias))
        narrow = (x.to(dtype) for x in (self.q, self.k, self.v))
        return Inputs(*narrow, cast(self.q_sink, dtype), cast(self.sinks, wide), bias)


def inputs(case: Case, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    B, H, K, D, T, S = case.B, case.H, case.K, case.D, case.queries, case.slots
    q, k, v = normal(B, H, T, D), normal(B, K, S, D), normal(B, K, S, D)
    q_sink = normal(B, H, T, D) if case.q_sink else None
    no_token = torch.tensor(case.at.q)[:, None, :, None] < 0
    empty = torch.tensor(case.at.k)[:, None, :, None] < 0
    for known, row in zip(case.at.known or (), range(B), strict=False):
        rows = slice(None) if len(case.at.known or ()) == 1 else row
        k[rows, :, known.keys :] = v[rows, :, known.keys :] = NAN
    q, k, v = q.masked_fill(no_token, NAN), k.masked_fill(empty, NAN), v.masked_fill(empty, NAN)
    q_sink = None if q_sink is None else q_sink.masked_fill(no_token, NAN)
    sinks = None
    if case.sinks is not None:
        low, high = case.sinks
        sinks = low + (high - low) * torch.rand(H, generator=g, dtype=torch.float64)
    words = ["slope", "key", "row", "table", "dense"] if case.bias == "all" else (case.bias or "").split()
    terms: dict[str, Tensor | int] = {}
    if "slope" in words:
        terms["slope"] = 0.05 + 0.5 * torch.rand(H, generator=g, dtype=torch.float64)
    if "key" in words:
        terms["key"] = 2 * normal(B, H, S)
    if "row" in words:
        terms["row"] = 2 * normal(1, H, T)
    if "table" in words:
        terms |= {"table": 2 * normal(H, 7), "zero": 2}
    if "dense" in words:
        terms["dense"] = 2 * normal(B, 1, T, S)
    return Inputs(q, k, v, q_sink, sinks, BiasTerms(**terms) if terms else None)


def call_of(case: Case, given: Inputs, *, wants_lse: bool = True, known: bool = True) -> AttendCall:
    return AttendCall(
        q=given.q,
        k=given.k,
        v=given.v,
        q_pos=torch.tensor(case.at.q),
        k_pos=torch.tensor(case.at.k),
        scale=_scale(case),
        window=case.window,
        sink_tokens=case.sink_tokens,
        lookahead=case.lookahead,
        block=case.block,
        bias=given.bias,
        sinks=given.sinks,
        q_sink=given.q_sink,
        known=case.at.known if known else None,
        wants_lse=wants_lse,
    )


def _scale(case: Case) -> float:
    return 1 / math.sqrt(case.D) if case.scale is None else case.scale


def sees(case: Case, p: int, j: int) -> bool:
    """The law, for the query at position p and the key at position j."""
    if p < 0 or j < 0:
        return False
    own_block = case.block > 1 and p // case.block == j // case.block
    if case.lookahead is not None and j > p + case.lookahead and not own_block:
        return False
    return case.window is None or j > p - case.window or j < case.sink_tokens


def by_pair(case: Case, value: Callable[[int, int], float]) -> Tensor:
    """`[B, T, S]` of a function of the positions."""

    def row(of: tuple[tuple[int, ...], ...], b: int) -> tuple[int, ...]:
        return of[b if len(of) > 1 else 0]

    return torch.tensor([[[value(p, j) for j in row(case.at.k, b)] for p in row(case.at.q, b)] for b in range(case.B)])


@cache
def visible(case: Case) -> Tensor:
    """`[B, 1, T, S]`, the law for every pair."""
    return by_pair(case, lambda p, j: sees(case, p, j))[:, None]


def dense(case: Case, given: Inputs, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The output `[B, H, T, D]` and log-sum-exp `[B, H, T]`, every step in `dtype`."""
    G = case.H // case.K
    q, k, v = (x.nan_to_num().to(dtype) for x in (given.q, given.k, given.v))
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * _scale(case)
    if given.q_sink is not None:
        other = torch.einsum("bhtd,bhsd->bhts", given.q_sink.nan_to_num().to(dtype), k) * _scale(case)
        scores = torch.where(by_pair(case, lambda p, j: j < case.sink_tokens)[:, None], other, scores)
    if given.bias is not None:
        scores = scores + _bias(case, given.bias).to(dtype)
    seen = visible(case)
    scores = scores.masked_fill(~seen, -math.inf)
    nothing = ~seen.any(-1, keepdim=True)
    if given.sinks is not None:
        column = given.sinks.to(dtype)[None, :, None, None].expand(case.B, case.H, case.queries, 1)
        scores, v = torch.cat([scores, column], -1), torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    weights = torch.softmax(scores.masked_fill(nothing, 0), -1).masked_fill(nothing, 0)
    lse = torch.logsumexp(scores.to(torch.float64), -1)
    return weights @ v, lse


def _bias(case: Case, terms: BiasTerms) -> Tensor:
    total = torch.zeros(case.B, case.H, case.queries, case.slots, dtype=torch.float64)
    distance = by_pair(case, lambda p, j: p - j)
    if terms.slope is not None:
        total = total - terms.slope.double()[None, :, None, None] * distance.abs()[:, None]
    if terms.table is not None:
        entry = distance.add(terms.zero).clip(0, terms.table.shape[1] - 1)
        total = total + torch.stack([row.double()[entry] for row in terms.table], 1)
    for term, unsqueeze in ((terms.key, 2), (terms.row, 3)):
        if term is not None:
            total = total + term.double().unsqueeze(unsqueeze)
    return total if terms.dense is None else total + terms.dense.double()


# --- where tokens may stand ------------------------------------------------------------------------------------------


def from_zero(T: int) -> Positions:
    """A whole sequence that attends to itself."""
    at = (tuple(range(T)),)
    return Positions(at, at, (Known(0, T, T, 0, 0, True),))


def after(past: int, T: int, *, unwritten: int = 0) -> Positions:
    """T queries at the end of `past + T` keys, in a buffer with room for more."""
    S = past + T
    keys = (*range(S), *[-1] * unwritten)
    return Positions((tuple(range(past, S)),), (keys,), (Known(past, T, S, 0, 0, True),))


def past_window(start: int, T: int, window: int, sinks: int) -> Positions:
    """A chunk with what is left of the past: the kept sink tokens, the last `window - 1` positions, then itself."""
    low = start - window + 1
    keys = (*range(sinks), *range(low, start + T))
    return Positions((tuple(range(start, start + T)),), (keys,), (Known(start, T, len(keys), sinks, low, True),))


def ring(start: int, T: int, window: int, sinks: int, slack: int) -> Positions:
    """A ring that has wrapped: slot = position modulo its size, behind the kept sink tokens."""
    size, high = window + slack, start + T
    slots = [*range(sinks), *[-1] * size]
    for p in range(high - size, high):
        slots[sinks + (p - sinks) % size] = p
    known = Known(start, T, len(slots), sinks, high - size, False)
    return Positions((tuple(range(start, high)),), (tuple(slots),), (known,))


def ragged(rows: list[tuple[int, int, int]], T: int, S: int) -> Positions:
    """Rows (past, tokens, first column of the tokens), each with its own clock, in one padded batch."""
    q = tuple((*[-1] * first, *range(past, past + n), *[-1] * (T - first - n)) for past, n, first in rows)
    k = tuple((*range(past + n), *[-1] * (S - past - n)) for past, n, _ in rows)
    return Positions(q, k, tuple(Known(past, n, past + n, 0, 0, True, first) for past, n, first in rows))


def scattered(B: int, T: int, S: int, seed: int) -> Positions:
    """Keys in no order with holes, queries in no order with holes: nothing that a host could know."""
    g = torch.Generator().manual_seed(seed)
    k = [torch.randperm(S + 9, generator=g)[:S].tolist() for _ in range(B)]
    q = [torch.randperm(S + 5, generator=g)[:T].tolist() for _ in range(B)]
    for b in range(B):
        k[b][3 * b % S :: 4] = [-1] * len(k[b][3 * b % S :: 4])
        q[b][-1 - b % T] = -1 if T > 1 else q[b][0]
    return Positions(tuple(map(tuple, q)), tuple(map(tuple, k)))


def grid() -> list[Case]:
    """Every feature alone and several together, at odd sizes; few queries too, which have kernels of their own."""
    cases = [
        *(Case(f"head size {D}", after(24, 13), D=D) for D in (32, 40, 64, 80, 96, 128, 256)),
        *(Case(f"one query, head size {D}", after(36, 1, unwritten=5), D=D) for D in (32, 40, 64, 80, 96, 128, 256)),
        *(Case(f"H {H} K {K}", after(8, 9), H=H, K=K) for H, K in ((1, 1), (4, 4), (6, 2), (6, 1), (9, 3))),
        *(Case(f"one query, H {H} K {K}", after(40, 1), H=H, K=K) for H, K in ((1, 1), (4, 4), (6, 1), (9, 3))),
        *(Case(f"T {T}", after(10, T)) for T in (2, 3, 15, 16, 17, 33)),
        Case("full", from_zero(37)),
        Case("one key", from_zero(1)),
        Case("a scale of its own", after(5, 11), scale=0.7),
        Case("not known", scattered(2, 11, 29, seed=1)),
        Case("not known, one query", scattered(3, 1, 29, seed=2), B=3),
        Case("a thousand keys", after(1037, 3), B=1),
        Case("five thousand keys, one query", after(5000, 1, unwritten=3), B=1, H=2, K=1, D=16),
        Case("five thousand keys, windowed", after(5000, 2), B=1, H=2, K=1, D=16, window=4500, sink_tokens=3),
        Case("more queries than one band", from_zero(300), B=1, H=2, K=1, window=19, sink_tokens=3),
    ]
    for W, sinks in ((1, 0), (1, 2), (2, 1), (5, 0), (5, 4), (40, 3)):
        both = {"window": W, "sink_tokens": sinks}
        cases += [
            Case(f"window {W} + {sinks}, full", from_zero(31), **both),
            Case(f"window {W} + {sinks}, after", after(20, 11, unwritten=3), **both),
            Case(f"window {W} + {sinks}, ring", ring(61, 1, W, sinks, 0), **both),
            Case(f"window {W} + {sinks}, ring with slack", ring(61, 3, W, sinks, 2), **both),
            Case(f"window {W} + {sinks}, ragged", ragged([(20, 3, 0), (0, 5, 2), (9, 0, 0)], 7, 30), B=3, **both),
            Case(f"window {W} + {sinks}, not known", scattered(2, 9, 31, seed=W), **both),
        ]
        if W > 1:
            cases.append(Case(f"window {W} + {sinks}, past it", past_window(61, 7, W, sinks), **both))
    far = ((-9.0, -5.0), (20.0, 30.0))  # nearly without effect, and nearly all of the weight
    for sinks_range in ((-2.0, 2.0), *far):
        cases += [
            Case(f"sinks {sinks_range}", after(10, 7), sinks=sinks_range),
            Case(f"sinks {sinks_range}, one query", after(30, 1), sinks=sinks_range),
            Case(f"sinks {sinks_range}, ring", ring(61, 2, 9, 2, 1), window=9, sink_tokens=2, sinks=sinks_range),
            Case(f"sinks {sinks_range}, not known", scattered(2, 9, 31, seed=5), sinks=sinks_range),
        ]
    for bias in ("slope", "key", "row", "table", "dense", "all"):
        cases += [
            Case(f"bias {bias}", after(10, 9), bias=bias),
            Case(
                f"bias {bias}, one query, ring, sinks",
                ring(61, 1, 9, 2, 0),
                window=9,
                sink_tokens=2,
                bias=bias,
                sinks=(0, 1),
            ),
            Case(f"bias {bias}, not known, sinks", scattered(2, 9, 31, seed=6), window=12, bias=bias, sinks=(0, 1)),
        ]
    cases += [
        Case("no mask", after(4, 9), lookahead=None),
        Case("no mask, one query", scattered(2, 1, 31, seed=3), lookahead=None),
        Case("two-sided 3, 5", from_zero(23), window=4, lookahead=5),
        Case("two-sided 0, 2", scattered(2, 9, 31, seed=4), window=1, lookahead=2),
        Case("left only", from_zero(23), window=4, lookahead=None),
        Case("blocks of 4", from_zero(23), block=4),
        Case("blocks of 3, window, sinks", after(9, 6), block=3, window=7, sink_tokens=2, sinks=(0, 1)),
        Case("sees nothing", Positions(((5, 0, -1),), ((6, 7, -1, 8, 9),)), sinks=(0, 1)),
        Case("sees nothing, without sinks", Positions(((5, 0, -1),), ((6, 7, -1, 8, 9),))),
        Case("all slots empty", Positions(((5,),), ((-1,) * 7,)), sinks=(0, 1)),
        Case("no token at all", Positions(((-1, -1),), ((0, 1, 2),))),
        Case("positions in the millions", ring(10_000_019, 3, 8, 4, 2), window=8, sink_tokens=4, bias="slope"),
    ]
    for window, sink_tokens in ((6, 2), (1, 3), (30, 1)):
        both = {"window": window, "sink_tokens": sink_tokens, "q_sink": True}
        cases += [
            Case(f"relative {window} + {sink_tokens}, ring", ring(61, 3, window, sink_tokens, 2), sinks=(0, 1), **both),
            Case(f"relative {window} + {sink_tokens}, one query", ring(61, 1, window, sink_tokens, 0), **both),
            Case(f"relative {window} + {sink_tokens}, not known", scattered(2, 9, 31, seed=7), sinks=(0, 1), **both),
        ]
    return [replace(case, name=case.name.replace(" ", "_").replace(",", "")) for case in cases]


HEADS = ((1, 1), (6, 2), (2, 2), (5, 1))


def crossed(*queries: int, heads: Sequence[tuple[int, int]] = HEADS) -> list[Case]:
    """Every two features together at least once, in calls of so many queries: small, and yet of several tiles of 16."""
    orders: dict[str, Callable[[int], Positions]] = {
        "after": lambda T: after(25, T, unwritten=3),
        "past": lambda T: past_window(161, T, 9, 3),
        "ring": lambda T: ring(161, T, 9, 3, T),
        "ragged": lambda T: ragged([(22, T - T // 3, T // 3), (0, max(T // 2, 1), 0)], T, 24 + T),
        "scattered": lambda T: scattered(2, T, 41, seed=1),
    }
    rows = {"after": 1, "past": 2, "ring": 1, "ragged": 2, "scattered": 2}
    laws: dict[str, dict[str, Any]] = {
        "causal": {},
        "band": {"window": 7, "sink_tokens": 3},
        "relative": {"window": 9, "sink_tokens": 18, "q_sink": True},
        "two_sided": {"window": 6, "lookahead": 5},
        "blocks": {"block": 8, "window": 20, "sink_tokens": 2},
        "no_mask": {"lookahead": None},
    }
    biases = (None, "slope table", "key", "row dense")
    sinks = (None, (-2.0, 2.0), (4.0, 7.0), (-30.0, -20.0))  # none of them hides what is wrong with the keys
    return [
        Case(
            f"{order} {law} bias {bias} sinks {logits} H {H} K {K} D {D} T {T}".replace(" ", "_").replace(",", ""),
            orders[order](T),
            **{"B": rows[order], "H": H, "K": K, "D": D, "bias": bias, "sinks": logits, **laws[law]},
        )
        for order, law, bias, logits, (H, K), D, T in pairwise(
            list(orders), list(laws), biases, sinks, heads, (32, 40, 80, 256), queries
        )
    ]
