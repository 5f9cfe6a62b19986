"""What is recorded of a policy: against its formula in plain loops, over rings, chunks, batches and both directions."""

import math
from contextlib import suppress

import pytest
import torch

from longburn.attention import Attention
from longburn.bias import Alibi, DenseBias, alibi_slopes
from longburn.bias.picture import BiasPicture, BiasRow, record_bias
from longburn.cache import AttnWindow, CacheManager

HEADS, TOKENS, WINDOW, SINKS = 3, 31, 7, 2


def layer(window: AttnWindow) -> Attention:
    torch.manual_seed(0)
    return Attention(24, HEADS, head_dim=8, window=window)


def expected(position: int, last: int, window: AttnWindow) -> dict[int, list[float]]:
    """ALiBi for every key that the law shows to this query, by a loop over all positions."""
    slopes = alibi_slopes(HEADS).tolist()
    found = {}
    for key in range(last + 1):
        if window.lookahead is not None and key > position + window.lookahead:
            continue
        if window.size is not None and position - key >= window.size and key >= window.sink_tokens:
            continue
        found[key] = [-slope * abs(position - key) for slope in slopes]
    return found


def check(row: BiasRow, last: int, window: AttnWindow) -> None:
    wanted = expected(row.position, last, window)
    assert row.keys.tolist() == sorted(wanted)
    torch.testing.assert_close(row.bias.T, torch.tensor([wanted[key] for key in sorted(wanted)]))


@pytest.mark.parametrize("chunks", [[1] * TOKENS, [5, 1, 20, 3, 2], [TOKENS]])
@pytest.mark.parametrize("slack", [0, 3])
def test_a_stream_over_a_ring(chunks: list[int], slack: int) -> None:
    window = AttnWindow(WINDOW, sink_tokens=SINKS)
    attention, policy = layer(window), Alibi(HEADS)
    cache = CacheManager.for_layers([attention], 1, slack=slack)
    with torch.no_grad(), record_bias(policy) as rows:
        for size in chunks:
            step = cache.positions(size)
            attention(torch.randn(1, size, 24), step, cache=cache[0], bias=policy)
            cache.advance(step)
    assert [row.position for row in rows] == list(range(TOKENS))
    for row in rows:
        check(row, row.position, window)


@pytest.mark.parametrize("window", [AttnWindow(), AttnWindow(5), AttnWindow.two_sided(4, 3), AttnWindow.two_sided()])
def test_a_whole_pass_both_ways(window: AttnWindow) -> None:
    attention, policy = layer(window), Alibi(HEADS)
    with record_bias(policy, positions=range(4, TOKENS, 9), row=1) as rows:
        attention(torch.randn(2, TOKENS, 24), bias=policy)
    assert [row.position for row in rows] == [4, 13, 22]
    for row in rows:
        check(row, TOKENS - 1, window)
        assert row.bias.requires_grad is False


def test_rows_of_a_batch_are_told_apart() -> None:
    """A bias of each row's own, tokens that are missing, and heads that share one number."""
    values = torch.randn(2, 1, 5, 5)
    positions = torch.tensor([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]])
    policy = DenseBias(values)
    with record_bias(policy, row=1) as rows:
        layer(AttnWindow())(torch.randn(2, 5, 24), positions, bias=policy)
    assert [row.position for row in rows] == [0, 1, 2]
    for t, row in enumerate(rows):
        assert row.keys.tolist() == list(range(t + 1))
        torch.testing.assert_close(row.bias, values[1, :, t + 2, : t + 1].expand(HEADS, -1))


def watch(policy: Alibi, attention: Attention, x: torch.Tensor, plain: torch.Tensor) -> list[BiasRow]:
    """Records one call, and fails while it does."""
    with suppress(ZeroDivisionError), record_bias(policy) as rows:
        assert torch.equal(attention(x, bias=policy), plain)
        raise ZeroDivisionError
    return rows


def test_the_policy_is_left_as_it_was() -> None:
    policy = Alibi(HEADS)
    x = torch.randn(1, 6, 24)
    attention = layer(AttnWindow())
    plain = attention(x, bias=policy)
    rows = watch(policy, attention, x, plain)
    attention(x, bias=policy)
    assert len(rows) == 6
    assert "terms" not in vars(policy)


def test_a_dictionary_of_plain_numbers() -> None:
    rows = (BiasRow(1, torch.tensor([0, 1]), torch.tensor([[-1 / 3, 0.0], [12345.678, math.pi * 1e-7]])),)
    picture = BiasPicture("a title", ("a note",), rows, sink_tokens=1, labels=("x", "y"))
    assert (picture.heads, picture.numbers) == (2, 6)
    assert picture.as_dict() == {
        "title": "a title",
        "notes": ["a note"],
        "sink_tokens": 1,
        "labels": ["x", "y"],
        "rows": [{"position": 1, "keys": [0, 1], "bias": [[-0.3333, 0.0], [12350.0, 3.142e-7]]}],
    }
