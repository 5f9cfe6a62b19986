"""Sorting choices by expert, on the device: a few experts and many choices, so counting does it."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128  # choices that one program sorts


@triton.jit
def _chosen(chosen, at, total, count):
    """Experts of choices, held to those there are; -1 beyond the last choice."""
    expert = tl.load(chosen + at, mask=at < total, other=0)
    expert = tl.minimum(tl.maximum(expert, 0), count - 1).to(tl.int32)
    return tl.where(at < total, expert, -1)


@triton.jit
def _count(chosen, counts, total, count, SIZE: tl.constexpr, EXPERTS: tl.constexpr):
    """How many of this program's choices take each expert."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    experts = tl.arange(0, EXPERTS)
    takes = (_chosen(chosen, at, total, count)[:, None] == experts[None]).to(tl.int32)
    tl.store(counts + tl.program_id(0) * EXPERTS + experts, tl.sum(takes, 0))


@triton.jit
def _place(
    chosen, counts, order, back, ends, table, total, count, chunks, tiles,
    SIZE: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Choices in the order of their experts (stable) and back, where each expert's rows end, and the table of tiles."""
    chunk = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    at = chunk * SIZE + tl.arange(0, SIZE)
    takes = (_chosen(chosen, at, total, count)[:, None] == experts[None]).to(tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    if counts is None:
        all = tl.sum(takes, 0)
    else:
        all = tl.zeros((EXPERTS,), tl.int32)
        for first in range(0, chunks, ROWS):
            row = first + tl.arange(0, ROWS)
            some = tl.load(counts + row[:, None] * EXPERTS + experts[None], mask=(row < chunks)[:, None], other=0)
            all += tl.sum(some, 0)
            before += tl.sum(tl.where((row < chunk)[:, None], some, 0), 0)
    start = tl.cumsum(all, 0) - all
    place = tl.sum(takes * (tl.cumsum(takes, 0) - 1 + (start + before)[None]), 1)
    tl.store(order + place, at, mask=at < total)
    tl.store(back + at, place, mask=at < total)
    if chunk == 0:
        tl.store(ends + experts, start + all, mask=experts < count)
        own = (all + TOKENS - 1) // TOKENS
        end = tl.cumsum(own, 0)
        for first in range(0, tiles, ROWS):
            tile = first + tl.arange(0, ROWS)
            inside = (tile[:, None] >= (end - own)[None]) & (tile[:, None] < end[None])
            expert = tl.sum(tl.where(inside, experts[None] + 1, 0), 1) - 1
            row = tl.sum(tl.where(inside, (start - (end - own) * TOKENS)[None], 0), 1) + tile * TOKENS
            stop = tl.sum(tl.where(inside, (start + all)[None], 0), 1)
            to = table + 3 * tile
            tl.store(to, expert, mask=tile < tiles)
            tl.store(to + 1, row, mask=tile < tiles)
            tl.store(to + 2, stop, mask=tile < tiles)


class Sorted(NamedTuple):
    """Choices of experts, sorted by expert; all int32. There are rows for all choices.

    Args:
        order: `[N k]`, the choice in each row.
        back: `[N k]`, the row of each choice.
        ends: `[E]`, the row behind the last one of each expert.
        table: `[tiles, 3]`, for each tile of rows its expert, its first row and the end of its expert's rows. There may
            be fewer tiles than entries; the expert is then -1.
    """

    order: Tensor
    back: Tensor
    ends: Tensor
    table: Tensor


def sort(chosen: Tensor, experts: int, tokens: int) -> Sorted:
    """Choices `[N, k]` by their experts, and tiles of up to `tokens` rows. Numbers are held to `0 .. experts - 1`."""
    total, device = chosen.numel(), chosen.device
    chunks, wide = triton.cdiv(total, CHUNK), triton.next_power_of_2(experts)
    order, back = torch.empty(2, total, dtype=torch.int32, device=device)
    ends = torch.empty(experts, dtype=torch.int32, device=device)
    table = torch.empty(min(total, total // tokens + experts), 3, dtype=torch.int32, device=device)
    counts = None
    if chunks > 1:
        counts = torch.empty(chunks, wide, dtype=torch.int32, device=device)
        _count[chunks,](chosen, counts, total, experts, SIZE=CHUNK, EXPERTS=wide)
    size = CHUNK if chunks > 1 else max(triton.next_power_of_2(total), 16)
    _place[chunks,](
        *(chosen, counts, order, back, ends, table, total, experts, chunks, len(table)),
        SIZE=size, EXPERTS=wide, TOKENS=tokens, ROWS=max(4096 // wide, 4), num_warps=4,
    )  # fmt: skip
    return Sorted(order, back, ends, table)
