"""A small decoder for the latents of the Wan 2.1 VAE: TAEHV (github.com/madebyollin/taehv), 4 % of the work.

It was made for previews: each residual block sees its own input one frame ago, and nothing else of the past.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.models.matrix_game_2.vae_blocks import PictureConv, interleaved, twice_as_large
from longburn.models.matrix_game_2.vae_memory import Pass, StreamedDecoder
from longburn.models.matrix_game_2.vae_names import ChannelsLast, Ones
from longburn.weights import Progress, Rename, Rule, Skip, load_checkpoint
from longburn.weights.pickled import open_any

BLOCKS = 3  # memory blocks in each stage


@dataclass(frozen=True)
class TinyDecoderConfig:
    """Sizes; the defaults are `taew2_1` (9.8 M parameters).

    Args:
        latent_channels: of the latents.
        widths: channels of each stage, from the latents on, and of the last convolution's input.
        doubles_time: whether the frames are doubled after each stage.

    Raises:
        ValueError: not one entry for each stage.
    """

    latent_channels: int = 16
    widths: tuple[int, ...] = (256, 128, 64, 64)
    doubles_time: tuple[bool, ...] = (False, True, True)

    def __post_init__(self) -> None:
        if len(self.doubles_time) != len(self.widths) - 1 or min(self.latent_channels, *self.widths) < 1:
            raise ValueError(
                f"TinyDecoderConfig: doubles_time {list(self.doubles_time)} and widths {list(self.widths)}, wanted one "
                "entry for each stage, and one width of at least 1 more"
            )


class MemoryBlock(nn.Module):
    """Three convolutions of a frame and of the one before it, side by side, added to the frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        sizes = (2 * channels, channels, channels)
        self.convs = nn.ModuleList(PictureConv(size, channels) for size in sizes)

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        """`[B, T, H, W, C]` to the same."""
        y = step.extend(x, 1)
        y = torch.cat([x, y[:, :-1]], -1)
        for i, conv in enumerate(self.convs):
            y = conv(F.relu(y) if i else y)
        return F.relu(y + x)


class TinyStage(nn.Module):
    """Memory blocks, then twice the size, perhaps twice the frames, and a change of width."""

    def __init__(self, channels: int, out_channels: int, doubles_time: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MemoryBlock(channels) for _ in range(BLOCKS))
        self.frames = 1 + doubles_time
        self.grow = nn.Linear(channels, channels * self.frames, bias=False)
        self.conv = PictureConv(channels, out_channels, bias=False)

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        """`[B, T, H, W, C]` to `[B, T or 2 T, 2 H, 2 W, out]`."""
        for block in self.blocks:
            x = block(x, step)
        x = interleaved(self.grow.forward(x), self.frames)
        return self.conv.forward(twice_as_large(x))


class TinyDecoder(StreamedDecoder):
    """Latents, in the scale of the diffusion model, to pictures, one latent frame at a time.

    As published, at 352 x 640, a latent frame is four pictures and 0.30 TFLOP, and a stream remembers 38 MB in fp16.

    Args:
        config: sizes; default `taew2_1`'s.
        dtype: of the parameters.
    """

    def __init__(self, config: TinyDecoderConfig | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config or TinyDecoderConfig()
        widths = self.config.widths
        self.latent_channels = self.config.latent_channels
        self.entry = PictureConv(self.latent_channels, widths[0])
        self.stages = nn.ModuleList(map(TinyStage, widths, widths[1:], self.config.doubles_time))
        self.exit = PictureConv(widths[-1], 3)
        self.to(dtype)

    def decode_frame(self, latent: Tensor, step: Pass) -> Tensor:
        x = latent.movedim(1, -1)[:, None]
        x = F.relu(self.entry.forward(torch.tanh(x / 3) * 3))
        for stage in self.stages:
            x = stage(x, step)
        if step.first:
            x = x[:, -1:]  # those before stand for nothing
        return (self.exit.forward(F.relu(x)).clamp(0, 1) * 2 - 1).movedim(-1, 1)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> "TinyDecoder":
        """Load `taew2_1.pth`, or its tensors as safetensors; its encoder is left out.

        Raises:
            CheckpointError: a file that is missing or damaged, or that does not fit; one error lists every tensor.
        """
        with torch.device("meta"):
            decoder = cls(dtype=dtype)
        load_checkpoint(decoder, open_any(path), tiny_decoder_rules(decoder.config), device=device, progress=progress)
        return decoder.eval()


@dataclass(frozen=True)
class LastFrames:
    """Ours is `[out, in]`, theirs `[out, in, 1, 1]`; where theirs has more rows, for frames that are not made, its last
    ones count.
    """

    rows: int

    def to_ours(self, tensor: Tensor) -> Tensor:
        return Ones(2).to_ours(tensor[-self.rows :])

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return Ones(2).to_theirs(tensor)


def tiny_decoder_rules(config: TinyDecoderConfig) -> tuple[Rule, ...]:
    """The names of TAEHV's checkpoints, whose decoder is one list of layers with and without parameters."""
    rules: list[Rule] = []

    def conv(theirs: str, ours: str, *, bias: bool = True) -> None:
        rules.append(Rename(f"{theirs}.weight", f"{ours}.weight", ChannelsLast()))
        if bias:
            rules.append(Rename(f"{theirs}.bias", f"{ours}.bias"))

    conv("decoder.1", "entry")
    place = 3
    for i, (width, doubled) in enumerate(zip(config.widths, config.doubles_time, strict=False)):
        for n in range(BLOCKS):
            for j in range(3):
                conv(f"decoder.{place + n}.conv.{2 * j}", f"stages.{i}.blocks.{n}.convs.{j}")
        grow = f"decoder.{place + BLOCKS + 1}.conv.weight"
        rules.append(Rename(grow, f"stages.{i}.grow.weight", LastFrames(width * (1 + doubled))))
        conv(f"decoder.{place + BLOCKS + 2}", f"stages.{i}.conv", bias=False)
        place += BLOCKS + 3
    conv(f"decoder.{place + 1}", "exit")
    names = ("{i}.weight", "{i}.bias", "{i}.conv.weight", "{i}.conv.{j}.weight", "{i}.conv.{j}.bias")
    return (*rules, *(Skip(f"encoder.{name}", "the encoder is not used") for name in names))
