"""The names of checkpoints of ADaMoSHiFiGANV1, both ways, without weight normalisation."""

from collections.abc import Sequence

from longburn.models.ace_step.codecs.layers import TwoTaps
from longburn.weights import Rename, Rule, Skip
from longburn.weights.rules import NewAxis

_WHY_SKIP = "it belongs to the way from audio to mel"


def vocoder_rules(upsample_rates: Sequence[int], stages: int, stacks: int) -> tuple[Rule, ...]:
    """The rules.

    Args:
        upsample_rates: of the generator.
        stages: of the backbone.
        stacks: residual stacks in each of the generator's stages.
    """
    rules: list[Rule] = [
        Skip("mel_transform.spectrogram.window", _WHY_SKIP),
        Skip("mel_transform.mel_scale.fb", _WHY_SKIP),
        Rename("backbone.stages.{i}.{j}.gamma", "backbone.{i}.1.{j}.gamma"),
    ]
    # Theirs are linear maps where ours are convolutions of one tap.
    for theirs, ours in (("pwconv1", "widen"), ("pwconv2", "narrow")):
        block = f"backbone.stages.{{i}}.{{j}}.{theirs}", f"backbone.{{i}}.1.{{j}}.{ours}"
        rules += [
            Rename(f"{block[0]}.weight", f"{block[1]}.weight", NewAxis(2)),
            Rename(f"{block[0]}.bias", f"{block[1]}.bias"),
        ]
    for part in ("weight", "bias"):
        same = {
            "backbone.stages.{i}.{j}.dwconv": "backbone.{i}.1.{j}.near",
            "backbone.stages.{i}.{j}.norm": "backbone.{i}.1.{j}.norm",
            "backbone.channel_layers.{i}.{j}": "backbone.{i}.0.{j}",
            "backbone.norm": f"backbone.{stages}",
            "head.conv_pre": "entry",
            "head.conv_post": "exit",
        }
        for i in range(len(upsample_rates)):
            for k in range(stacks):
                for theirs, ours in (("convs1", "dilated"), ("convs2", "plain")):
                    same[f"head.resblocks.{i * stacks + k}.{theirs}.{{m}}"] = f"stages.{i}.stacks.{k}.{ours}.{{m}}"
        rules += [Rename(f"{theirs}.{part}", f"{ours}.{part}") for theirs, ours in same.items()]
    rules.append(Rename("head.ups.{i}.bias", "stages.{i}.up.bias"))
    for i, rate in enumerate(upsample_rates):
        rules.append(Rename(f"head.ups.{i}.weight", f"stages.{i}.up.weight", TwoTaps(rate)))
    return tuple(rules)
