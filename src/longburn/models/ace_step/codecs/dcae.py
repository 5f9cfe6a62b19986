"""The deep compression autoencoder of ACE-Step v1 (DC-AE, Chen et al., arXiv 2410.10733): log-mel pictures of stereo
audio to latents and back, at an eighth of the size in both directions.

Convolutions, and in the last stages linear attention over the whole picture: every latent frame depends on all
others, so there is no cutting into windows that would change nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.models.ace_step.codecs.dcae_blocks import (
    ChannelNorm,
    Down,
    GatedConv,
    MultiscaleAttention,
    ResidualBlock,
    Up,
    mean_of_groups,
)
from longburn.models.ace_step.codecs.dcae_names import dcae_rules
from longburn.models.settings import read_settings
from longburn.weights import Progress, SafetensorsSource, load_checkpoint

LATENT_SHIFT, LATENT_SCALE = -1.9091, 0.1786
"""The transformer's latents are `(z - LATENT_SHIFT) * LATENT_SCALE`."""
MEL_LOW, MEL_HIGH = -11.0, 3.0
"""Natural logarithms of mel magnitudes that are -1 and 1 in the picture."""

RESIDUAL, ATTENTION = "ResBlock", "EfficientViTBlock"


@dataclass(frozen=True)
class DcaeConfig:
    """Sizes, under the names of diffusers' `AutoencoderDC`; the defaults are the released f8c8 (156.8 M).

    The tuples have an entry a stage, from the picture to the latents. `downsample_block_type` is "Conv" or
    "pixel_unshuffle", `upsample_block_type` "interpolate" or "pixel_shuffle".

    Raises:
        ValueError: stages that do not match, or a block or way of sampling that is not known.
    """

    in_channels: int = 2
    latent_channels: int = 8
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] = (RESIDUAL, RESIDUAL, RESIDUAL, ATTENTION)
    decoder_block_types: tuple[str, ...] = (RESIDUAL, RESIDUAL, RESIDUAL, ATTENTION)
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (5,), (5,))
    downsample_block_type: str = "Conv"
    upsample_block_type: str = "interpolate"

    def __post_init__(self) -> None:
        stages = len(self.encoder_block_out_channels)
        for name, value in vars(self).items():
            if name.startswith(("encoder_", "decoder_")):
                if isinstance(value, str):
                    value = (value,) * stages
                if len(value) != stages:
                    raise ValueError(f"DcaeConfig: {name} is {value}, wanted one entry for each of {stages} stages")
                if name.endswith("layers_per_block") and min(value) < 1:
                    raise ValueError(f"DcaeConfig: {name} is {value}, wanted at least 1 in every stage")
                if name.endswith("multiscales"):
                    value = tuple(map(tuple, value))
                object.__setattr__(self, name, tuple(value))
        known = {
            "downsample_block_type": {"Conv", "pixel_unshuffle"},
            "upsample_block_type": {"interpolate", "pixel_shuffle"},
        }
        for name, values in known.items():
            if (came := getattr(self, name)) not in values:
                raise ValueError(f"DcaeConfig: {name} is {came!r}, wanted {' or '.join(sorted(values))}")
        if strange := {*self.encoder_block_types, *self.decoder_block_types} - {RESIDUAL, ATTENTION}:
            raise ValueError(f"DcaeConfig: block type {min(strange)!r} is not known, wanted {RESIDUAL} or {ATTENTION}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DcaeConfig":
        """From the dictionary of a `config.json`; keys that begin with an underscore are ignored.

        Raises:
            ValueError: another class, a key that is not known, or a setting that this codec does not have.
        """
        if config.get("_class_name", "AutoencoderDC") != "AutoencoderDC":
            raise ValueError(f"DcaeConfig: the codec is {config['_class_name']!r}, wanted 'AutoencoderDC'")
        fixed = {
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
            "decoder_conv_act_fn": "relu",
            "encoder_out_shortcut": True,
            "decoder_in_shortcut": True,
        }
        given = {key: value for key, value in config.items() if not key.startswith("_") and key != "scaling_factor"}
        for key, wanted in fixed.items():
            came = given.pop(key, wanted)
            if came != wanted and set(came if isinstance(came, list | tuple) else [came]) != {wanted}:
                raise ValueError(f"DcaeConfig: {key} is {came!r}, wanted {wanted!r}")
        if strange := sorted(given.keys() - cls.__dataclass_fields__.keys()):
            raise ValueError(f"DcaeConfig: {strange[0]!r} is not known in the configuration")
        return cls(**given)

    @property
    def attention_widths(self) -> dict[str, dict[int, int]]:
        """Of encoder and decoder, the width of q, k and v in every stage that has them."""
        halves = {
            "encoder": (self.encoder_block_types, self.encoder_block_out_channels),
            "decoder": (self.decoder_block_types, self.decoder_block_out_channels),
        }
        d = self.attention_head_dim
        return {
            half: {i: width // d * d for i, (kind, width) in enumerate(zip(*sizes, strict=True)) if kind == ATTENTION}
            for half, sizes in halves.items()
        }


class DcaeEncoder(nn.Module):
    """A picture `[B, 2, 128, T]` to latents `[B, 8, 16, T / 8]`."""

    def __init__(self, config: DcaeConfig) -> None:
        super().__init__()
        widths = config.encoder_block_out_channels
        self.latents = config.latent_channels
        self.entry = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.stages = nn.ModuleList()
        for i, width in enumerate(widths):
            blocks = _blocks(config, width, config.encoder_block_types[i], config.encoder_qkv_multiscales[i])
            stage = [blocks() for _ in range(config.encoder_layers_per_block[i])]
            if i + 1 < len(widths):
                stage.append(Down(width, widths[i + 1], config.downsample_block_type == "pixel_unshuffle"))
            self.stages.append(nn.Sequential(*stage))
        self.exit = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry.forward(x)
        for stage in self.stages:
            x = stage(x)
        return self.exit.forward(x) + mean_of_groups(x, self.latents)


class DcaeDecoder(nn.Module):
    """Latents `[B, 8, 16, F]` to a picture `[B, 2, 128, 8 F]`."""

    def __init__(self, config: DcaeConfig) -> None:
        super().__init__()
        widths = config.decoder_block_out_channels
        self.entry = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.copies = widths[-1] // config.latent_channels
        self.stages = nn.ModuleList()  # numbered from the picture, as the sizes are, and used backwards
        for i, width in enumerate(widths):
            blocks = _blocks(config, width, config.decoder_block_types[i], config.decoder_qkv_multiscales[i])
            stage = [blocks() for _ in range(config.decoder_layers_per_block[i])]
            if i + 1 < len(widths):
                stage.insert(0, Up(widths[i + 1], width, config.upsample_block_type == "pixel_shuffle"))
            self.stages.append(nn.Sequential(*stage))
        self.norm = ChannelNorm(widths[0])
        self.exit = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry.forward(x) + x.repeat_interleave(self.copies, 1)
        for stage in reversed(self.stages):
            x = stage(x)
        return self.exit.forward(F.relu(self.norm.forward(x)))


class Dcae(nn.Module):
    """The codec, in the scales of its neighbours: log-mel magnitudes on one side, the transformer's latents on the
    other.

    Args:
        config: sizes; default the released codec's.
        dtype: of the parameters.
    """

    def __init__(self, config: DcaeConfig | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config or DcaeConfig()
        self.encoder = DcaeEncoder(self.config).to(dtype)
        self.decoder = DcaeDecoder(self.config).to(dtype)

    def encode(self, mel: Tensor) -> Tensor:
        """Natural log-mel magnitudes `[B, 2, 128, T]` to latents `[B, 8, 16, T / 8]`; T is a multiple of 8.

        Raises:
            ValueError: a size that cannot be halved as often.
        """
        factor = 2 ** (len(self.config.encoder_block_out_channels) - 1)
        if mel.shape[-1] % factor or mel.shape[-2] % factor:
            raise ValueError(f"Dcae.encode: the mel is {list(mel.shape)}, wanted multiples of {factor}; pad the audio")
        picture = (mel - MEL_LOW) / (MEL_HIGH - MEL_LOW) * 2 - 1
        latents: Tensor = self.encoder(picture)
        return (latents - LATENT_SHIFT) * LATENT_SCALE

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, 8, 16, F]` to natural log-mel magnitudes `[B, 2, 128, 8 F]`."""
        picture: Tensor = self.decoder(latents / LATENT_SCALE + LATENT_SHIFT)
        return (picture * 0.5 + 0.5) * (MEL_HIGH - MEL_LOW) + MEL_LOW

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> "Dcae":
        """Load a directory with a `config.json` and safetensors, as ACE-Step v1's `music_dcae_f8c8`.

        Raises:
            CheckpointError: files that are missing or damaged, or that do not fit; one error lists every tensor.
            ValueError: the configuration of another codec.
        """
        config = DcaeConfig.from_config(read_settings(Path(path)))
        with torch.device("meta"):
            codec = cls(config, dtype=dtype)
        rules = dcae_rules(config.attention_widths)
        load_checkpoint(codec, SafetensorsSource(path), rules, device=device, progress=progress)
        return codec.eval()


def _blocks(config: DcaeConfig, width: int, kind: str, kernels: Sequence[int]) -> Callable[[], nn.Module]:
    """How a block of a stage is made."""
    if kind == RESIDUAL:
        return lambda: ResidualBlock(width)
    head_dim = config.attention_head_dim
    return lambda: nn.Sequential(MultiscaleAttention(width, head_dim, kernels), GatedConv(width))
