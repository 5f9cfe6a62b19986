"""The tiny decoder against its layers written out frame by frame, under the names of its published checkpoint."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from longburn.models.matrix_game_2.vae_memory import FrameMemory
from longburn.models.matrix_game_2.vae_tiny import TinyDecoder, TinyDecoderConfig, tiny_decoder_rules
from longburn.weights import CheckpointMismatch, load_checkpoint, save_checkpoint

SMALL = TinyDecoderConfig(3, (10, 6, 4, 4))
Frames = list[Tensor]  # [B, C, H, W] each


def published(config: TinyDecoderConfig, *, wide_growth: bool = False) -> dict[str, Tensor]:
    """A checkpoint with every name of a published one: the decoder's layers by their place in one list."""
    w, z = config.widths, config.latent_channels
    tensors = {"encoder.0.weight": torch.randn(4, 3, 3, 3), "encoder.0.bias": torch.randn(4)}
    tensors |= {"encoder.2.conv.weight": torch.randn(4, 8, 1, 1), "encoder.3.weight": torch.randn(4, 4, 3, 3)}
    tensors |= {"encoder.4.conv.2.weight": torch.randn(4, 4, 3, 3), "encoder.4.conv.2.bias": torch.randn(4)}

    def conv(name: str, channels: int, out: int, size: int = 3, bias: bool = True) -> None:
        tensors[f"{name}.weight"] = torch.randn(out, channels, size, size) * (1.5 / (channels * size**2)) ** 0.5
        if bias:
            tensors[f"{name}.bias"] = torch.randn(out) * 0.2

    conv("decoder.1", z, w[0])
    for stage, places in enumerate(((3, 4, 5, 7, 8), (9, 10, 11, 13, 14), (15, 16, 17, 19, 20))):
        for place in places[:3]:
            conv(f"decoder.{place}.conv.0", 2 * w[stage], w[stage])
            conv(f"decoder.{place}.conv.2", w[stage], w[stage])
            conv(f"decoder.{place}.conv.4", w[stage], w[stage])
        frames = 2 if config.doubles_time[stage] or wide_growth else 1
        conv(f"decoder.{places[3]}.conv", w[stage], w[stage] * frames, 1, bias=False)
        conv(f"decoder.{places[4]}", w[stage], w[stage + 1], bias=False)
    conv("decoder.22", w[3], 3)
    tensors["decoder.22.weight"] *= 0.2  # within 0 .. 1, mostly
    tensors["decoder.22.bias"] += 0.5
    return tensors


def by_hand(tensors: dict[str, Tensor], latents: Tensor) -> Tensor:
    """All frames of `[B, C, F, h, w]` through layer after layer, each a loop over frames."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = tensors[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, tensors.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    def block(place: int, frames: Frames) -> Frames:
        out: Frames = []
        for t, x in enumerate(frames):
            y = torch.cat([x, frames[t - 1] if t else torch.zeros_like(x)], 1)
            y = conv(f"{place}.conv.4", conv(f"{place}.conv.2", conv(f"{place}.conv.0", y).relu()).relu())
            out.append((y + x).relu())
        return out

    frames = [conv("1", 3 * torch.tanh(z / 3)).relu() for z in latents.unbind(2)]
    for places in ((3, 4, 5, 7, 8), (9, 10, 11, 13, 14), (15, 16, 17, 19, 20)):
        for place in places[:3]:
            frames = block(place, frames)
        frames = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in frames]
        grown = [conv(f"{places[3]}.conv", x) for x in frames]
        frames = [part for x, y in zip(frames, grown, strict=True) for part in y.split(x.shape[1], 1)]
        frames = [conv(str(places[4]), x) for x in frames]
    pictures = torch.stack([conv("22", x.relu()) for x in frames], 2)
    return pictures[:, :, 3:].clamp(0, 1) * 2 - 1


def loaded(tensors: dict[str, Tensor], path: Path) -> TinyDecoder:
    save_file(tensors, path / "tiny.safetensors")
    decoder = TinyDecoder(SMALL)
    load_checkpoint(decoder, path / "tiny.safetensors", tiny_decoder_rules(SMALL))
    return decoder


def test_decodes_as_its_layers_say_streamed_or_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = published(SMALL)
    decoder = loaded(tensors, tmp_path)
    z = 2 * torch.randn(2, 3, 5, 3, 4)
    whole = decoder.decode(z, FrameMemory())
    assert whole.shape == (2, 3, 17, 24, 32)
    assert float((whole.abs() < 1).float().mean()) > 0.3
    torch.testing.assert_close(whole, by_hand(tensors, z), atol=1e-5, rtol=0)
    memory = FrameMemory()
    assert torch.equal(torch.cat([decoder.decode(part, memory) for part in z.split((1, 3, 1), 2)], 2), whole)
    assert len(memory.tensors) == 9
    assert {tensor.shape[1] for tensor in memory.tensors} == {1}


def test_weights_travel_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = published(SMALL)
    decoder = loaded(tensors, tmp_path)
    save_checkpoint(decoder, tmp_path / "ours.safetensors", tiny_decoder_rules(SMALL))
    ours = load_file(tmp_path / "ours.safetensors")
    assert ours.keys() == {name for name in tensors if name.startswith("decoder.")}
    assert all(torch.equal(ours[name], tensors[name]) for name in ours)


def test_growth_for_frames_that_are_not_made_is_left_out(tmp_path: Path) -> None:
    """Some checkpoints hold two frames' weights where one is made: the later frame's count."""
    torch.manual_seed(0)
    wide = published(SMALL, wide_growth=True)
    narrow = {**wide, "decoder.7.conv.weight": wide["decoder.7.conv.weight"][10:].contiguous()}
    a, b = loaded(wide, tmp_path), loaded(narrow, tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_published_sizes_are_the_default(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = published(TinyDecoderConfig())
    torch.save(tensors, tmp_path / "taew2_1.pth")
    decoder = TinyDecoder.from_checkpoint(tmp_path / "taew2_1.pth", dtype=torch.bfloat16)
    sizes = [tensor.numel() for name, tensor in tensors.items() if name.startswith("decoder.")]
    assert sum(p.numel() for p in decoder.parameters()) == sum(sizes)
    assert decoder.decode(torch.randn(1, 16, 2, 2, 3).bfloat16(), FrameMemory()).shape == (1, 3, 5, 16, 24)
    del tensors["decoder.22.bias"]
    tensors["decoder.4.skip.weight"] = torch.zeros(1)
    torch.save(tensors, tmp_path / "taew2_1.pth")
    with pytest.raises(CheckpointMismatch) as caught:
        TinyDecoder.from_checkpoint(tmp_path / "taew2_1.pth")
    assert any(line.startswith("exit.bias") for line in caught.value.missing)
    assert any(line.startswith("decoder.4.skip.weight") for line in caught.value.unused)
    with pytest.raises(ValueError, match="wanted one entry for each stage"):
        TinyDecoderConfig(widths=(4, 4))
