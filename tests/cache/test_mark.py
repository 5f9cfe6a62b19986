"""Coming back to a place in a stream after windows have rolled past it."""

import pytest
import torch

from longburn import Attention, AttnWindow, CacheManager, RotaryEncoding
from longburn.cache import CacheMark


@pytest.fixture
def layers() -> list[Attention]:
    torch.manual_seed(0)
    windows = [AttnWindow(7), AttnWindow(), AttnWindow(5, sink_tokens=2), AttnWindow()]
    return [Attention(24, heads=4, kv_heads=2, window=w, rope=RotaryEncoding(6), sinks=True) for w in windows]


@torch.no_grad()
def stream(layers: list[Attention], cache: CacheManager, x: torch.Tensor, *, ids: torch.Tensor | None = None):
    """The stack's output for the next inputs `[B, T, 24]`."""
    step = cache.positions(x.shape[1] if ids is None else ids)
    for layer, kept in zip(layers, cache, strict=True):
        x = x + layer(x, step, cache=kept)
    cache.advance(step)
    return x


def inputs(seed: int, length: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("before", [1, 4, 7, 8, 31])
@pytest.mark.parametrize("since", [(1,), (3, 2), (40,), (1, 1, 13, 1)])
@pytest.mark.parametrize("slack", [0, 3])
def test_a_restored_stream_goes_on_as_if_nothing_had_been_since(layers, before, since, slack) -> None:
    start, more = inputs(1, before), inputs(2, 19)
    fresh = CacheManager.for_layers(layers, 1, slack=slack)
    stream(layers, fresh, start)
    wanted = stream(layers, fresh, more)

    cache = CacheManager.for_layers(layers, 1, slack=slack)
    stream(layers, cache, start)
    mark = CacheMark(cache)
    for _ in range(2):
        for i, length in enumerate(since):
            stream(layers, cache, inputs(3 + i, length))
        mark.restore()
        assert cache.position == mark.position == before
        parts = [stream(layers, cache, part) for part in more.split([1, 7, 1, 10], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=2e-6, rtol=0)
        assert cache.position == before + 19
        mark.restore()


def test_the_buffers_stay_where_they_are(layers) -> None:
    cache = CacheManager.for_layers(layers, 1)
    stream(layers, cache, inputs(1, 9))
    mark = CacheMark(cache)
    places = [tensor.data_ptr() for layer in cache for tensor in layer.memory]
    stream(layers, cache, inputs(2, 30))
    mark.restore()
    assert places == [tensor.data_ptr() for layer in cache for tensor in layer.memory]


def test_only_rings_are_copied(layers) -> None:
    cache = CacheManager.for_layers(layers, 1)
    stream(layers, cache, inputs(1, 100))
    assert CacheMark(cache).nbytes == cache[0].nbytes + cache[2].nbytes


def test_rows_with_their_own_clocks(layers) -> None:
    cache = CacheManager.for_layers(layers, 2)
    stream(layers, cache, inputs(1, 11, 2))
    mark = CacheMark(cache)
    apart = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, -1, -1, -1, -1, -1, -1, -1]])
    stream(layers, cache, inputs(2, 9, 2), ids=apart)
    ragged = CacheMark(cache)
    stream(layers, cache, inputs(3, 20, 2))
    ragged.restore()
    assert cache.row_positions == (20, 13)
    mark.restore()
    assert cache.row_positions == (11, 11)
    fresh = CacheManager.for_layers(layers, 2)
    stream(layers, fresh, inputs(1, 11, 2))
    got, wanted = (stream(layers, c, inputs(4, 12, 2)) for c in (cache, fresh))
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)


def test_a_mark_of_an_empty_cache(layers) -> None:
    cache = CacheManager.for_layers(layers, 1)
    mark = CacheMark(cache)
    wanted = stream(layers, cache, inputs(1, 12))
    mark.restore()
    assert cache.position == 0
    torch.testing.assert_close(stream(layers, cache, inputs(1, 12)), wanted)


@pytest.mark.parametrize("far", ["reset", "rewind"])
def test_a_stream_that_was_rewritten_below_the_mark_is_refused(layers, far) -> None:
    cache = CacheManager.for_layers(layers, 1, slack=6)
    stream(layers, cache, inputs(1, 10))
    mark = CacheMark(cache)
    if far == "reset":
        cache.reset()
        with pytest.raises(ValueError, match="before position 10 are no longer those of the mark"):
            mark.restore()
    else:
        cache.rewind(4)
    stream(layers, cache, inputs(2, 30))
    held = cache.position
    with pytest.raises(ValueError, match=r"CacheMark\.restore: the tokens before position 10"):
        mark.restore()
    assert cache.position == held
