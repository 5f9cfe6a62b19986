"""A draw among the k most likely tokens, from the most to the least likely: the k are found, gathered and sorted."""

import triton
import triton.language as tl
from torch import Tensor

from longburn.kernels.triton.draw import Scratch, Settings, _advance, _stays, _ties
from longburn.kernels.triton.mass import clean, key_of, number_of, share_of, target_of, weigh

WIDEST = 1024  # candidates that one program sorts


@triton.jit
def _chosen(
    logits,
    top_k,
    state,
    sums,
    row,
    block,
    blocks,
    size,
    stride,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """Which tokens of a block are among the row's k, and the keys of all."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    key = key_of(clean(tl.load(logits + row * stride + at, mask=at < size, other=-float("inf"))))
    cutoff = _advance(state, sums, top_k, row, blocks, DIGITS, False, True, COUNT, DIGITS)[0]
    ties, first = _ties(state, sums, top_k, row, block, blocks, tl.full((), 1, tl.int64), True, COUNT, DIGITS)
    return _stays(key, cutoff, ties, first) & (at < size), key


@triton.jit
def _count(
    logits,
    top_k,
    state,
    sums,
    counts,
    size,
    stride,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    DIGITS: tl.constexpr,
):
    block, row, blocks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    chosen, _ = _chosen(logits, top_k, state, sums, row, block, blocks, size, stride, BLOCK, COUNT, DIGITS)
    tl.store(counts + row * blocks + block, tl.sum(chosen.to(tl.int64), 0))


@triton.jit
def _gather(
    logits,
    top_k,
    state,
    sums,
    counts,
    found,
    size,
    stride,
    width,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """Write the row's k candidates one after the other: the key, and below it what is larger the lower the id."""
    block, row, blocks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    chosen, key = _chosen(logits, top_k, state, sums, row, block, blocks, size, stride, BLOCK, COUNT, DIGITS)
    before = tl.arange(0, COUNT)
    first = tl.sum(tl.load(counts + row * blocks + before, mask=before < block, other=0), 0)
    place = first + tl.cumsum(chosen.to(tl.int32), 0) - 1
    at = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(found + row * width + place, (key << 20) | (1048575 - at), mask=chosen & (place < width))


@triton.jit
def _pick_ranked(
    found,
    top_k,
    temperature,
    cut_temperature,
    top_p,
    min_p,
    streams,
    draws,
    tokens,
    width,
    CUT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, WIDTH)
    there = rank < tl.load(top_k + row)
    ranked = tl.sort(tl.load(found + row * width + rank, mask=there, other=-1), descending=True)
    x = number_of(tl.where(there, ranked >> 20, 0))
    top = tl.maximum(tl.max(tl.where(rank == 0, x, -float("inf")), 0), -3.4028234663852886e38)
    x, t = tl.where(there, x, -float("inf")), tl.load(temperature + row)
    weight = tl.where(there, weigh(x, top, t if cut_temperature is None else tl.load(cut_temperature + row)), 0)
    if CUT:
        wanted = share_of(tl.sum(weight, 0), tl.load(top_p + row))
        weight = tl.where(tl.cumsum(weight, 0) - weight < wanted, weight, 0)
    least = (tl.load(min_p + row) * 4398046511104.0).to(tl.int64)
    weight = tl.where(weight >= least, weight, 0)
    if cut_temperature is not None:
        weight = tl.where(weight > 0, weigh(x, top, t), 0)
    mass, total = tl.cumsum(weight, 0), tl.sum(weight, 0)
    index = tl.sum((mass <= target_of(streams, draws, row, total)).to(tl.int32), 0)
    token = 1048575 - (tl.max(tl.where(rank == index, ranked, -1), 0) & 1048575)
    tl.store(tokens + row, tl.where(total > 0, token, -1))


def draw_ranked(logits: Tensor, settings: Settings, width: int) -> Tensor:
    """Int64 `[b]`, one of the `top_k` (at most `width`) most likely tokens of each row, -1 where none has a weight."""
    s, (stream, index, temperature, top_k, top_p, min_p, cut_temperature) = Scratch(logits), settings
    state, sums = s.cut(logits, temperature, top_k, ranked=True)
    counts, found = s.integers(s.rows, s.blocks), s.integers(s.rows, width)
    _count[s.blocks, s.rows](logits, top_k, state, sums, counts, *s.sizes, **s.constants)
    _gather[s.blocks, s.rows](logits, top_k, state, sums, counts, found, *s.sizes, width, **s.constants)
    _pick_ranked[(s.rows,)](
        *(found, top_k, temperature, cut_temperature, top_p, min_p, stream, index, s.tokens, width),
        CUT=top_p is not None,
        WIDTH=max(triton.next_power_of_2(width), 16),
        num_warps=4,
    )
    return s.tokens
