"""One test for each place where a library that rolls its cache was seen to go wrong.

Every stream goes through `Attention` and a `CacheManager` and is compared with the dense oracle; whatever nothing was
written to holds NaN.
"""

from collections.abc import Iterator

import pytest
import torch
from layers import build, forward, padded, stream, tokens
from torch import Tensor

from longburn import AttnWindow, CacheManager, use_impl


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["auto", "reference"], autouse=True)
def _implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_impl(request.param):
        yield


def assert_rows(got: Tensor, *wanted: Tensor) -> None:
    for b, row in enumerate(wanted):
        torch.testing.assert_close(got[b], row, atol=1e-10, rtol=0)


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("chunks", [(8, 4, 4), (6, 5), (7, 2, 3), (8, 3, 1), (20, 9, 4)])
def test_chunk_at_the_wrap(chunks: tuple[int, ...], slack: int) -> None:
    """A peer writes a chunk into a ring as large as its context and attends after that: the chunk has overwritten keys
    that its own first queries still see, so the error grows with the chunk and is zero for one token at a time. Another
    keeps only the last W keys beside a new chunk and leaves its first query with too few."""
    one = build(AttnWindow(8))
    x = tokens(1, 33)
    assert_rows(stream(one.layer, x, one.cache(slack=slack), chunks), one.wanted(x[0]))


@pytest.mark.parametrize("chunk", [2, 4, 5, 6])
@pytest.mark.parametrize("relative", [False, True])
def test_kept_tokens_times_chunks(chunk: int, relative: bool) -> None:
    """A peer keeps the first tokens in its buffer but counts the mask's window over the compacted buffer, so from some
    chunk on the kept tokens are there and hidden; fed one token at a time it sees them."""
    one = build(AttnWindow(4, sink_tokens=2, relative_sinks=relative))
    x = tokens(1, 31)
    assert_rows(stream(one.layer, x, one.cache(), (6, chunk)), one.wanted(x[0]))


def test_kept_tokens_times_batch() -> None:
    """A peer that merges two streams into a batch forgets how many tokens each one keeps, and the next decoded tokens
    overwrite them. Here the rows have clocks of their own and keep their own first tokens."""
    one = build(AttnWindow(4, sink_tokens=2))
    rows = [tokens(9, seed=1), tokens(17, seed=2)]
    cache = one.cache(batch=2)
    x, ids = padded([rows[0][:3], rows[1][:11]], left=False)
    prompt = forward(one.layer, x, cache, ids)
    rest = stream(one.layer, torch.stack([rows[0][3:], rows[1][11:]]), cache, (1,))  # decode, 8 positions apart
    first, second = torch.cat([prompt[0, :3], rest[0]]), torch.cat([prompt[1], rest[1]])
    assert cache.row_positions == (9, 17)
    assert_rows([first, second], one.wanted(rows[0]), one.wanted(rows[1]))


@pytest.mark.parametrize("chunks", [(1,), (2, 1), (3,), (9, 4)])
@pytest.mark.parametrize("sinks", [0, 2])
def test_window_of_one(chunks: tuple[int, ...], sinks: int) -> None:
    """A peer keeps the last W - 1 keys by a slice from minus W - 1: for a window of one that is minus zero, which keeps
    everything. A window of one sees the query's own key, and kept tokens, and nothing else."""
    one = build(AttnWindow(1, sink_tokens=sinks))
    x = tokens(1, 13)
    assert_rows(stream(one.layer, x, one.cache(), chunks), one.wanted(x[0]))
    if sinks == 0:  # the softmax of one score is 1: no position matters, each token attends to itself
        flat = build(AttnWindow(1), rope=False)
        assert_rows(stream(one.layer, x, one.cache(), chunks), flat.wanted(x[0]))


@pytest.mark.parametrize("chunks", [(9,), (30,), (10, 29), (1, 25)])
@pytest.mark.parametrize("sinks", [0, 3])
def test_chunk_larger_than_the_window(chunks: tuple[int, ...], sinks: int) -> None:
    """A peer cuts the context of a chunk that is longer than its window, another lets its later rows attend too far
    back, a third makes rows that see nothing, and so NaN that never leaves the stream."""
    one = build(AttnWindow(4, sink_tokens=sinks))
    x = tokens(1, 30)
    got = stream(one.layer, x, one.cache(), chunks)
    assert got.isfinite().all()
    assert_rows(got, one.wanted(x[0]))


@pytest.mark.parametrize("sinks", [0, 2])
def test_left_padding_with_a_window(sinks: int) -> None:
    """Peers store the padding in the ring, where it takes a window's places, or number positions from the padded
    beginning, so that a batch breaks shorter rows. Padding holds NaN here, and takes neither place nor number."""
    one = build(AttnWindow(4, sink_tokens=sinks))
    rows = [tokens(19, seed=1), tokens(30, seed=2), tokens(6, seed=3)]
    for chunk in (30, 7, 3, 1):
        cache = one.cache(batch=3)
        x, ids = padded(rows, left=True)
        parts = [forward(one.layer, x[:, a : a + chunk], cache, ids[:, a : a + chunk]) for a in range(0, 30, chunk)]
        got = torch.cat(parts, 1)
        assert_rows([got[0, 11:], got[1], got[2, 24:]], *(one.wanted(row) for row in rows))
        assert (got[0, :11] == 0).all()  # the output projection of 0, without a bias
        assert cache.row_positions == (19, 30, 6)


@pytest.mark.parametrize("start", [0, 3, 8, 21])
def test_rewrite_of_the_newest_block(start: int) -> None:
    """Peers advance with every write, so a block that is denoised in several passes is appended several times. Here
    passes without a commit write the same positions again, before, at and after the wrap, and leave no trace."""
    one = build(AttnWindow(6, sink_tokens=2))
    x, block = tokens(1, start + 9), 4
    cache = one.cache(slack=block - 1)
    past = [stream(one.layer, x[:, :start], cache, (3,))] if start else []
    for draft in range(3):
        forward(one.layer, tokens(1, block, seed=10 + draft), cache, commit=False)
        assert cache.position == start
    past.append(forward(one.layer, x[:, start : start + block], cache))
    past.append(stream(one.layer, x[:, start + block :], cache, (2,)))
    assert_rows(torch.cat(past, 1), one.wanted(x[0]))


@pytest.mark.parametrize("slack", [0, 1, 4])
def test_rewind_after_the_wrap_within_the_slack(slack: int) -> None:
    """Rolled caches of peers cannot be taken back at all, or do it without a word and answer from keys that are gone.
    Here slack + 1 tokens can be taken back at any time, and what follows is as if they had never been there."""
    one = build(AttnWindow(5, sink_tokens=2))
    x, other = tokens(1, 40), tokens(1, slack + 1, seed=5)
    cache = one.cache(slack=slack)
    stream(one.layer, x[:, :23], cache, (4,))
    stream(one.layer, other, cache, (1,))
    cache.rewind(slack + 1)
    assert cache.position == 23
    rest = stream(one.layer, x[:, 23:], cache, (3, 1))
    assert_rows(rest, one.wanted(x[0])[23:])


def test_rewind_beyond_the_slack_is_refused_and_changes_nothing() -> None:
    """A peer's trim beyond what a rolled cache holds is a silent no-op, and the text goes on from the wrong place."""
    one = build(AttnWindow(5, sink_tokens=2))
    x = tokens(1, 40)
    cache = one.cache(slack=3)
    stream(one.layer, x[:, :23], cache, (4,))
    before = cache[0].positions.clone()
    with pytest.raises(
        ValueError, match=r"rewind: row 0 back to position 18, .*window 5, slack 3\) can go back to 19 only"
    ):
        cache.rewind(5)
    assert cache.position == 23
    assert torch.equal(cache[0].positions, before)
    assert_rows(stream(one.layer, x[:, 23:], cache, (2,)), one.wanted(x[0])[23:])


def test_reset_of_one_row_while_the_others_run_on() -> None:
    """A peer that reuses a row of its cache for the next user answered from the last user's conversation."""
    one = build(AttnWindow(4, sink_tokens=2))
    first, second = tokens(24, seed=1), tokens(11, seed=2)
    cache = one.cache(batch=2)
    both = torch.stack([first[:13], tokens(13, seed=3)])
    got = [stream(one.layer, both, cache, (5,))[0]]
    cache.reset([1])
    rest = stream(one.layer, torch.stack([first[13:], second]), cache, (3,))
    assert cache.row_positions == (24, 11)
    assert_rows([torch.cat([*got, rest[0]]), rest[1]], one.wanted(first), one.wanted(second))


@pytest.mark.parametrize("relative", [False, True])
def test_a_row_of_a_ragged_batch_equals_the_row_alone(relative: bool) -> None:
    """Peers share one clock or one mask among rows of different lengths. Bits may differ with the shape of the call,
    the numbers must not: 1e-12 in fp64, against the same row in a batch of its own."""
    one = build(AttnWindow(6, sink_tokens=2, relative_sinks=relative), sinks=True)
    rows = [tokens(n, seed=n) for n in (26, 3, 14)]
    cache = one.cache(batch=3)
    x, ids = padded(rows, left=False)
    got = torch.cat([forward(one.layer, x[:, a : a + 5], cache, ids[:, a : a + 5]) for a in range(0, 26, 5)], 1)
    for b, row in enumerate(rows):
        alone = stream(one.layer, row[None], one.cache(), (5,))[0]
        torch.testing.assert_close(got[b, : len(row)], alone, atol=1e-12, rtol=0)
        torch.testing.assert_close(alone, one.wanted(row), atol=1e-10, rtol=0)


def test_blocks_that_see_all_of_themselves() -> None:
    """A streaming forward without a mask inside a chunk lets text see the future; block-wise video wants precisely
    that. It is a stated argument, and the block's size is not the chunk's."""
    one = build(AttnWindow(10, block=3))
    x = tokens(1, 27)
    wanted = one.wanted(x[0])
    for chunks in ((3,), (6, 3), (9, 12, 6)):  # whole blocks
        assert_rows(stream(one.layer, x, one.cache(), chunks), wanted)
    with torch.no_grad():
        assert_rows(one.layer(x), wanted)
    causal = build(AttnWindow(10))
    assert (causal.wanted(x[0])[:-1] - wanted[:-1]).abs().amax(1).min() < 1e-12  # a block's last token sees the same
    assert (causal.wanted(x[0])[::3] - wanted[::3]).abs().amax(1).min() > 1e-3


def test_the_cache_is_fed_by_the_clock_that_it_belongs_to() -> None:
    """A fixed cache that is full says so; it never wraps in silence."""
    one = build()
    x = tokens(1, 12)
    cache: CacheManager = one.cache(max_length=10)
    got = stream(one.layer, x[:, :10], cache, (4,))
    with pytest.raises(ValueError, match="1 tokens from position 10 of row 0 pass max_length 10"):
        forward(one.layer, x[:, 10:11], cache)
    assert_rows(got, one.wanted(x[0, :10]))
