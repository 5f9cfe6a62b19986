"""Oobleck, the codec of ACE-Step 1.5 (Stable Audio's autoencoder, Evans et al., arXiv 2404.10301): 48 kHz stereo audio
to 25 latent frames a second and back, by convolutions alone.

Weights are used as they act: the magnitude and direction that training keeps apart (weight normalisation, Salimans and
Kingma, arXiv 1602.07868) are one tensor here, see `longburn.models.ace_step.codecs.names`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longburn.models.ace_step.codecs.layers import Pointwise, Upsampling, convolutions
from longburn.models.ace_step.codecs.names import oobleck_rules, without_weight_norm
from longburn.models.ace_step.codecs.tiles import WINDOW, Samples, Signal, downsample, upsample
from longburn.models.settings import read_settings
from longburn.weights import Progress, SafetensorsSource, load_checkpoint

DILATIONS = (1, 3, 9)  # of the residual units of every block


@dataclass(frozen=True)
class OobleckConfig:
    """Sizes, under the names of diffusers' `AutoencoderOobleck`; the defaults are the released codec (168.7 M).

    `downsampling_ratios` and `channel_multiples` go from audio to latents, in encoder and decoder alike.

    Raises:
        ValueError: not one multiple of the channels for each ratio, or a size below 1.
    """

    encoder_hidden_size: int = 128
    downsampling_ratios: tuple[int, ...] = (2, 4, 4, 6, 10)
    channel_multiples: tuple[int, ...] = (1, 2, 4, 8, 16)
    decoder_channels: int = 128
    decoder_input_channels: int = 64
    audio_channels: int = 2
    sampling_rate: int = 48000

    def __post_init__(self) -> None:
        ratios, multiples = tuple(self.downsampling_ratios), tuple(self.channel_multiples)
        if not ratios or len(ratios) != len(multiples):
            raise ValueError(
                f"OobleckConfig: downsampling_ratios {list(ratios)} and channel_multiples {list(multiples)}, wanted "
                "one multiple for each ratio"
            )
        sizes = [value for name, value in vars(self).items() if isinstance(value, int)]
        if min(*sizes, *ratios, *multiples) < 1:
            raise ValueError(f"OobleckConfig: {self} has a size below 1")
        object.__setattr__(self, "downsampling_ratios", ratios)
        object.__setattr__(self, "channel_multiples", multiples)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "OobleckConfig":
        """From the dictionary of a `config.json`; keys that begin with an underscore are ignored.

        Raises:
            ValueError: another class, or a key that is missing or not known.
        """
        if config.get("_class_name", "AutoencoderOobleck") != "AutoencoderOobleck":
            raise ValueError(f"OobleckConfig: the codec is {config['_class_name']!r}, wanted 'AutoencoderOobleck'")
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        if differing := sorted(given.keys() ^ cls.__dataclass_fields__.keys()):
            known = "missing" if differing[0] not in given else "not known"
            raise ValueError(f"OobleckConfig: {differing[0]!r} is {known} in the configuration")
        return cls(**given)

    @property
    def hop_length(self) -> int:
        """Samples of audio a latent frame: 1920 as released, 25 frames a second."""
        return math.prod(self.downsampling_ratios)


class Snake(nn.Module):
    """`x + sin(a x)^2 / b` with learned `a = exp(alpha)`, `b = exp(beta)` a channel (arXiv 2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1, channels, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, T]` to the same."""
        return x + (self.alpha.exp() * x).sin().square() * (self.beta.exp() + 1e-9).reciprocal()


class ResidualUnit(nn.Module):
    """`x` plus a dilated convolution over 7 taps and one over channels, each behind a Snake."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv1 = nn.Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation)
        self.snake2 = Snake(channels)
        self.conv2 = Pointwise(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, T]` to the same."""
        inner = self.conv1.forward(self.snake1.forward(x))
        return x + self.conv2.forward(self.snake2.forward(inner))


class EncoderBlock(nn.Module):
    """Three residual units, then a convolution that shortens by `stride`."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.units = nn.Sequential(*(ResidualUnit(channels, dilation) for dilation in DILATIONS))
        self.snake = Snake(channels)
        self.down = nn.Conv1d(channels, out_channels, 2 * stride, stride, math.ceil(stride / 2))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, T]` to `[B, out_channels, T / stride]`."""
        return self.down.forward(self.snake.forward(self.units(x)))


class DecoderBlock(nn.Module):
    """A transposed convolution that lengthens by `stride`, then three residual units."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.snake = Snake(channels)
        self.up = Upsampling(channels, out_channels, stride, math.ceil(stride / 2))
        self.units = nn.Sequential(*(ResidualUnit(out_channels, dilation) for dilation in DILATIONS))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, T]` to `[B, out_channels, T * stride]` (one sample less where the stride is odd)."""
        return self.units(self.up(self.snake(x)))  # type: ignore[no-any-return]


class OobleckEncoder(nn.Sequential):
    """Audio `[B, 2, T]` to mean and scale of the latents, `[B, 128, F]`."""

    def __init__(self, config: OobleckConfig) -> None:
        hidden = config.encoder_hidden_size
        widths = [hidden * multiple for multiple in (1, *config.channel_multiples)]
        blocks = map(EncoderBlock, widths, widths[1:], config.downsampling_ratios)
        super().__init__()
        self.entry = nn.Conv1d(config.audio_channels, widths[0], 7, padding=3)
        self.blocks = nn.Sequential(*blocks)
        self.snake = Snake(widths[-1])
        self.exit = nn.Conv1d(widths[-1], hidden, 3, padding=1)


class OobleckDecoder(nn.Sequential):
    """Latents `[B, 64, F]` to audio `[B, 2, T]`."""

    def __init__(self, config: OobleckConfig) -> None:
        widths = [config.decoder_channels * multiple for multiple in (1, *config.channel_multiples)][::-1]
        blocks = map(DecoderBlock, widths, widths[1:], config.downsampling_ratios[::-1])
        super().__init__()
        self.entry = nn.Conv1d(config.decoder_input_channels, widths[0], 7, padding=3)
        self.blocks = nn.Sequential(*blocks)
        self.snake = Snake(widths[-1])
        self.exit = nn.Conv1d(widths[-1], config.audio_channels, 7, padding=3, bias=False)


class Posterior(NamedTuple):
    """What the encoder knows of the latents: a normal distribution a value, `[B, 64, F]` each."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, encoded: Tensor) -> "Posterior":
        """From what `OobleckEncoder` gives."""
        mean, scale = encoded.chunk(2, 1)
        # Softplus, in operations that give the same bits wherever a value lies in memory; PyTorch's own does not.
        softplus = scale.clamp(min=0) + scale.abs().neg().exp().log1p()
        return cls(mean, softplus + 1e-4)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Latents `[B, 64, F]`; the generator is on their device."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.std * noise


class Oobleck(nn.Module):
    """The codec. Long audio goes through `decode_stream` and `encode_stream`, whose memory does not grow.

    Args:
        config: sizes; default the released codec's.
        dtype: of the parameters.
    """

    def __init__(self, config: OobleckConfig | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config or OobleckConfig()
        self.encoder = OobleckEncoder(self.config).to(dtype)
        self.decoder = OobleckDecoder(self.config).to(dtype)

    def encode(self, audio: Tensor) -> Posterior:
        """Audio `[B, 2, T]` in -1 .. 1 at `config.sampling_rate` to the distribution of `T // hop_length` latents."""
        return Posterior.of(self.encoder(audio))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, 64, F]` to audio `[B, 2, F * hop_length]`."""
        return self.decoder(latents)  # type: ignore[no-any-return]

    def decode_stream(self, latents: Tensor, *, window: int = WINDOW) -> Iterator[Tensor]:
        """The audio of `decode` in consecutive pieces `[B, 2, n]`; see `tiles` for how equal it is.

        Args:
            latents: `[B, 64, F]`, on the codec's device and of its type.
            window: frames decoded at a time. One takes about 4 MB in fp32 at the released sizes.

        Raises:
            ValueError: no frames, or a window not longer than the 18 frames that its edges lose.
        """
        return upsample(self.decoder, convolutions(self.decoder), latents, hop=self.config.hop_length, window=window)

    def encode_stream(self, audio: Tensor | Signal, *, window: int = WINDOW) -> Iterator[Posterior]:
        """What `encode` gives, in consecutive pieces `[B, 64, n]`.

        Args:
            audio: `[B, 2, T]`, or a file that is read as it is needed; put on the codec's device and into its type.
            window: frames encoded at a time.

        Raises:
            ValueError: audio that is too short for one frame, or a window not longer than the 14 frames that its
                edges lose.
        """
        signal = Samples(audio) if isinstance(audio, Tensor) else audio
        like = self.encoder.entry.weight

        def encoded(samples: Tensor) -> Tensor:
            return self.encoder(samples.to(like))  # type: ignore[no-any-return]

        path = convolutions(self.encoder)
        return map(Posterior.of, downsample(encoded, path, signal, hop=self.config.hop_length, window=window))

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> "Oobleck":
        """Load a directory with a `config.json` and safetensors, as ACE-Step 1.5's `vae` or diffusers saves it.

        Raises:
            CheckpointError: files that are missing or damaged, or that do not fit; one error lists every tensor.
            ValueError: the configuration of another codec.
        """
        config = OobleckConfig.from_config(read_settings(Path(path)))
        with torch.device("meta"):
            codec = cls(config, dtype=dtype)
        source = without_weight_norm(SafetensorsSource(path))
        load_checkpoint(codec, source, oobleck_rules(config.downsampling_ratios), device=device, progress=progress)
        return codec.eval()
