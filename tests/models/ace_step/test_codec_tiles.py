"""A codec in windows: as much margin as its convolutions read, the numbers of one piece, constant memory."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from longburn.models.ace_step.codecs import Oobleck, OobleckConfig
from longburn.models.ace_step.codecs.geometry import Conv, Reach, length, reach, reads
from longburn.models.ace_step.codecs.layers import Pointwise, TwoTaps, Upsampling, convolutions
from longburn.models.ace_step.codecs.tiles import tiles

SMALL = OobleckConfig(16, (2, 4), (1, 2), 8, 8)
ODD = OobleckConfig(12, (2, 3, 5), (1, 2, 2), 6, 6)
# Wide enough that a window of 330 frames is large everywhere, as the released codec's windows are.
WIDE = OobleckConfig(16, (2, 4), (1, 4), 16, 64)


def codec_of(config: OobleckConfig, *, dtype: torch.dtype = torch.float32) -> Oobleck:
    """A codec in which every parameter matters."""
    torch.manual_seed(0)
    codec = Oobleck(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if "snake" in name or name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return codec


def test_the_released_codec_reads_nine_frames_and_seven() -> None:
    with torch.device("meta"):
        codec = Oobleck()
    decoder, encoder = convolutions(codec.decoder), convolutions(codec.encoder)
    assert reach(decoder, inputs=1, outputs=1920) == Reach(9, 9)
    assert reach(encoder, inputs=1920, outputs=1) == Reach(7, 7)
    assert length(decoder, 250) == 250 * 1920
    assert length(encoder, 250 * 1920 + 1919) == 250
    # The same as a distance: an input frame is heard up to 8.3 frames after its own 1920 samples end.
    furthest = max(sample / 1920 - reads(decoder, sample, sample + 1)[0] - 1 for sample in range(1920))
    assert furthest == pytest.approx(8.34, abs=0.01)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding"),
    [(7, 1, 1, 3), (7, 1, 9, 27), (8, 4, 1, 2), (10, 5, 1, 3), (3, 2, 1, 0)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_reads_what_gradients_reach(kernel: int, stride: int, dilation: int, padding: int, transposed: bool) -> None:
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    layer = kind(1, 1, kernel, stride=stride, dilation=dilation, padding=padding)
    conv = Conv(kernel, stride, dilation, padding, transposed)
    x = torch.randn(1, 1, 197, requires_grad=True)
    y = layer(x)
    assert conv.length(197) == y.shape[-1]
    middle = y.shape[-1] // 2
    for start, stop in [(middle + n, middle + n + size) for n in range(7) for size in (1, 2, 5)]:
        (gradient,) = torch.autograd.grad(y[..., start:stop].sum(), x, retain_graph=True)
        touched = gradient[0, 0].nonzero()[:, 0]
        assert conv.reads(start, stop) == (int(touched.min()), int(touched.max()) + 1)


@pytest.mark.parametrize("config", [SMALL, ODD])
def test_a_frame_reaches_as_far_as_is_said(config: OobleckConfig) -> None:
    """In fp64, so that a small influence still shows; from every frame, because the margin must not be too large."""
    codec = codec_of(config, dtype=torch.float64)
    hop, frames = config.hop_length, 61
    path = convolutions(codec.decoder)
    z = torch.randn(1, config.decoder_input_channels, frames, dtype=torch.float64, requires_grad=True)
    middle = codec.decode(z)[..., 30 * hop : 31 * hop]
    (gradient,) = torch.autograd.grad(middle.square().sum(), z)
    touched = gradient.abs().sum((0, 1)).nonzero()[:, 0]
    margin = reach(path, inputs=1, outputs=hop)
    assert (30 - int(touched.min()), int(touched.max()) - 30) == margin

    audio = torch.randn(1, 2, frames * hop, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(codec.encode(audio).mean[..., 30].square().sum(), audio)
    touched = gradient.abs().sum((0, 1)).nonzero()[:, 0] // hop
    margin = reach(convolutions(codec.encoder), inputs=hop, outputs=1)
    assert (30 - int(touched.min()), int(touched.max()) - 30) == margin


@pytest.mark.parametrize(("frames", "window"), [(900, 330), (661, 330), (331, 330), (330, 330), (57, 330), (1500, 512)])
def test_pieces_are_the_bits_of_one(frames: int, window: int) -> None:
    codec = codec_of(WIDE)
    z = torch.randn(1, 64, frames)
    with torch.no_grad():
        whole = codec.decode(z)
    pieces = list(codec.decode_stream(z, window=window))
    assert torch.equal(torch.cat(pieces, -1), whole)
    assert len(pieces) == 1 if frames <= window else len(pieces) > 1
    assert not any(piece.requires_grad for piece in pieces)


@pytest.mark.parametrize(("extra", "window"), [(0, 1300), (5, 1300), (7, 1500)])
def test_encoded_pieces_are_the_bits_of_one(extra: int, window: int) -> None:
    codec = codec_of(WIDE)
    audio = torch.rand(1, 2, 3001 * 8 + extra) * 2 - 1
    with torch.no_grad():
        whole = codec.encode(audio)
    pieces = list(codec.encode_stream(audio, window=window))
    assert len(pieces) > 1
    assert torch.equal(torch.cat([piece.mean for piece in pieces], -1), whole.mean)
    assert torch.equal(torch.cat([piece.std for piece in pieces], -1), whole.std)


@pytest.mark.parametrize("config", [SMALL, ODD])
@pytest.mark.parametrize("window", [39, 40, 51, 100])
def test_small_windows_agree_to_rounding(config: OobleckConfig, window: int) -> None:
    """In fp64, where rounding is far below what a frame too few would change; a batch, and odd strides."""
    codec = codec_of(config, dtype=torch.float64)
    z = torch.randn(2, config.decoder_input_channels, 131, dtype=torch.float64)
    audio = torch.rand(2, 2, 131 * config.hop_length + 3, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        decoded, encoded = codec.decode(z), codec.encode(audio)
    streamed = torch.cat(list(codec.decode_stream(z, window=window)), -1)
    torch.testing.assert_close(streamed, decoded, atol=1e-12, rtol=0)
    means = torch.cat([piece.mean for piece in codec.encode_stream(audio, window=window)], -1)
    torch.testing.assert_close(means, encoded.mean, atol=1e-12, rtol=0)


@pytest.mark.parametrize("lost", ["before", "after"])
def test_a_margin_of_one_frame_less_shows(lost: str) -> None:
    codec = codec_of(SMALL, dtype=torch.float64)
    z = torch.randn(1, 8, 131, dtype=torch.float64)
    margin = reach(convolutions(codec.decoder), inputs=1, outputs=8)
    short = margin._replace(**{lost: getattr(margin, lost) - 1})
    with torch.no_grad():
        whole = codec.decode(z)
        pieces = [
            codec.decode(z[..., tile.start : tile.stop])[
                ..., (tile.keep_from - tile.start) * 8 : (tile.keep_to - tile.start) * 8
            ]
            for tile in tiles(131, 50, short)
        ]
    assert not torch.allclose(torch.cat(pieces, -1), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 3), (2, 5), (5, 0)])
@pytest.mark.parametrize("window", [11, 12, 40])
def test_windows_have_one_length_and_give_every_frame_once(before: int, after: int, window: int) -> None:
    for frames in range(1, 90):
        made = list(tiles(frames, window, Reach(before, after)))
        assert {tile.stop - tile.start for tile in made} == {min(window, frames)}
        kept = [frame for tile in made for frame in range(tile.keep_from, tile.keep_to)]
        assert kept == list(range(frames))
        for tile in made:
            assert 0 <= tile.start <= tile.stop <= frames
            assert tile.start == 0 or tile.keep_from - tile.start >= before
            assert tile.stop == frames or tile.stop - tile.keep_to >= after


def test_a_piece_is_decoded_when_it_is_asked_for() -> None:
    codec = codec_of(SMALL)
    seen: list[int] = []
    codec.decoder.entry.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[-1]))
    pieces = codec.decode_stream(torch.randn(1, 8, 1000), window=60)
    assert seen == []
    next(pieces)
    next(pieces)
    assert seen == [60, 60]


def test_a_file_is_read_window_by_window() -> None:
    codec = codec_of(SMALL)
    audio = torch.rand(1, 2, 4000) * 2 - 1
    asked: list[tuple[int, int]] = []

    class Recorded:
        length = 4000

        def between(self, start: int, stop: int) -> Tensor:
            asked.append((start, stop))
            return audio[..., start:stop].double()

    means = torch.cat([piece.mean for piece in codec.encode_stream(Recorded(), window=100)], -1)
    with torch.no_grad():
        torch.testing.assert_close(means, codec.encode(audio).mean, atol=1e-5, rtol=0)
    assert all(stop - start == 800 for start, stop in asked)
    assert means.dtype == torch.float32


def test_a_plain_convolution_is_the_transposed_one() -> None:
    """Against PyTorch's transposed convolution, with the weight through the layout of checkpoints and back."""
    torch.manual_seed(0)
    for stride in (1, 2, 3, 4, 6, 10):
        padding = -(-stride // 2)
        theirs = nn.ConvTranspose1d(5, 7, 2 * stride, stride, padding, dtype=torch.float64)
        ours = Upsampling(5, 7, stride, padding).double()
        layout = TwoTaps(stride)
        with torch.no_grad():
            assert torch.equal(layout.to_theirs(layout.to_ours(theirs.weight)), theirs.weight)
            ours.weight.copy_(layout.to_ours(theirs.weight))
            ours.bias.copy_(theirs.bias)
            x = torch.randn(2, 5, 13, dtype=torch.float64)
            torch.testing.assert_close(ours(x), theirs(x), atol=1e-13, rtol=0)
        assert ours(x).shape[-1] == ours.geometry.length(13)


def test_bits_do_not_depend_on_the_length() -> None:
    """Of the two layers that take another way than PyTorch's own, at sizes where PyTorch's own does break them."""
    torch.manual_seed(0)

    def lengths() -> Iterator[tuple[int, int]]:
        yield from ((301, 111), (233, 133), (250, 97))

    layers = ((Pointwise(1024, 1024), 0, 1), (Upsampling(512, 128, 4, 2), 2, 4))
    for layer, margin, hop in layers:
        for whole, part in lengths():
            x = torch.randn(1, layer.weight.shape[1], whole)
            with torch.no_grad():
                y, middle = layer(x), layer(x[..., 50 : 50 + part])
            inner = slice(margin * hop, middle.shape[-1] - margin * hop)
            assert torch.equal(middle[..., inner], y[..., 50 * hop : 50 * hop + middle.shape[-1]][..., inner])


def test_what_cannot_be_cut_is_refused() -> None:
    codec = codec_of(SMALL)
    lost = sum(reach(convolutions(codec.decoder), inputs=1, outputs=8))
    with pytest.raises(ValueError, match=rf"{lost} are lost at its edges; wanted at least {lost + 1}"):
        codec.decode_stream(torch.randn(1, 8, 100), window=lost)
    assert len(list(codec.decode_stream(torch.randn(1, 8, lost + 3), window=lost + 1))) == 3
    with pytest.raises(ValueError, match="0 frames, wanted at least 1"):
        codec.decode_stream(torch.randn(1, 8, 0))
    with pytest.raises(ValueError, match="7 samples do not make a frame"):
        codec.encode_stream(torch.randn(1, 2, 7))
