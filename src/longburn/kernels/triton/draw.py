"""Choosing one token of many: the most likely one, or a draw from integer weights.

The integers are those of `sampling/processors.py`. A vocabulary is read by many programs, so what depends on all of it
is found in steps, one launch each. The logit at which the mass reaches the share wanted (top-p), or the number of
tokens reaches k (top-k: RANKED, every token weighs 1), is found four bits at a time: every program sums its weights by
the next digit, and the next launch adds up the sums. Only tokens that agree with all digits so far are weighed again,
so most programs have little to do after the first steps.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longburn.kernels.triton.mass import clean, key_of, number_of, share_of, target_of, top_of, weigh

BLOCK = 2048  # tokens a program
DIGITS = 8  # of four bits, in a key of 32
STATE = 3  # numbers kept from launch to launch: the digits so far, the mass above them, the mass wanted


@triton.jit
def _highest(logits, highs, places, size, stride, BLOCK: tl.constexpr):
    """The largest number of each block and the first place where it stands."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = clean(tl.load(logits + row * stride + at, mask=at < size, other=-float("inf")))
    high = tl.max(x, 0)
    out = row * tl.num_programs(0) + block
    tl.store(highs + out, high)
    tl.store(places + out, tl.min(tl.where(x == high, at, size), 0))


@triton.jit
def _first_of_highest(highs, places, tokens, blocks, COUNT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, COUNT)
    high = tl.load(highs + row * blocks + at, mask=at < blocks, other=-float("inf"))
    place = tl.load(places + row * blocks + at, mask=at < blocks, other=2147483647)
    best = tl.max(high, 0)
    token = tl.min(tl.where(high == best, place, 2147483647), 0)
    tl.store(tokens + row, tl.where(best > -float("inf"), token, -1).to(tl.int64))


@triton.jit
def _advance(
    state,
    sums,
    limit,
    row,
    blocks,
    step,
    FIRST: tl.constexpr,
    RANKED: tl.constexpr,
    COUNT: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """The digits so far, the mass above them, the mass wanted, and the last digit, after `step` of them were summed.

    FIRST: one was.
    """
    at, digit = tl.arange(0, COUNT), tl.arange(0, 16)
    here = sums + ((row * DIGITS + step - 1) * blocks + at[:, None]) * 16 + digit[None, :]
    mass = tl.sum(tl.load(here, mask=(at < blocks)[:, None], other=0), 0)
    total = tl.sum(mass, 0)
    if FIRST:
        wanted = tl.load(limit + row)
        if not RANKED:
            wanted = share_of(total, wanted)
        digits, above = tl.zeros_like(total), tl.zeros_like(total)
    else:
        last = state + (row * DIGITS + step - 1) * 3
        digits, above, wanted = tl.load(last), tl.load(last + 1), tl.load(last + 2)
    upto = total - tl.cumsum(mass, 0) + mass  # of this digit and those above it
    found = tl.maximum(tl.max(tl.where(above + upto >= wanted, digit, -1), 0), 0)
    above += tl.sum(tl.where(digit > found, mass, 0), 0)
    return digits * 16 + found, above, wanted, found


@triton.jit
def _sum_by_digit(
    logits,
    highs,
    temperature,
    limit,
    state,
    sums,
    size,
    stride,
    step,
    SUMMED: tl.constexpr,
    RANKED: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """Sum the weights of the tokens that agree with the `step` digits so far by their next one.

    SUMMED: how many there are so far, 2 for more.
    """
    block, row, blocks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    top = top_of(highs, row, blocks, COUNT)
    digits = tl.zeros((), tl.int64)
    if SUMMED > 0:
        digits, above, wanted, _ = _advance(state, sums, limit, row, blocks, step, SUMMED == 1, RANKED, COUNT, DIGITS)
        if block == 0:
            here = state + (row * DIGITS + step) * 3
            tl.store(here, digits)
            tl.store(here + 1, above)
            tl.store(here + 2, wanted)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = clean(tl.load(logits + row * stride + at, mask=at < size, other=-float("inf")))
    key = key_of(x)
    agrees = (key >> (4 * (DIGITS - step))) == digits
    here = sums + ((row * DIGITS + step) * blocks + block) * 16
    if tl.max(agrees.to(tl.int32), 0) > 0:
        weight = tl.full((BLOCK,), 1, tl.int64) if RANKED else weigh(x, top, tl.load(temperature + row))
        weight = tl.where(agrees & (at < size), weight, 0)
        own = ((key >> (4 * (DIGITS - step - 1))) & 15).to(tl.int32)
        # One sum after the other: in a tile of tokens by digits, every token would be weighed by many threads.
        for digit in tl.static_range(16):
            tl.store(here + digit, tl.sum(tl.where(own == digit, weight, 0), 0))
    else:
        tl.store(here + tl.arange(0, 16), tl.zeros((16,), tl.int64))


@triton.jit
def _ties(
    state, sums, limit, row, block, blocks, weight, RANKED: tl.constexpr, COUNT: tl.constexpr, DIGITS: tl.constexpr
):
    """How many of the tokens at the cutoff stay, where each has this weight, and how many stand before the block."""
    _, above, wanted, digit = _advance(state, sums, limit, row, blocks, DIGITS, False, RANKED, COUNT, DIGITS)
    at = tl.arange(0, COUNT)
    here = sums + ((row * DIGITS + DIGITS - 1) * blocks + at) * 16 + digit
    first = tl.sum(tl.load(here, mask=at < block, other=0), 0) // weight
    return (wanted - above + weight - 1) // weight, first


@triton.jit
def _stays(key, cutoff, ties, first):
    """Above the cutoff all, at it the first `ties` of the row; `first` is the rank of the block's first one there."""
    tied = key == cutoff
    rank = first + tl.cumsum(tied.to(tl.int32), 0) - 1
    return (key > cutoff) | (tied & (rank < ties))


@triton.jit
def _kept(
    logits,
    highs,
    temperature,
    cut_temperature,
    top_p,
    min_p,
    state,
    sums,
    row,
    block,
    blocks,
    size,
    stride,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """The weights that are left in a block."""
    top, t = top_of(highs, row, blocks, COUNT), tl.load(temperature + row)
    of_cut = t if cut_temperature is None else tl.load(cut_temperature + row)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = clean(tl.load(logits + row * stride + at, mask=at < size, other=-float("inf")))
    weight = weigh(x, top, of_cut)
    if CUT:
        cutoff = _advance(state, sums, top_p, row, blocks, DIGITS, False, False, COUNT, DIGITS)[0]
        at_cutoff = tl.maximum(weigh(number_of(cutoff), top, of_cut), 1)
        ties, first = _ties(state, sums, top_p, row, block, blocks, at_cutoff, False, COUNT, DIGITS)
        weight = tl.where(_stays(key_of(x), cutoff, ties, first), weight, 0)
    least = (tl.load(min_p + row) * 4398046511104.0).to(tl.int64)
    weight = tl.where(weight >= least, weight, 0)
    if cut_temperature is not None:
        weight = tl.where(weight > 0, weigh(x, top, t), 0)
    return weight


@triton.jit
def _sum_kept(
    logits,
    highs,
    temperature,
    cut_temperature,
    top_p,
    min_p,
    state,
    sums,
    masses,
    size,
    stride,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """The mass that is left in each block."""
    block, row, blocks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    settings = (logits, highs, temperature, cut_temperature, top_p, min_p, state, sums)
    kept = _kept(*settings, row, block, blocks, size, stride, CUT, BLOCK, COUNT, DIGITS)
    tl.store(masses + row * blocks + block, tl.sum(kept, 0))


@triton.jit
def _pick(
    logits,
    highs,
    temperature,
    cut_temperature,
    top_p,
    min_p,
    state,
    sums,
    masses,
    streams,
    draws,
    tokens,
    size,
    stride,
    blocks,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """The place where the mass, summed by id, passes a random share of all that is left; -1 where nothing is."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, COUNT)
    upto = tl.cumsum(tl.load(masses + row * blocks + at, mask=at < blocks, other=0), 0)
    total = tl.max(upto, 0)
    target = target_of(streams, draws, row, total)
    block = tl.minimum(tl.sum((upto <= target).to(tl.int32), 0), blocks - 1)
    settings = (logits, highs, temperature, cut_temperature, top_p, min_p, state, sums)
    kept = _kept(*settings, row, block, blocks, size, stride, CUT, BLOCK, COUNT, DIGITS)
    mass = tl.max(tl.where(at < block, upto, 0), 0) + tl.cumsum(kept, 0)
    index = block * BLOCK + tl.sum((mass <= target).to(tl.int32), 0)
    tl.store(tokens + row, tl.where(total > 0, index, -1).to(tl.int64))


class Settings(NamedTuple):
    """What decides about a draw, one number a row."""

    stream: Tensor  # [b] int64, of `uniform`
    draw: Tensor  # [b] int64
    temperature: Tensor  # [b] fp64, > 0
    top_k: Tensor  # [b] int64 >= 1, for `draw_ranked`
    top_p: Tensor | None  # [b] fp64 in (0, 1]; None: 1 in every row
    min_p: Tensor  # [b] fp64 in [0, 1]
    cut_temperature: Tensor | None  # [b] fp64, of the weights that top_p and min_p look at; None: the temperature


class Scratch:
    """The vocabulary in blocks, and what launches hand on to each other."""

    def __init__(self, logits: Tensor) -> None:
        self.rows, self.size = logits.shape
        self.blocks = triton.cdiv(self.size, BLOCK)
        self.count = triton.next_power_of_2(self.blocks)
        self.device = logits.device
        self.sizes = (self.size, logits.stride(0))
        self.highs = torch.empty(self.rows, self.blocks, dtype=torch.float32, device=self.device)
        self.places = torch.empty(self.rows, self.blocks, dtype=torch.int32, device=self.device)
        self.tokens = self.integers(self.rows)
        _highest[self.blocks, self.rows](logits, self.highs, self.places, *self.sizes, BLOCK=BLOCK, num_warps=8)

    def integers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=self.device)

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK": BLOCK, "COUNT": self.count, "DIGITS": DIGITS, "num_warps": 8}

    def cut(self, logits: Tensor, temperature: Tensor, limit: Tensor, *, ranked: bool) -> tuple[Tensor, Tensor]:
        """State and sums after the search for the logit at which the mass (the number, if ranked) reaches its limit."""
        state, sums = self.integers(self.rows, DIGITS, STATE), self.integers(self.rows, DIGITS, self.blocks, 16)
        for step in range(DIGITS):
            _sum_by_digit[self.blocks, self.rows](
                *(logits, self.highs, temperature, limit, state, sums, *self.sizes, step),
                **self.constants,
                SUMMED=min(step, 2),
                RANKED=ranked,
            )
        return state, sums


def most_likely_token(logits: Tensor) -> Tensor:
    """Int64 `[b]`, the place of the largest of logits `[b, V]`, the first of several; -1 where none is a candidate."""
    s = Scratch(logits)
    _first_of_highest[(s.rows,)](s.highs, s.places, s.tokens, s.blocks, COUNT=s.count, num_warps=4)
    return s.tokens


def draw(logits: Tensor, settings: Settings) -> Tensor:
    """Int64 `[b]`, one token of each row of logits `[b, V]`, -1 where none is left. Knows no top-k."""
    s, (stream, index, temperature, _, top_p, min_p, cut_temperature) = Scratch(logits), settings
    masses = s.integers(s.rows, s.blocks)
    state = sums = masses  # not read without a cut
    if top_p is not None:
        state, sums = s.cut(logits, temperature if cut_temperature is None else cut_temperature, top_p, ranked=False)
    given = (logits, s.highs, temperature, cut_temperature, top_p, min_p, state, sums, masses)
    cut = top_p is not None
    _sum_kept[s.blocks, s.rows](*given, *s.sizes, CUT=cut, **s.constants)
    _pick[(s.rows,)](*given, stream, index, s.tokens, *s.sizes, s.blocks, CUT=cut, **s.constants)
    return s.tokens
