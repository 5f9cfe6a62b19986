"""A stream may run for ever: positions beyond ten million keep full accuracy."""

import math
from fractions import Fraction

import pytest
import torch
from layers import THETA, M, build, tokens
from torch import Tensor

from longburn import Alibi, Attention, AttnWindow, RollingKVCache, RotaryEncoding, use_impl

FAR = 10_000_000


def run(layer: Attention, x: Tensor, start: int, *, chunk: int, bias: Alibi | None = None) -> Tensor:
    """The stream through a cache of its own, at positions that the caller chooses."""
    cache = RollingKVCache(1, layer.kv_heads, layer.head_dim, window=layer.window, dtype=layer.dtype)
    parts = []
    with torch.no_grad():
        for a in range(0, x.shape[1], chunk):
            part = x[:, a : a + chunk]
            positions = torch.arange(start + a, start + a + part.shape[1])[None]
            parts.append(layer(part, positions, cache=cache, bias=bias))
    return torch.cat(parts, 1)


def layers(window: AttnWindow) -> tuple[Attention, Attention]:
    """The same layer of ordinary scale in fp64 and in fp32."""
    torch.manual_seed(0)
    made = [
        Attention(64, 4, kv_heads=2, window=window, rope=RotaryEncoding(16), dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    ]
    made[0].load_state_dict(made[1].state_dict())
    return made[0], made[1]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_a_far_stream_equals_the_one_at_zero(chunk: int, impl: str) -> None:
    """RoPE sees differences only, and the angles of int64 positions are computed in fp64."""
    layer, _ = layers(AttnWindow(9))
    x = torch.randn(1, 37, 64, dtype=torch.float64)
    with use_impl(impl):
        torch.testing.assert_close(run(layer, x, FAR, chunk=chunk), run(layer, x, 0, chunk=chunk), atol=1e-9, rtol=0)


@pytest.mark.parametrize("chunk", [1, 16])
def test_and_in_fp32_within_its_rounding(chunk: int) -> None:
    """In fp32, positions beyond 2^24 are not even distinct; the error must be that of fp32 at position 0."""
    exact, layer = layers(AttnWindow(24))
    x = torch.randn(1, 80, 64)
    truth = run(exact, x.double(), 0, chunk=chunk)
    near, far = ((run(layer, x, start, chunk=chunk).double() - truth).abs().max() for start in (0, 2**24 + 3))
    assert near < 2e-6
    assert far < 2 * near + 1e-7


def test_relative_sinks_stay_at_their_distance() -> None:
    """Kept tokens at 0 .. 3 and a window ten million positions later: cache-relative positions make it the same as a
    window right behind them, as soon as that is full. (The oracle's weights make scores of some tens, hence 1e-7.)"""
    window = AttnWindow(8, sink_tokens=4, relative_sinks=True)
    one = build(window, sinks=True)
    x = tokens(1, 30)
    wanted = one.wanted(x[0])
    cache = RollingKVCache(1, 2, 6, window=window, dtype=torch.float64)
    with torch.no_grad():
        one.layer(x[:, :4], torch.arange(4)[None], cache=cache)
        got = one.layer(x[:, 4:], torch.arange(FAR, FAR + 26)[None], cache=cache)
    torch.testing.assert_close(got[0, 8:], wanted[12:], atol=1e-7, rtol=0)
    absolute = build(AttnWindow(8, sink_tokens=4), sinks=True)
    assert (absolute.wanted(x[0]) - wanted)[12:].abs().max() > 1e-3  # the clamp does something


def test_alibi_takes_the_distance_in_integers() -> None:
    layer = Attention(M, 4, window=AttnWindow(9), head_dim=6, dtype=torch.float64)
    x, bias = tokens(1, 30), Alibi(4)
    near, far = (run(layer, x, start, chunk=7, bias=bias) for start in (0, FAR))
    torch.testing.assert_close(near, far, atol=1e-13, rtol=0)


def test_the_angle_table_itself() -> None:
    """Against exact arithmetic: the phase is reduced modulo 2 pi in fractions."""
    rope = RotaryEncoding(8, theta=THETA)
    pi = Fraction("3.14159265358979323846264338327950288419716939937510582097494459")
    p = FAR + 7
    angles = rope.angles(torch.tensor([[p]]), torch.float64)
    for pair in range(4):
        phase = Fraction(float(rope.inv_freq[pair])) * p
        rest = phase - 2 * pi * (phase // (2 * pi))
        assert float(angles.cos[..., pair]) == pytest.approx(math.cos(rest), abs=2e-9)
