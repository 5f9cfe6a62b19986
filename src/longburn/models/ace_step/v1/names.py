"""The names of the released `ace_step_transformer` checkpoint, both ways.

A fifth of the released tensors does nothing when music is made; those are skipped by name.
"""

from dataclasses import dataclass

from torch import Tensor

from longburn.models.ace_step.v1.config import AceStepV1Config, LyricEncoderConfig
from longburn.weights import Merge, Part, Rename, Rule, Skip


@dataclass(frozen=True)
class Pointwise:
    """Theirs is a convolution of width 1, `[out, in, 1]`; ours the linear map `[out, in]`."""

    def to_ours(self, tensor: Tensor) -> Tensor:
        if tensor.dim() != 3 or tensor.shape[-1] != 1:
            raise ValueError(f"{list(tensor.shape)} is not a convolution of width 1")
        return tensor.squeeze(-1)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(-1)


# Modules with a weight and a bias.
_MODULES = {
    "proj_in.early_conv_layers.0": "patch.conv",
    "proj_in.early_conv_layers.1": "patch.norm",
    "proj_in.early_conv_layers.2": "patch.out",
    "timestep_embedder.linear_1": "time.up",
    "timestep_embedder.linear_2": "time.down",
    "t_block.1": "modulation",
    "speaker_embedder": "speaker",
    "genre_embedder": "text",  # whatever the text says, not only a genre
    "lyric_proj": "lyrics",
    "final_layer.linear": "final.linear",
    "transformer_blocks.{i}.attn.to_out.0": "blocks.{i}.attention.out",
    "transformer_blocks.{i}.cross_attn.to_q": "blocks.{i}.cross.q",
    "transformer_blocks.{i}.cross_attn.to_out.0": "blocks.{i}.cross.out",
    "transformer_blocks.{i}.ff.depth_conv.conv": "blocks.{i}.mlp.conv",
}
_TENSORS = {
    "lyric_embs.weight": "lyric_embed.weight",
    "final_layer.scale_shift_table": "final.table",
    "transformer_blocks.{i}.scale_shift_table": "blocks.{i}.table",
    "transformer_blocks.{i}.ff.inverted_conv.conv.bias": "blocks.{i}.mlp.up.bias",
}
_LYRIC_MODULES = {
    "embed.out.0": "embed",
    "embed.out.1": "embed_norm",
    "after_norm": "norm",
    "encoders.{i}.norm_mha": "layers.{i}.attention_norm",
    "encoders.{i}.norm_ff": "layers.{i}.mlp_norm",
    "encoders.{i}.self_attn.linear_out": "layers.{i}.attention.out",
    "encoders.{i}.feed_forward.w_1": "layers.{i}.mlp.up",
    "encoders.{i}.feed_forward.w_2": "layers.{i}.mlp.down",
}
_LYRIC_TENSORS = {
    "encoders.{i}.self_attn.pos_bias_u": "layers.{i}.attention.bias.u",
    "encoders.{i}.self_attn.pos_bias_v": "layers.{i}.attention.bias.v",
    "encoders.{i}.self_attn.linear_pos.weight": "layers.{i}.attention.bias.project.weight",
}
_JOINT_ATTENTION = "projections of a joint attention that this cross attention does not compute"
_UNUSED = {
    "add_q_proj": _JOINT_ATTENTION,
    "add_k_proj": _JOINT_ATTENTION,
    "add_v_proj": _JOINT_ATTENTION,
    "to_add_out": _JOINT_ATTENTION,
}


def official_rules(config: AceStepV1Config) -> tuple[Rule, ...]:
    """Names of the whole transformer."""
    D = config.inner_dim
    rules: list[Rule] = _modules(_MODULES) + [Rename(theirs, ours) for theirs, ours in _TENSORS.items()]
    block, ours = "transformer_blocks.{i}.", "blocks.{i}."
    for kind in ("weight", "bias"):
        qkv = tuple(Part(f"{block}attn.to_{part}.{kind}", D) for part in "qkv")
        kv = tuple(Part(f"{block}cross_attn.to_{part}.{kind}", D) for part in "kv")
        rules += [Merge(qkv, f"{ours}attention.qkv.{kind}"), Merge(kv, f"{ours}cross.kv.{kind}")]
        rules += [Skip(f"{block}cross_attn.{name}.{kind}", reason) for name, reason in _UNUSED.items()]
        rules += [Skip(f"projectors.{{i}}.{{j}}.{kind}", "to the states of speech models, for a loss of the training")]
    for theirs, name in (("inverted_conv", "up"), ("point_conv", "down")):
        rules.append(Rename(f"{block}ff.{theirs}.conv.weight", f"{ours}mlp.{name}.weight", Pointwise()))
    return (*rules, *lyric_rules(config.lyric_encoder, theirs="lyric_encoder.", ours="lyric_encoder."))


def lyric_rules(config: LyricEncoderConfig, *, theirs: str = "", ours: str = "") -> tuple[Rule, ...]:
    """Names of the lyric encoder, alone or behind a prefix of theirs and of ours."""
    rules = _modules(_LYRIC_MODULES, theirs, ours)
    rules += [Rename(theirs + a, ours + b) for a, b in _LYRIC_TENSORS.items()]
    for kind in ("weight", "bias"):
        parts = (Part(f"{theirs}encoders.{{i}}.self_attn.linear_{p}.{kind}", config.output_size) for p in "qkv")
        rules.append(Merge(tuple(parts), f"{ours}layers.{{i}}.attention.qkv.{kind}"))
    return tuple(rules)


def _modules(names: dict[str, str], theirs: str = "", ours: str = "") -> list[Rule]:
    kinds = ("weight", "bias")
    return [Rename(f"{theirs}{a}.{kind}", f"{ours}{b}.{kind}") for a, b in names.items() for kind in kinds]
