"""Caches in fp8: what is kept, what is read, and that the chunks of a stream change nothing."""

import copy

import pytest
import torch
from torch import Tensor

from longburn import Attention, AttnWindow, CacheManager, RotaryEncoding
from longburn.cache import CacheMark, RollingKVCache, Step

WINDOWS = [AttnWindow(), AttnWindow(7), AttnWindow(7, sink_tokens=3), AttnWindow(7, sink_tokens=3, relative_sinks=True)]


def layer(window: AttnWindow) -> Attention:
    torch.manual_seed(3)
    return Attention(40, 6, kv_heads=2, head_dim=16, window=window, rope=RotaryEncoding(16), sinks=True).eval()


def stream(attention: Attention, x: Tensor, cuts: list[int], **options: int) -> Tensor:
    cache = CacheManager.for_layers([attention], x.shape[0], packed=True, **options)
    parts = []
    with torch.no_grad():
        for part in x.split(cuts, 1):
            step = cache.positions(part.shape[1])
            parts.append(attention.forward(part, step, cache=cache[0]))
            cache.advance(step)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("options", [{}, {"slack": 5}, {"max_length": 64}], ids=str)
def test_chunks_change_nothing(window: AttnWindow, options: dict[str, int]) -> None:
    attention = layer(window)
    x = torch.randn(2, 43, 40)
    wanted = stream(attention, x, [1] * 43, **options)
    for cut in (2, 5, 7, 8, 43):
        cuts = [*([cut] * (43 // cut)), *([43 % cut] if 43 % cut else [])]
        torch.testing.assert_close(stream(attention, x, cuts, **options), wanted, atol=1e-5, rtol=1e-5)
    exact = attention.forward(x)
    error = (wanted - exact).abs().max() / exact.abs().max()
    assert 1e-4 < error < 0.1  # three bits of mantissa, and no more lost than these


def test_bytes_and_kept_sink_tokens() -> None:
    B, K, D, window, sinks = 2, 3, 16, 5, 2
    cache = RollingKVCache(B, K, D, window=AttnWindow(window, sink_tokens=sinks), dtype=torch.bfloat16, packed=True)
    ring, apart = window + 1, sinks + 1
    assert cache.nbytes == 2 * B * K * (ring * (D + 4) + apart * D * 2) + 8 * (sinks + window + 1)
    k, v = (torch.randn(B, K, 30, D, dtype=torch.bfloat16) for _ in range(2))
    held = cache.update(k[:, :, :29], v[:, :, :29], torch.arange(29)[None])
    held = cache.update(k[:, :, 29:], v[:, :, 29:], torch.tensor([[29]]))
    assert held.before is not None
    assert held.scales is not None
    assert torch.equal(held.before[0], k[:, :, :sinks])
    assert torch.equal(held.before[1], v[:, :, :sinks])
    at = held.pos[0, sinks:]
    assert sorted(at.tolist()) == [25, 26, 27, 28, 29]
    read = held.k.float() * held.scales[0][..., None]
    wanted = k[:, :, at].float()
    # Half a step of a three-bit mantissa, relative to the number, or to the smallest normal one (2^-6 of the scale).
    bound = wanted.abs().clamp_min(held.scales[0][..., None] * 2**-6) / 16
    assert ((read - wanted).abs() <= bound * 1.001).all()
    assert ((read - wanted).abs() > 0).any()


def test_zeros_are_kept_as_zeros() -> None:
    cache = RollingKVCache(1, 1, 16, packed=True)
    zero = torch.zeros(1, 1, 2, 16)
    held = cache.update(zero, zero, torch.arange(2)[None])
    assert held.scales is not None
    assert (held.k.float() * held.scales[0][..., None]).eq(0).all()


def test_growing_rewinding_and_marks() -> None:
    attention = layer(AttnWindow())
    x = torch.randn(1, 600, 40)
    wanted = stream(attention, x, [600])
    cache = CacheManager.for_layers([attention], 1, packed=True)
    with torch.no_grad():

        def run(start: int, stop: int) -> Tensor:
            step = cache.positions(stop - start)
            out = attention.forward(x[:, start:stop], step, cache=cache[0])
            cache.advance(step)
            return out

        run(0, 250)
        mark = CacheMark(cache)
        run(250, 600)
        cache.rewind(100)
        torch.testing.assert_close(run(500, 600), wanted[:, 500:], atol=1e-5, rtol=1e-5)
        mark.restore()
        torch.testing.assert_close(run(250, 600), wanted[:, 250:], atol=1e-5, rtol=1e-5)


def test_a_mark_brings_a_packed_ring_back() -> None:
    attention = layer(WINDOWS[3])
    x = torch.randn(1, 50, 40)
    cache = CacheManager.for_layers([attention], 1, packed=True)
    with torch.no_grad():
        for t in range(20):
            step = cache.positions(1)
            attention.forward(x[:, t : t + 1], step, cache=cache[0])
            cache.advance(step)
        mark, before = CacheMark(cache), copy.deepcopy(cache)
        for again in (cache, before):
            step = again.positions(30)
            result = attention.forward(x[:, 20:], step, cache=again[0])
            again.advance(step)
        mark.restore()
        torch.testing.assert_close(attention.forward(x[:, 20:], cache.positions(30), cache=cache[0]), result)


def test_unknown_positions() -> None:
    """Rows that the host cannot follow: the chunk passes the window with old keys beside it."""
    torch.manual_seed(0)
    window = AttnWindow(4, sink_tokens=2)
    cache = RollingKVCache(2, 1, 16, window=window, packed=True)
    k = torch.randn(2, 1, 40, 16)
    for start, stop in ((0, 20), (20, 31)):
        pos = torch.arange(start, stop).expand(2, -1).clone()
        held = cache.update(k[:, :, start:stop], k[:, :, start:stop], Step.of(pos, read=False))
    assert held.before is not None
    assert held.pos.shape == (2, 6 + 11)
    old = held.pos[0, :6]
    assert sorted(old.tolist()) == [0, 1, 16, 17, 18, 19]
    torch.testing.assert_close(held.before[0][:, :, :2], k[:, :, :2])
    torch.testing.assert_close(held.before[0], k[:, :, old], atol=0.2, rtol=0.07)
