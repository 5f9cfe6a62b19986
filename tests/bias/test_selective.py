"""Selective attention: the paper's formula in loops; what queries add stays with the keys, also in a ring."""

import numpy as np
import pytest
import torch
from bias_streams import CHUNKS, WINDOWS, D, H, K, Row, largest_difference, layer, poison, streamed, tokens, wanted
from torch import Tensor

from longburn import Alibi, Attention, AttnWindow, CacheManager, attend
from longburn.attention import core
from longburn.bias import BiasContext, Cope, Dape, Policy, SelectiveBias
from longburn.cache import CacheMark

double = torch.float64


def paper(row: Row) -> np.ndarray:
    """Head 0's positive scores of all earlier queries, but not of the key's own; the first token is never masked."""

    def one(h: int, p: int, j: int) -> float:
        if j == 0:
            return 0.0
        return -sum(max(0.0, row.scores[0, l, j]) for l in range(p) if l != j and j in row.seen[l])  # noqa: E741

    return row.fill(one)


def selective(window: AttnWindow, *, sinks: bool = False) -> Attention:
    return layer(window, sinks=sinks, bias=SelectiveBias())


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [*WINDOWS, AttnWindow(4, sink_tokens=9)], ids=str)
def test_streams_equal_the_formula_in_loops(window: AttnWindow, sinks: bool) -> None:
    assert largest_difference(selective(window, sinks=sinks), None, paper) < 1e-11


def test_it_matters() -> None:
    made, x = selective(AttnWindow(7)), tokens(30)
    with torch.no_grad():
        assert (made(x[None])[0] - layer(AttnWindow(7))(x[None])[0]).abs().max() > 0.1


def forward(made: Attention, cache: CacheManager, x: Tensor, *, commit: bool = True) -> Tensor:
    step = cache.positions(x.shape[1])
    with torch.no_grad():
        y = made(x, step, cache=cache[0])
    if commit:
        cache.advance(step)
    poison(cache)
    return y


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_passes_that_are_not_committed_leave_no_trace(window: AttnWindow, chunks: tuple[int, ...]) -> None:
    """Two drafts of every chunk, of other tokens and another length, before the one that counts."""
    made, x = selective(window), tokens(30)
    cache = CacheManager.for_layers([made], 1, slack=max(chunks))
    poison(cache)
    parts, at, turn = [], 0, 0
    while at < 30:
        chunk = x[None, at : at + chunks[turn % len(chunks)]]
        forward(made, cache, 3 * chunk.flip(2), commit=False)
        forward(made, cache, chunk[:, :1] - 1, commit=False)
        parts.append(forward(made, cache, chunk))
        at, turn = at + chunk.shape[1], turn + 1
    assert (torch.cat(parts, 1)[0] - wanted(made, x, paper)).abs().max() < 1e-11


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_last_call_may_be_taken_back(window: AttnWindow) -> None:
    made, x = selective(window), tokens(30)
    cache = CacheManager.for_layers([made], 1, slack=6)
    forward(made, cache, x[None, :17])
    for at in (17, 22):
        forward(made, cache, -x[None, at : at + 5])
        cache.rewind(5)
        poison(cache)
        found = forward(made, cache, x[None, at : at + 5])
        assert (found[0] - wanted(made, x, paper)[at : at + 5]).abs().max() < 1e-11


@pytest.mark.parametrize("window", [AttnWindow(), AttnWindow(7, sink_tokens=2)], ids=str)
def test_part_of_a_call_cannot_be_taken_back(window: AttnWindow) -> None:
    """It says so before anything changes, and the rest of the call taken back makes it right again."""
    made, x = selective(window), tokens(30)
    cache = CacheManager.for_layers([made], 2, slack=6)
    both = x[None].repeat(2, 1, 1)
    forward(made, cache, both[:, :12])
    forward(made, cache, both[:, 12:17])
    cache.rewind([0, 2])
    before = [tensor.clone() for tensor in cache[0].memory]
    step = cache.positions(torch.tensor([[0], [0]]))
    with pytest.raises(
        ValueError, match=r"neither began nor ended: row 1 at position 15; .* rewind the whole last call"
    ):
        made(both[:, 15:16], step, cache=cache[0])
    for tensor, copy in zip(cache[0].memory, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())
    cache.rewind([5, 3])
    found = forward(made, cache, both[:, 12:18])
    assert (found - wanted(made, x, paper)[12:18]).abs().max() < 1e-11
    # Two calls back is too far, and so is a position from long ago.
    forward(made, cache, both[:, 18:19])
    forward(made, cache, both[:, 19:20])
    cache.rewind(2)
    with pytest.raises(ValueError, match="row 0 at position 18"):
        forward(made, cache, both[:, 18:19])


def test_a_row_that_begins_anew_knows_nothing_of_the_last() -> None:
    made, x, y = selective(AttnWindow(7, sink_tokens=2)), tokens(20), tokens(20, seed=9)
    cache = CacheManager.for_layers([made], 2)
    forward(made, cache, torch.stack([x, y])[:, :14])
    cache.reset([0])
    ids = torch.zeros(2, 6, dtype=torch.int64)
    with torch.no_grad():
        step = cache.positions(ids)
        found = made(torch.stack([x[:6], y[14:]]), step, cache=cache[0])
    assert (found[0] - wanted(made, x, paper)[:6]).abs().max() < 1e-11
    assert (found[1] - wanted(made, y, paper)[14:]).abs().max() < 1e-11


def test_a_mark_in_a_ring_brings_the_numbers_back() -> None:
    made, x = selective(AttnWindow(7)), tokens(30)
    cache = CacheManager.for_layers([made], 1, slack=2)
    forward(made, cache, x[None, :13])
    mark = CacheMark(cache)
    for _ in range(3):
        forward(made, cache, -x[None, 13:20])
    mark.restore()
    found = forward(made, cache, x[None, 13:30])
    assert (found[0] - wanted(made, x, paper)[13:]).abs().max() < 1e-11


@pytest.mark.parametrize("window", [AttnWindow(), AttnWindow(7, sink_tokens=2)], ids=str)
def test_many_queries_in_blocks(window: AttnWindow, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block takes over what the one before it added; a stream may still go back to where the call began."""
    made, x = selective(window), tokens(30)
    rows = [x, tokens(11, seed=2), tokens(19, seed=3)]
    truth = [wanted(made, row, paper) for row in rows]
    monkeypatch.setattr(core, "ROWS", 3 * 3 * H * 30)
    with torch.no_grad():
        assert (made(x[None])[0] - truth[0]).abs().max() < 1e-11
    for left in (True, False):
        for found, right in zip(streamed(made, None, rows, (13, 9), left=left), truth, strict=True):
            assert (found - right).abs().max() < 1e-11
    cache = CacheManager.for_layers([made], 1, slack=20)
    forward(made, cache, x[None, :9])
    forward(made, cache, -x[None, 9:29], commit=False)
    assert (forward(made, cache, x[None, 9:29])[0] - truth[0][9:29]).abs().max() < 1e-11
    assert (forward(made, cache, x[None, 29:])[0] - truth[0][29:]).abs().max() < 1e-11


@pytest.mark.parametrize("window", [AttnWindow(), AttnWindow(3, sink_tokens=1)], ids=str)
def test_gradients_go_through_what_was_masked(window: AttnWindow) -> None:
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, n, 7, D, generator=g, dtype=double, requires_grad=True) for n in (H, K, K))
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(q, k, v, bias=SelectiveBias(), window=window), (q, k, v), fast_mode=True
    )

    # Another head's output depends on head 0's queries through the bias alone.
    out = attend(q, k, v, bias=SelectiveBias(), window=window)
    (gradient,) = torch.autograd.grad(out[:, 3].square().sum(), q)
    assert (gradient[:, 0] != 0).any()
    assert (gradient[:, 1] == 0).all()


def test_training_writes_blocks_with_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = selective(AttnWindow(7, sink_tokens=2)), tokens(1, 30).requires_grad_()
    (whole,) = torch.autograd.grad(made(x).square().sum(), x)
    monkeypatch.setattr(core, "ROWS", 4 * H * 30)
    (blocks,) = torch.autograd.grad(made(x).square().sum(), x)
    assert (whole - blocks).abs().max() < 1e-10


def test_a_single_precision_stream_of_rounded_keys() -> None:
    """Keys in fp8: the scores that mask are those that attend, however the stream is cut."""
    made, x = selective(AttnWindow(7, sink_tokens=2)).float(), tokens(1, 60).float()
    found = []
    for size in (1, 4, 60):
        cache = CacheManager.for_layers([made], 1, packed=True)
        found.append(torch.cat([forward(made, cache, part) for part in x.split(size, 1)], 1))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-5, rtol=1e-4)


def test_positions_beyond_what_single_precision_counts() -> None:
    """Marks of far positions differ from one to the next."""
    policy, far = SelectiveBias(), 2**24
    for first in (far - 2, far - 1, far, far + 1, 10**10 + 1):
        positions = torch.tensor([[first]])
        new = policy.of_tokens(torch.zeros(1, 1, 3), *[torch.zeros(1, 1, 1, 1)] * 2, positions, torch.zeros(1, 4))
        context = BiasContext(*(positions, positions, torch.ones(1, H, 1, D), 1.0), k=torch.ones(1, K, 1, D), extra=new)
        kept = policy.renewed(context, context)[..., 0]
        policy.of_tokens(torch.zeros(1, 1, 3), *[torch.zeros(1, 1, 1, 1)] * 2, positions + 1, kept)
        for wrong in (first - 1, first + 2):
            with pytest.raises(ValueError, match="neither began nor ended"):
                policy.of_tokens(torch.zeros(1, 1, 3), *[torch.zeros(1, 1, 1, 1)] * 2, torch.tensor([[wrong]]), kept)


def test_what_it_costs_and_says() -> None:
    """One number a key for one query; rows of one head for more; four numbers a token in the cache."""
    policy = SelectiveBias()
    q, k = torch.randn(2, H, 5, D), torch.randn(2, K, 9, D)
    asked = BiasContext(torch.arange(4, 9)[None], torch.arange(9)[None], q, 1.0, k=k)
    assert policy.terms(asked).dense.shape == (2, 1, 5, 9)
    assert policy.terms(asked.queries(0, 1)).key.shape == (2, 1, 9)
    made = selective(AttnWindow(7))
    plain, kept = (CacheManager.for_layers([one], 3)[0].nbytes for one in (layer(AttnWindow(7)), made))
    assert kept - plain == 3 * 4 * 8 * 8


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="SelectiveBias: lookahead 2, block 1"):
        selective(AttnWindow(lookahead=2))(tokens(1, 3))
    with pytest.raises(ValueError, match=r"SelectiveBias needs more of a layer than one call; give it to Attention"):
        layer(AttnWindow())(tokens(1, 3), bias=SelectiveBias())


@pytest.mark.parametrize("policy", [SelectiveBias(), Cope(D, 4), Dape(Alibi(H), H)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("queries", [1, 3])
def test_what_empty_slots_hold_is_never_looked_at(policy: Policy, queries: int) -> None:
    """The bias is a number there, too: a kernel need not know which of them it may touch."""
    k_pos = torch.tensor([[4, -1, 2, 3, -1, 5]])
    empty = k_pos[0] < 0
    k, extra = torch.randn(1, K, 6, D), torch.zeros(1, 4, 6)
    k[:, :, empty] = extra[:, :, empty] = float("nan")
    asked = BiasContext(torch.arange(6 - queries, 6)[None], k_pos, torch.randn(1, H, queries, D), 0.5, k=k, extra=extra)
    assert all(term.isfinite().all() for term in policy.terms(asked) if isinstance(term, Tensor))
