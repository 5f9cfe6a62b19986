"""The lyric encoder: the original's outputs, its formulas in fp64, and one token at a time with bounded state."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from v1_peers import Drawn, golden, lyric_states, official, redrawn

from longburn import AttnWindow
from longburn.models.ace_step.v1 import LyricEncoder, LyricEncoderConfig, lyric_rules
from longburn.weights import load_checkpoint

NAN = float("nan")
CAUSAL = AttnWindow()
TINY = LyricEncoderConfig(input_size=12, output_size=40, attention_heads=4, linear_units=48, num_blocks=2)


def golden_encoder(case: str, window: AttnWindow) -> tuple[LyricEncoder, dict[str, Tensor]]:
    said, tensors = golden(case)
    config = LyricEncoderConfig(**{name: said[name] for name in LyricEncoderConfig.__dataclass_fields__})
    encoder = LyricEncoder(config, window=window)
    load_checkpoint(encoder, Drawn(said["parameters"]), lyric_rules(config))
    return encoder.eval(), tensors


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., tuple[LyricEncoder, dict[str, Tensor]]]:
    """An encoder in fp64 with random weights, and these under their official names."""

    def make(**window: AttnWindow) -> tuple[LyricEncoder, dict[str, Tensor]]:
        encoder = LyricEncoder(TINY, **window, dtype=torch.float64).eval().requires_grad_(False)
        redrawn(encoder)
        return encoder, official(encoder, tmp_path)

    return make


def embeddings(B: int, T: int) -> Tensor:
    return torch.randn(B, T, TINY.input_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def streamed(encoder: LyricEncoder, x: Tensor, chunks: list[int], cache=None) -> Tensor:
    cache = encoder.init_cache(x.shape[0]) if cache is None else cache
    with torch.no_grad():
        return torch.cat([encoder(part, cache=cache) for part in x.split(chunks, 1)], 1)


# --- the original ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_golden(causal: bool) -> None:
    case, window = ("causal", {"window": CAUSAL}) if causal else ("bidirectional", {})
    encoder, tensors = golden_encoder(f"lyric_encoder_{case}", window.get("window", AttnWindow(lookahead=None)))
    assert tensors["y"].std() > 0.9
    with torch.no_grad():
        assert (encoder(tensors["x"]) - tensors["y"]).abs().max() <= 1e-5


def test_as_shipped_it_sees_both_ways() -> None:
    assert LyricEncoder(TINY).attentions[0].window == AttnWindow(lookahead=None)


@pytest.mark.parametrize("chunks", [[1] * 37, [2] * 18 + [1], [7, 1, 20, 9], [37]])
def test_golden_streamed(chunks: list[int]) -> None:
    encoder, tensors = golden_encoder("lyric_encoder_causal", CAUSAL)
    assert (streamed(encoder, tensors["x"], chunks) - tensors["y"]).abs().max() <= 1e-5


def test_the_peer_is_the_original() -> None:
    """What the tests below trust."""
    for case in ("bidirectional", "causal"):
        said, tensors = golden(f"lyric_encoder_{case}")
        weights = Drawn(said["parameters"]).weights()
        got = lyric_states(weights, tensors["x"].double(), said["attention_heads"], causal=case == "causal")
        assert (got - tensors["y"]).abs().max() <= 1e-5


# --- bounded state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[1] * 31, [5, 1, 7, 11, 7], [8] * 3 + [7], [31]])
@pytest.mark.parametrize(("size", "sink_tokens"), [(1, 0), (8, 0), (8, 2), (40, 0)])
def test_windowed_stream(tiny, chunks: list[int], size: int, sink_tokens: int) -> None:
    encoder, weights = tiny(window=AttnWindow(size, sink_tokens=sink_tokens))
    x = embeddings(2, 31)
    wanted = lyric_states(weights, x, 4, causal=True, window=size, sink_tokens=sink_tokens)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), wanted, atol=1e-9, rtol=0)
    cache = encoder.init_cache(2)
    torch.testing.assert_close(streamed(encoder, x, chunks, cache), wanted, atol=1e-9, rtol=0)
    assert [layer.slots for layer in cache] == [size + sink_tokens] * 2


def test_state_does_not_grow(tiny) -> None:
    encoder, _ = tiny(window=AttnWindow(6))
    cache = encoder.init_cache(1)
    streamed(encoder, embeddings(1, 7), [7], cache)
    before = cache.nbytes
    streamed(encoder, embeddings(1, 200), [1] * 200, cache)
    assert cache.nbytes == before


def test_what_is_not_committed_is_written_again(tiny) -> None:
    encoder, weights = tiny(window=CAUSAL)
    x, cache = embeddings(1, 9), encoder.init_cache(1)
    with torch.no_grad():
        encoder(x[:, :4], cache=cache)
        encoder(torch.full_like(x[:, :3], 7.0), cache=cache, commit=False)
        last = encoder(x[:, 4:], cache=cache)
    torch.testing.assert_close(last, lyric_states(weights, x, 4, causal=True)[:, 4:], atol=1e-9, rtol=0)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_padding_may_be_anything(tiny, causal: bool) -> None:
    encoder, weights = tiny(**({"window": CAUSAL} if causal else {}))
    x, mask = embeddings(3, 13), torch.ones(3, 13, dtype=torch.bool)
    mask[1, 5:] = mask[2, 1:] = False
    with torch.no_grad():
        got = encoder(x.masked_fill(~mask[..., None], NAN), mask)
        alone = encoder(x[1:2, :5])
    wanted = lyric_states(weights, x, 4, mask=mask, causal=causal)
    torch.testing.assert_close(got[mask], wanted[mask], atol=1e-9, rtol=0)
    torch.testing.assert_close(got[1:2, :5], alone, atol=1e-9, rtol=0)


def test_ragged_stream(tiny) -> None:
    """Rows whose tokens come in at different speeds, padded on either side."""
    encoder, weights = tiny(window=AttnWindow(5))
    x = embeddings(2, 12)
    wanted = lyric_states(weights, x, 4, causal=True, window=5)
    cache, at = encoder.init_cache(2), [0, 0]
    got: list[list[Tensor]] = [[], []]
    for counts, left in (((3, 1), True), ((1, 4), False), ((6, 0), False), ((2, 7), True)):
        part, mask = torch.full((2, 7, TINY.input_size), NAN, dtype=torch.float64), torch.zeros(2, 7, dtype=torch.bool)
        for row, n in enumerate(counts):
            columns = slice(7 - n, 7) if left else slice(0, n)
            part[row, columns], mask[row, columns] = x[row, at[row] : at[row] + n], True
            at[row] += n
        with torch.no_grad():
            states = encoder(part, mask, cache=cache)
        for row in range(2):
            got[row].append(states[row][mask[row]])
    assert at == [12, 12]
    torch.testing.assert_close(torch.stack([torch.cat(row) for row in got]), wanted, atol=1e-9, rtol=0)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_query_scale(tiny) -> None:
    """Of the layers that are named, and before u and v are added; the layer itself stays as it is."""
    encoder, weights = tiny()
    x = embeddings(2, 9)
    plain = lyric_states(weights, x, 4)
    scaled = lyric_states(weights, x, 4, query_scale={1: 0.01})
    assert (plain - scaled).abs().max() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, query_scale={1: 0.01}), scaled, atol=1e-9, rtol=0)
        torch.testing.assert_close(encoder(x), plain, atol=1e-9, rtol=0)


def test_weights_do_not_depend_on_the_window(tiny) -> None:
    """Those of the released encoder run causally too."""
    released, weights = tiny()
    causal = LyricEncoder(TINY, window=CAUSAL, dtype=torch.float64)
    causal.load_state_dict(released.state_dict())
    x = embeddings(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(causal(x), lyric_states(weights, x, 4, causal=True), atol=1e-9, rtol=0)


def test_all_parameters_learn() -> None:
    encoder = LyricEncoder(TINY)
    encoder(embeddings(1, 6).float()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="output_size 40 is not a multiple of attention_heads 3"):
        LyricEncoderConfig(output_size=40, attention_heads=3)
    encoder = LyricEncoder(TINY)
    with pytest.raises(ValueError, match="lookahead None"):
        encoder.init_cache(1)
    with pytest.raises(ValueError, match=r"x is \(1, 3, 13\).*wanted \[B, T, 12\]"):
        encoder(torch.zeros(1, 3, 13))
    with pytest.raises(ValueError, match=r"mask torch.float32 \(1, 3\)"):
        encoder(torch.zeros(1, 3, 12), torch.ones(1, 3))
