"""One attention call as tensors and plain numbers: what every implementation is given.

B batch, T queries, S key slots, H query heads, K kv heads (H a multiple of K), D head size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class BiasTerms(NamedTuple):
    """An additive bias in the cheapest exact form that its policy knows; the terms that are given are summed.

    `slope` is ALiBi's form, `-slope * |p - j|` for query position p and key position j: the distance is taken in
    integers, so it is exact at any position. `table` is indexed by distance: entry `clamp(p - j + zero, 0, n - 1)`.
    """

    slope: Tensor | None = None  # [H]
    key: Tensor | None = None  # [B|1, H|1, S] one scalar a key
    row: Tensor | None = None  # [B|1, H|1, T] one scalar a query; matters only beside a learned sink or in a merge
    table: Tensor | None = None  # [H|1, n]
    zero: int = 0
    dense: Tensor | None = None  # [B|1, H|1, T, S]


class Known(NamedTuple):
    """What the host knows about one row's (or every row's) keys and queries without reading the device.

    The row's queries stand in columns `q_offset : q_offset + q_count` and hold the positions `q_start, q_start + 1,
    ...`. Its first `keys` slots are all filled: the first `head` of them hold positions `0 .. head - 1`, the others
    exactly the positions `k_start, k_start + 1, ...`, in this order if `ordered`. Nothing beyond them may be looked at.
    """

    q_start: int
    q_count: int
    keys: int
    head: int
    k_start: int
    ordered: bool
    q_offset: int = 0


@dataclass(frozen=True)
class AttendCall:
    """The arguments of one attention call; `longburn.attend` documents their meaning."""

    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, K, S, D]
    v: Tensor  # [B, K, S, D]
    q_pos: Tensor  # [B|1, T] int64, -1: no token
    k_pos: Tensor  # [B|1, S] int64, -1: empty slot
    scale: float
    window: int | None = None  # counts the query itself
    sink_tokens: int = 0
    lookahead: int | None = 0  # later keys a query sees: 0 is causal, None is all
    block: int = 1  # block-causal: keys of the query's own block are visible too
    bias: BiasTerms | None = None
    sinks: Tensor | None = None  # [H] logits
    q_sink: Tensor | None = None  # [B, H, T, D] second query, used for keys at positions below sink_tokens
    known: tuple[Known, ...] | None = None  # one for all rows, or one a row
    ascending: bool = False  # no slot holds a position below its own index, so those beyond the newest query are unseen
    # Keys and values [B, K, S0, D] of the first S0 slots, which lie elsewhere, in the type of q. Positions and biases
    # then have S0 + S columns. `ascending` speaks of the slots in k.
    before: tuple[Tensor, Tensor] | None = None
    scales: tuple[Tensor, Tensor] | None = None  # fp32 [B, K, S] of k and v in fp8: a value is the number times these
    wants_lse: bool = False

    @property
    def groups(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def needs_grad(self) -> bool:
        tensors = [self.q, self.k, self.v, self.sinks, self.q_sink, *(self.bias or ())]
        return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


# out [B, H, T, D], log-sum-exp [B, H, T] in fp32 or fp64. An implementation that never learns the log-sum-exp refuses
# calls that want it and leaves the second empty otherwise.
AttendResult = tuple[Tensor, Tensor]


def visible(call: AttendCall) -> Tensor:
    """The law: `[B|1, 1, T, S]`, True where the query may see the key.

    The slot is filled, the key is not later than the query (or stands in the query's own block), and it is within the
    window or one of the first `sink_tokens` positions.
    """
    p, j = call.q_pos[:, None, :, None], call.k_pos[:, None, None, :]
    seen = (p >= 0) & (j >= 0)
    if call.lookahead is not None:
        near = j <= p + call.lookahead
        if call.block > 1:
            near |= j // call.block == p // call.block
        seen = seen & near
    if call.window is not None:
        seen = seen & ((p - j < call.window) | (j < call.sink_tokens))
    return seen


def bias_matrix(call: AttendCall) -> Tensor | None:
    """The bias of the call written out, `[B|1, H|1, T, S]`; None if there is none."""
    terms = call.bias
    if terms is None:
        return None
    parts = []
    if terms.slope is not None:
        distance = (call.q_pos[:, None, :, None] - call.k_pos[:, None, None, :]).abs()
        parts.append(-terms.slope[:, None, None] * distance)
    if terms.key is not None:
        parts.append(terms.key[:, :, None, :])
    if terms.row is not None:
        parts.append(terms.row[:, :, :, None])
    if terms.table is not None:
        distance = call.q_pos[:, :, None] - call.k_pos[:, None, :] + terms.zero
        parts.append(terms.table[:, distance.clamp(0, terms.table.shape[1] - 1)].transpose(0, 1))
    if terms.dense is not None:
        parts.append(terms.dense)
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total + part
    return total


def unpacked(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp8 numbers `[..., D]` times their scales `[...]`, rounded to `dtype`."""
    return (x.float() * scale.unsqueeze(-1)).to(dtype)


def joined(call: AttendCall) -> AttendCall:
    """The same call with all its keys and values in one piece each, in the type of q."""
    if call.before is None and call.scales is None:
        return call
    k, v = call.k, call.v
    if call.scales is not None:
        k, v = (unpacked(x, scale, call.q.dtype) for x, scale in zip((k, v), call.scales, strict=True))
    if call.before is not None:
        k, v = (torch.cat(parts, 2) for parts in zip(call.before, (k, v), strict=True))
    return replace(call, k=k, v=v, before=None, scales=None, ascending=call.ascending and call.before is None)


def query_block(call: AttendCall, start: int, stop: int) -> AttendCall:
    """The same call for the queries `start .. stop - 1` only."""
    rows = slice(start, stop)
    bias = call.bias
    if bias is not None:
        bias = bias._replace(
            row=None if bias.row is None else bias.row[:, :, rows],
            dense=None if bias.dense is None else bias.dense[:, :, rows],
        )
    q_sink = None if call.q_sink is None else call.q_sink[:, :, rows]
    return replace(call, q=call.q[:, :, rows], q_pos=call.q_pos[:, rows], q_sink=q_sink, bias=bias, known=None)


def later_keys(call: AttendCall, start: int) -> AttendCall:
    """The same call without the first `start` slots; nothing of it may lie elsewhere (`before`)."""
    bias = call.bias
    if bias is not None:
        bias = bias._replace(
            key=None if bias.key is None else bias.key[:, :, start:],
            dense=None if bias.dense is None else bias.dense[..., start:],
        )
    scales = None if call.scales is None else (call.scales[0][:, :, start:], call.scales[1][:, :, start:])
    k, v, k_pos = call.k[:, :, start:], call.v[:, :, start:], call.k_pos[:, start:]
    return replace(call, k=k, v=v, k_pos=k_pos, bias=bias, scales=scales, known=None)


def by_query_blocks(
    call: AttendCall, run: Callable[[AttendCall], AttendResult], *, elements: int = 1 << 25
) -> AttendResult:
    """Run a call in blocks of queries so that no `[B, H, block, S]` tensor exceeds `elements`.

    This is what keeps a prefill of T tokens from ever allocating T x T.
    """
    T = call.q.shape[2]
    per_query = call.q.shape[0] * call.q.shape[1] * max(1, call.k.shape[2])
    block = max(1, min(T, elements // per_query))
    if block >= T:
        return run(call)
    parts = [run(query_block(call, a, min(a + block, T))) for a in _starts(T, block)]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _starts(total: int, block: int) -> Iterator[int]:
    return iter(range(0, total, block))


def add_sinks(result: AttendResult, sinks: Tensor | None) -> AttendResult:
    """Let learned logits `[H]` into the softmax's denominator: a key with value 0."""
    if sinks is None:
        return result
    out, lse = result
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    weight = torch.exp(lse - total.clamp_min(torch.finfo(lse.dtype).min))
    return (out * weight.unsqueeze(-1)).to(out.dtype), total
