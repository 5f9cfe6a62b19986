"""The names of checkpoints of `AutoencoderDC`, both ways."""

from longburn.weights import Merge, Part, Rename, Rule

_NORM = ("weight", "bias")
_RESIDUAL = {
    "conv1.weight": "conv1.weight",
    "conv1.bias": "conv1.bias",
    "conv2.weight": "conv2.weight",
    **{f"norm.{part}": f"norm.{part}" for part in _NORM},
}
_ATTENTION = {
    "attn.to_qkv_multiscale.{s}.proj_in.weight": "0.scales.{s}.near.weight",
    "attn.to_qkv_multiscale.{s}.proj_out.weight": "0.scales.{s}.mix.weight",
    "attn.to_out.weight": "0.out.weight",
    **{f"attn.norm_out.{part}": f"0.norm.{part}" for part in _NORM},
    **{f"conv_out.conv_inverted.{part}": f"1.widen.{part}" for part in _NORM},
    **{f"conv_out.conv_depth.{part}": f"1.near.{part}" for part in _NORM},
    "conv_out.conv_point.weight": "1.narrow.weight",
    **{f"conv_out.norm.{part}": f"1.norm.{part}" for part in _NORM},
}
_HALVES = {"encoder": "down_blocks", "decoder": "up_blocks"}


def dcae_rules(attention_widths: dict[str, dict[int, int]]) -> tuple[Rule, ...]:
    """The rules, official and diffusers' names alike.

    Args:
        attention_widths: of "encoder" and "decoder", the width of q, k and v by the number of each stage with
        attention.
    """
    rules: list[Rule] = [Rename(f"decoder.norm_out.{part}", f"decoder.norm.{part}") for part in _NORM]
    for half, stages in _HALVES.items():
        for part in _NORM:
            rules.append(Rename(f"{half}.conv_in.{part}", f"{half}.entry.{part}"))
            rules.append(Rename(f"{half}.conv_out.{part}", f"{half}.exit.{part}"))
            rules.append(Rename(f"{half}.{stages}.{{i}}.{{j}}.conv.{part}", f"{half}.stages.{{i}}.{{j}}.conv.{part}"))
        for theirs, ours in {**_RESIDUAL, **_ATTENTION}.items():
            rules.append(Rename(f"{half}.{stages}.{{i}}.{{j}}.{theirs}", f"{half}.stages.{{i}}.{{j}}.{ours}"))
        for stage, width in attention_widths[half].items():
            parts = tuple(Part(f"{half}.{stages}.{stage}.{{j}}.attn.to_{p}.weight", width) for p in "qkv")
            rules.append(Merge(parts, f"{half}.stages.{stage}.{{j}}.0.qkv.weight"))
    return tuple(rules)
