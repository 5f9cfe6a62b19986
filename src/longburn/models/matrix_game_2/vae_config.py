"""Sizes of the Wan 2.1 causal video VAE (Wan Team, arXiv 2503.20314)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MEAN: tuple[float, ...] = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD: tuple[float, ...] = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

NOT_HERE: dict[str, tuple[Any, ...]] = {  # settings of other autoencoders, with the values that say "as in Wan 2.1"
    "attn_scales": ((), []),
    "decoder_base_dim": (None,),
    "dropout": (0, 0.0),
    "in_channels": (3,),
    "is_residual": (False,),
    "out_channels": (3,),
    "patch_size": (None, 1),
    "scale_factor_spatial": (8, None),
    "scale_factor_temporal": (4, None),
    "clip_output": (True,),
}


@dataclass(frozen=True)
class WanVaeConfig:
    """Sizes, under the names of diffusers' `AutoencoderKLWan`; the defaults are the released VAE (126.9 M).

    `dim_mult` has an entry a stage, from the picture to the latents; `temperal_downsample` says between which of them
    time is halved beside height and width.

    Raises:
        ValueError: sizes that do not belong together.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = MEAN
    latents_std: tuple[float, ...] = STD

    def __post_init__(self) -> None:
        for name in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if min(self.base_dim, self.z_dim, self.num_res_blocks, *self.dim_mult) < 1:
            raise ValueError(f"WanVaeConfig: {self} has a size below 1")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"WanVaeConfig: temperal_downsample {list(self.temperal_downsample)} and dim_mult "
                f"{list(self.dim_mult)}, wanted one entry for each pair of neighbouring stages"
            )
        if len(self.latents_mean) != self.z_dim or len(self.latents_std) != self.z_dim:
            raise ValueError(f"WanVaeConfig: latents_mean and latents_std have not {self.z_dim} entries, one a channel")
        if min(self.latents_std) <= 0:
            raise ValueError(f"WanVaeConfig: latents_std has {min(self.latents_std)}, wanted above 0")
        if odd := [width for width in self.widths[1:] if width % 2]:
            raise ValueError(f"WanVaeConfig: a stage has {odd[0]} channels, wanted an even number beyond the first")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "WanVaeConfig":
        """From the dictionary of a `config.json`; keys that begin with an underscore are ignored.

        Raises:
            ValueError: another class, a key that is not known, or a setting of another VAE.
        """
        if config.get("_class_name", "AutoencoderKLWan") != "AutoencoderKLWan":
            raise ValueError(f"WanVaeConfig: the VAE is {config['_class_name']!r}, wanted 'AutoencoderKLWan'")
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        for key, wanted in NOT_HERE.items():
            if (came := given.pop(key, wanted[0])) not in wanted:
                raise ValueError(f"WanVaeConfig: {key} is {came!r}, wanted {wanted[0]!r} as in Wan 2.1")
        if strange := sorted(given.keys() - cls.__dataclass_fields__.keys()):
            raise ValueError(f"WanVaeConfig: {strange[0]!r} is not known in the configuration")
        return cls(**given)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage, from the picture to the latents."""
        return tuple(self.base_dim * multiple for multiple in self.dim_mult)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of each stage, from the latents to the picture."""
        return self.widths[::-1]

    @property
    def space_factor(self) -> int:
        """Pixels of height or width a latent: 8 as released."""
        return int(2 ** len(self.temperal_downsample))

    @property
    def time_factor(self) -> int:
        """Pixel frames a latent frame, but for the first one, which is one: 4 as released."""
        return int(2 ** sum(self.temperal_downsample))

    @property
    def encoder_reach(self) -> int:
        """How many pixel frames before the last one of a latent frame the encoder looks at: 112 as released.

        A convolution over three frames looks two back, at the pace of its stage; so does each halving of time.
        """
        convolutions, pace = 2 * self.num_res_blocks, 1
        reach = 2 + 2 * convolutions
        for halved in self.temperal_downsample:
            reach += 2 * pace * halved
            pace *= 1 + halved
            reach += 2 * pace * convolutions
        return reach + 2 * pace * (4 + 1)
