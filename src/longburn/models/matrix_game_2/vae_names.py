"""The names of checkpoints of the Wan 2.1 VAE, both ways: the released file's and diffusers'."""

from dataclasses import dataclass

from torch import Tensor

from longburn.models.matrix_game_2.vae_config import WanVaeConfig
from longburn.weights import Layout, Rename, Rule


@dataclass(frozen=True)
class ChannelsLast:
    """Ours has the input channels, dimension 1 of theirs, at the end."""

    def to_ours(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(1, -1)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(-1, 1)


@dataclass(frozen=True)
class TimeInChannels:
    """Theirs is `[out, in, time, height, width]`, ours `[out, height, width, time * in]` with three times."""

    def to_ours(self, tensor: Tensor) -> Tensor:
        if tensor.dim() != 5:
            raise ValueError(f"{list(tensor.shape)} is not [out, in, time, height, width]")
        return tensor.permute(0, 3, 4, 2, 1).flatten(3)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[:3], 3, -1).permute(0, 4, 3, 1, 2)


@dataclass(frozen=True)
class Ones:
    """Theirs has `count` more dimensions at the end, all of size 1."""

    count: int

    def to_ours(self, tensor: Tensor) -> Tensor:
        kept = tensor.shape[: tensor.dim() - self.count]
        if any(size != 1 for size in tensor.shape[len(kept) :]):
            raise ValueError(f"{list(tensor.shape)} does not end in {self.count} sizes of 1")
        return tensor.reshape(kept)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape, *(1,) * self.count)


_CAUSAL, _CONVOLUTION, _OVER_CHANNELS, _IN_PICTURES = TimeInChannels(), ChannelsLast(), Ones(3), Ones(2)


def wan_vae_rules(config: WanVaeConfig, *, save_as: str = "diffusers") -> tuple[Rule, ...]:
    """The rules for both kinds of names; a checkpoint has one of them.

    Args:
        config: sizes.
        save_as: "diffusers" or "released", the names to save by.

    Raises:
        ValueError: another kind.
    """
    kinds = {"diffusers": _diffusers(config), "released": _released(config)}
    if save_as not in kinds:
        raise ValueError(f"wan_vae_rules: save_as is {save_as!r}, wanted {' or '.join(kinds)}")
    return tuple(kinds.pop(save_as)) + tuple(rule for rules in kinds.values() for rule in rules)


def _of(theirs: str, ours: str, layout: Layout) -> list[Rule]:
    """Weight and bias of a layer."""
    return [
        Rename(f"{theirs}.weight", f"{ours}.weight", layout),
        Rename(f"{theirs}.bias", f"{ours}.bias"),
    ]


def _norm(theirs: str, ours: str, dims: int) -> Rule:
    return Rename(f"{theirs}.gamma", f"{ours}.weight", Ones(dims))


def _residual(theirs: str, ours: str, names: tuple[str, str, str, str, str]) -> list[Rule]:
    norm1, conv1, norm2, conv2, shortcut = (f"{theirs}.{name}" for name in names)
    rules = [_norm(norm1, f"{ours}.norm1", 3), _norm(norm2, f"{ours}.norm2", 3)]
    rules += _of(conv1, f"{ours}.conv1", _CAUSAL) + _of(conv2, f"{ours}.conv2", _CAUSAL)
    return rules + _of(shortcut, f"{ours}.shortcut", _OVER_CHANNELS)


def _attention(theirs: str, ours: str) -> list[Rule]:
    rules = [_norm(f"{theirs}.norm", f"{ours}.norm", 2)]
    return (
        rules
        + _of(f"{theirs}.to_qkv", f"{ours}.qkv", _IN_PICTURES)
        + _of(f"{theirs}.proj", f"{ours}.out", _IN_PICTURES)
    )


def _resample(theirs: str, ours: str, time: bool) -> list[Rule]:
    rules = _of(f"{theirs}.resample.1", f"{ours}.size.conv", _CONVOLUTION)
    return rules + (_of(f"{theirs}.time_conv", f"{ours}.frames.conv", _CONVOLUTION) if time else [])


_DIFFUSERS = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut")
_RELEASED = ("residual.0", "residual.2", "residual.3", "residual.6", "shortcut")


def _diffusers(config: WanVaeConfig) -> list[Rule]:
    rules = _of("quant_conv", "encoder.latents", _OVER_CHANNELS) + _of(
        "post_quant_conv", "decoder.latents", _OVER_CHANNELS
    )
    for half in ("encoder", "decoder"):
        rules += _of(f"{half}.conv_in", f"{half}.entry", _CAUSAL) + _of(f"{half}.conv_out", f"{half}.exit", _CAUSAL)
        rules.append(_norm(f"{half}.norm_out", f"{half}.norm", 3))
        rules += _attention(f"{half}.mid_block.attentions.0", f"{half}.middle.attention")
        for n, ours in enumerate(("before", "after")):
            rules += _residual(f"{half}.mid_block.resnets.{n}", f"{half}.middle.{ours}", _DIFFUSERS)
    rules += _down(config, "encoder.down_blocks", _DIFFUSERS)
    rules += _residual("decoder.up_blocks.{i}.resnets.{j}", "decoder.stages.{i}.{j}", _DIFFUSERS)
    for i, time in enumerate(config.temperal_downsample[::-1]):
        rules += _resample(f"decoder.up_blocks.{i}.upsamplers.0", f"decoder.ups.{i}", time)
    return rules


def _released(config: WanVaeConfig) -> list[Rule]:
    rules = _of("conv1", "encoder.latents", _OVER_CHANNELS) + _of("conv2", "decoder.latents", _OVER_CHANNELS)
    for half in ("encoder", "decoder"):
        rules += _of(f"{half}.conv1", f"{half}.entry", _CAUSAL) + _of(f"{half}.head.2", f"{half}.exit", _CAUSAL)
        rules.append(_norm(f"{half}.head.0", f"{half}.norm", 3))
        rules += _attention(f"{half}.middle.1", f"{half}.middle.attention")
        for n, ours in ((0, "before"), (2, "after")):
            rules += _residual(f"{half}.middle.{n}", f"{half}.middle.{ours}", _RELEASED)
    rules += _down(config, "encoder.downsamples", _RELEASED)
    place = 0  # the decoder's stages are one list, each but the last with its way up at the end
    for i in range(len(config.dim_mult)):
        for n in range(config.num_res_blocks + 1):
            rules += _residual(f"decoder.upsamples.{place + n}", f"decoder.stages.{i}.{n}", _RELEASED)
        place += config.num_res_blocks + 1
        if i < len(config.temperal_downsample):
            rules += _resample(f"decoder.upsamples.{place}", f"decoder.ups.{i}", config.temperal_downsample[::-1][i])
            place += 1
    return rules


def _down(config: WanVaeConfig, theirs: str, names: tuple[str, str, str, str, str]) -> list[Rule]:
    """The encoder's stages, one list in both, each but the last with its way down at the end."""
    rules: list[Rule] = []
    place = 0
    for i in range(len(config.dim_mult)):
        for n in range(config.num_res_blocks):
            rules += _residual(f"{theirs}.{place + n}", f"encoder.stages.{i}.{n}", names)
        place += config.num_res_blocks
        if i < len(config.temperal_downsample):
            rules += _resample(f"{theirs}.{place}", f"encoder.downs.{i}", config.temperal_downsample[i])
            place += 1
    return rules
