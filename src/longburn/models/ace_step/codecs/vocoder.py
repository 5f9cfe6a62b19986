"""The vocoder of ACE-Step v1, ADaMoSHiFiGANV1: log-mel magnitudes to sound at 44.1 kHz.

A ConvNeXt (Liu et al., arXiv 2201.03545) along time, then HiFi-GAN's generator (Kong et al., arXiv 2010.05646). One
channel of audio at a time. Norms are over channels, so it can be run in windows: see `tiles`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.models.ace_step.codecs.geometry import Conv
from longburn.models.ace_step.codecs.layers import Pointwise, Upsampling, convolutions
from longburn.models.ace_step.codecs.names import without_weight_norm
from longburn.models.ace_step.codecs.tiles import WINDOW, upsample
from longburn.models.ace_step.codecs.vocoder_names import vocoder_rules
from longburn.models.settings import read_settings
from longburn.weights import Progress, SafetensorsSource, load_checkpoint

# What belongs to the way from audio to mel, or to training.
_NOT_OURS = ("sampling_rate", "n_fft", "win_length", "f_min", "f_max", "n_mels", "drop_path_rate")


@dataclass(frozen=True)
class VocoderConfig:
    """Sizes, under the names of the official `config.json`; the defaults are the released vocoder (103.0 M).

    `upsample_kernel_sizes` are twice the `upsample_rates`, `num_mels` is the last of `dims`.

    Raises:
        ValueError: sizes that do not go together.
    """

    input_channels: int = 128
    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (128, 256, 384, 512)
    kernel_sizes: tuple[int, ...] = (7,)
    upsample_rates: tuple[int, ...] = (4, 4, 2, 2, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (8, 8, 4, 4, 4, 4, 4)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11, 13)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 4
    num_mels: int = 512
    upsample_initial_channel: int = 1024
    use_template: bool = False
    pre_conv_kernel_size: int = 13
    post_conv_kernel_size: int = 13
    hop_length: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list | tuple):
                inner = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in value)
                object.__setattr__(self, name, inner)
        wanted = {
            "kernel_sizes": (self.kernel_sizes, self.kernel_sizes[:1]),
            "dims": (len(self.dims), len(self.depths)),
            "num_mels": (self.num_mels, self.dims[-1]),
            "upsample_kernel_sizes": (self.upsample_kernel_sizes, tuple(2 * rate for rate in self.upsample_rates)),
            "hop_length": (self.hop_length, math.prod(self.upsample_rates)),
            "resblock_dilation_sizes": (len(self.resblock_dilation_sizes), len(self.resblock_kernel_sizes)),
            "use_template": (self.use_template, False),
        }
        for name, (came, want) in wanted.items():
            if came != want:
                raise ValueError(f"VocoderConfig: {name} is {came} where the other sizes want {want}")
        if odd := [rate for rate in self.upsample_rates if rate % 2]:
            raise ValueError(f"VocoderConfig: upsample_rates has {odd[0]}, wanted even rates")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "VocoderConfig":
        """From the dictionary of a `config.json`; keys that begin with an underscore are ignored.

        Raises:
            ValueError: another class, or a key that is not known.
        """
        if config.get("_class_name", "ADaMoSHiFiGANV1") != "ADaMoSHiFiGANV1":
            raise ValueError(f"VocoderConfig: the vocoder is {config['_class_name']!r}, wanted 'ADaMoSHiFiGANV1'")
        given = {key: value for key, value in config.items() if not key.startswith("_") and key not in _NOT_OURS}
        if strange := sorted(given.keys() - cls.__dataclass_fields__.keys()):
            raise ValueError(f"VocoderConfig: {strange[0]!r} is not known in the configuration")
        return cls(**given)


class TimeNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[B, C, T]`."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvNextBlock(nn.Module):
    """`x` plus a convolution a channel, a norm and a feed-forward, scaled a channel."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.near = nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2, groups=channels)
        self.norm = TimeNorm(channels)
        self.widen = Pointwise(channels, 4 * channels)
        self.narrow = Pointwise(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, T]` to the same."""
        inner = F.gelu(self.widen.forward(self.norm.forward(self.near.forward(x))))
        return x + self.gamma[:, None] * self.narrow.forward(inner)


class ConvNext(nn.Sequential):
    """Mel `[B, 128, T]` to features `[B, 512, T]`."""

    def __init__(self, config: VocoderConfig) -> None:
        (kernel,), dims = config.kernel_sizes, config.dims
        entry = nn.Conv1d(config.input_channels, dims[0], 7, padding=3, padding_mode="replicate")
        stages: list[nn.Module] = []
        for i, (width, depth) in enumerate(zip(dims, config.depths, strict=True)):
            before = [TimeNorm(dims[i - 1]), Pointwise(dims[i - 1], width)] if i else [entry, TimeNorm(width)]
            blocks = (ConvNextBlock(width, kernel) for _ in range(depth))
            stages.append(nn.Sequential(nn.Sequential(*before), nn.Sequential(*blocks)))
        super().__init__(*stages, TimeNorm(dims[-1]))


class ResidualStack(nn.Module):
    """Pairs of convolutions, the first of each dilated, every pair behind SiLUs and added to its input."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.dilated = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2) for d in dilations
        )
        self.plain = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=kernel // 2) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, T]` to the same."""
        for dilated, plain in zip(self.dilated, self.plain, strict=True):
            inner: Tensor = plain(F.silu(dilated(F.silu(x))))
            x = x + inner
        return x


class HifiganStage(nn.Module):
    """Longer by `rate`, then the mean of residual stacks of several kernels."""

    def __init__(self, channels: int, rate: int, config: VocoderConfig) -> None:
        super().__init__()
        self.up = Upsampling(channels, channels // 2, rate, rate // 2)
        shapes = zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
        self.stacks = nn.ModuleList(ResidualStack(channels // 2, kernel, dilations) for kernel, dilations in shapes)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, T]` to `[B, channels / 2, rate * T]`."""
        x = self.up.forward(F.silu(x))
        total: Tensor = self.stacks[0](x)
        for stack in self.stacks[1:]:
            total = total + stack(x)
        return total / len(self.stacks)

    @property
    def path(self) -> tuple[Conv, ...]:
        """Its convolutions, with the stack that reads furthest for all of them."""
        stacks = [convolutions(stack) for stack in self.stacks]
        return (self.up.geometry, *max(stacks, key=lambda stack: sum(conv.span for conv in stack)))


class Vocoder(nn.Module):
    """The vocoder.

    Args:
        config: sizes; default the released vocoder's.
        dtype: of the parameters.
    """

    def __init__(self, config: VocoderConfig | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config = config or VocoderConfig()
        channels, rates = config.upsample_initial_channel, config.upsample_rates
        first, last = config.pre_conv_kernel_size, config.post_conv_kernel_size
        self.backbone = ConvNext(config)
        self.entry = nn.Conv1d(config.num_mels, channels, first, padding=first // 2)
        self.stages = nn.ModuleList(HifiganStage(channels >> i, rate, config) for i, rate in enumerate(rates))
        self.exit = nn.Conv1d(channels >> len(rates), 1, last, padding=last // 2)
        self.to(dtype)

    @property
    def path(self) -> tuple[Conv, ...]:
        """The convolutions along time, in order."""
        stages = [conv for stage in self.stages if isinstance(stage, HifiganStage) for conv in stage.path]
        return (*convolutions(self.backbone), *convolutions(self.entry), *stages, *convolutions(self.exit))

    def forward(self, mel: Tensor) -> Tensor:
        """Natural log-mel magnitudes `[B, 128, T]`, a row for each channel of audio, to sound `[B, 1, 512 T]`."""
        x = self.entry.forward(self.backbone(mel))
        for stage in self.stages:
            x = stage(x)
        return self.exit.forward(F.silu(x)).tanh()

    def stream(self, mel: Tensor, *, window: int = WINDOW) -> Iterator[Tensor]:
        """The same in consecutive pieces `[B, 1, n]`, `window` frames of mel at a time.

        Raises:
            ValueError: no frames, or a window not longer than what its edges lose.
        """
        return upsample(self, self.path, mel, hop=self.config.hop_length, window=window)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> "Vocoder":
        """Load a directory with a `config.json` and safetensors, as ACE-Step v1's `music_vocoder`.

        Raises:
            CheckpointError: files that are missing or damaged, or that do not fit; one error lists every tensor.
            ValueError: the configuration of another vocoder.
        """
        config = VocoderConfig.from_config(read_settings(Path(path)))
        with torch.device("meta"):
            vocoder = cls(config, dtype=dtype)
        rules = vocoder_rules(config.upsample_rates, len(config.dims), len(config.resblock_kernel_sizes))
        source = without_weight_norm(SafetensorsSource(path))
        load_checkpoint(vocoder, source, rules, device=device, progress=progress)
        return vocoder.eval()
