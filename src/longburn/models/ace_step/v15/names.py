"""The names of ACE-Step 1.5's checkpoints: the official file's and those of diffusers' four parts, both ways.

They hold the same tensors. The official file prefixes each part; diffusers keeps each in a directory, and calls the
projections of an attention otherwise.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from longburn.models.ace_step.v15.config import AceStep15Config
from longburn.weights import Merge, Part, Rename, Rule, Skip


@dataclass(frozen=True)
class Names:
    """What a format calls the pieces of an attention and the two patch projections."""

    q: str
    k: str
    v: str
    out: str
    q_norm: str
    k_norm: str
    patch: str
    unpatch: str


OFFICIAL = Names("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "proj_in.1", "proj_out.1")
DIFFUSERS = Names("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k", "proj_in_conv", "proj_out_conv")

# Diffusers' directories, and the module that each one fills.
DIFFUSERS_PARTS = {
    "transformer": "dit",
    "condition_encoder": "encoder",
    "audio_tokenizer": "tokenizer",
    "audio_token_detokenizer": "detokenizer",
}
_OFFICIAL_PARTS = {"decoder": "dit", "encoder": "encoder", "tokenizer": "tokenizer", "detokenizer": "detokenizer"}


@dataclass(frozen=True)
class PatchColumns:
    """Of a convolution that does not overlap, `[out, channels, size]`: the rows of a linear map over whole patches."""

    size: int

    def to_ours(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).flatten(1)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], self.size, -1).transpose(1, 2)


@dataclass(frozen=True)
class PatchRows:
    """Of a transposed one, `[in, channels, size]`: the rows of a linear map to whole patches."""

    size: int

    def to_ours(self, tensor: Tensor) -> Tensor:
        return tensor.permute(2, 1, 0).flatten(0, 1)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.size, -1, tensor.shape[1]).permute(2, 1, 0)


def official_rules(config: AceStep15Config) -> tuple[Rule, ...]:
    """Names of the official `model.safetensors`, for an `AceStep15`."""
    rules: list[Rule] = [Rename("null_condition_emb", "encoder.null")]
    parts = _parts(config, OFFICIAL)
    for theirs, ours in _OFFICIAL_PARTS.items():
        rules += (_under(rule, theirs + ".", ours + ".") for rule in parts[ours])
    return tuple(rules)


def diffusers_rules(config: AceStep15Config) -> dict[str, tuple[Rule, ...]]:
    """Names of diffusers' parts, by directory, each for the module of an `AceStep15` that `DIFFUSERS_PARTS` says."""
    parts = _parts(config, DIFFUSERS)
    parts["encoder"] += (
        Rename("null_condition_emb", "null"),
        Skip("silence_latent", "data, not a weight; the model keeps it beside them"),
    )
    return {directory: parts[ours] for directory, ours in DIFFUSERS_PARTS.items()}


def _parts(config: AceStep15Config, names: Names) -> dict[str, tuple[Rule, ...]]:
    return {
        "dit": tuple(_dit(config, names)),
        "encoder": (
            Rename("text_projector.weight", "text.weight"),
            *_encoder(config, names, "lyric_encoder", "lyrics"),
            *_encoder(config, names, "timbre_encoder", "timbre"),
            Skip("timbre_encoder.special_token", "nothing reads it"),
        ),
        "tokenizer": (
            *_linear("audio_acoustic_proj", "project"),
            *_encoder(config, names, "attention_pooler", "pooler"),
            Rename("attention_pooler.special_token", "token"),
            *_linear("quantizer.project_in", "quantizer.project_in"),
            *_linear("quantizer.project_out", "quantizer.project_out"),
        ),
        "detokenizer": (
            *_encoder(config, names, "", "encoder"),
            Rename("special_tokens", "tokens"),
            *_linear("proj_out", "project"),
        ),
    }


def _dit(config: AceStep15Config, names: Names) -> Iterable[Rule]:
    size, D = config.patch_size, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    yield Rename(f"{names.patch}.weight", "patch.weight", PatchColumns(size))
    yield Rename(f"{names.patch}.bias", "patch.bias")
    yield Rename(f"{names.unpatch}.weight", "unpatch.weight", PatchRows(size))
    yield Rename(f"{names.unpatch}.bias", "unpatch_bias")
    for theirs, ours in (("time_embed", "time"), ("time_embed_r", "time_r")):
        for piece, own in (("linear_1", "fc1"), ("linear_2", "fc2"), ("time_proj", "proj")):
            yield from _linear(f"{theirs}.{piece}", f"{ours}.{own}")
    yield from _linear("condition_embedder", "condition")
    yield Rename("norm_out.weight", "norm.weight")
    yield Rename("scale_shift_table", "table")
    layer = "layers.{i}."
    yield Rename(layer + "scale_shift_table", layer + "table")
    for theirs, ours in (("self_attn", "attention"), ("cross_attn", "cross"), ("mlp", "mlp")):
        yield Rename(f"{layer}{theirs}_norm.weight", f"{layer}{ours}_norm.weight")
    yield from _attention(names, layer + "self_attn.", layer + "attention.", q, kv)
    cross, own = layer + "cross_attn.", layer + "cross."
    yield Rename(f"{cross}{names.q}.weight", own + "q.weight")
    yield Merge((Part(f"{cross}{names.k}.weight", kv), Part(f"{cross}{names.v}.weight", kv)), own + "kv.weight")
    yield from _around(names, cross, own)
    yield from _mlp(layer, layer, config.intermediate_size)


def _encoder(config: AceStep15Config, names: Names, theirs: str, ours: str) -> Iterable[Rule]:
    theirs, ours, D = theirs + "." if theirs else "", ours + ".", config.head_dim
    q, kv = config.encoder_num_attention_heads * D, config.encoder_num_key_value_heads * D
    yield from _linear(theirs + "embed_tokens", ours + "embed")
    yield Rename(theirs + "norm.weight", ours + "norm.weight")
    their_layer, our_layer = theirs + "layers.{i}.", ours + "layers.{i}."
    yield Rename(their_layer + "input_layernorm.weight", our_layer + "attention_norm.weight")
    yield Rename(their_layer + "post_attention_layernorm.weight", our_layer + "mlp_norm.weight")
    yield from _attention(names, their_layer + "self_attn.", our_layer + "attention.", q, kv)
    yield from _mlp(their_layer, our_layer, config.encoder_intermediate_size)


def _attention(names: Names, theirs: str, ours: str, q: int, kv: int) -> Iterable[Rule]:
    sizes = ((names.q, q), (names.k, kv), (names.v, kv))
    yield Merge(tuple(Part(f"{theirs}{name}.weight", size) for name, size in sizes), ours + "qkv.weight")
    yield from _around(names, theirs, ours)


def _around(names: Names, theirs: str, ours: str) -> Iterable[Rule]:
    for name, own in ((names.out, "out"), (names.q_norm, "q_norm"), (names.k_norm, "k_norm")):
        yield Rename(f"{theirs}{name}.weight", f"{ours}{own}.weight")


def _mlp(theirs: str, ours: str, size: int) -> Iterable[Rule]:
    gate_up = tuple(Part(f"{theirs}mlp.{name}_proj.weight", size) for name in ("gate", "up"))
    yield Merge(gate_up, ours + "mlp.gate_up.weight")
    yield Rename(theirs + "mlp.down_proj.weight", ours + "mlp.down.weight")


def _linear(theirs: str, ours: str) -> Iterable[Rule]:
    for kind in ("weight", "bias"):
        yield Rename(f"{theirs}.{kind}", f"{ours}.{kind}")


def _under(rule: Rule, theirs: str, ours: str) -> Rule:
    """The rule for modules that lie deeper: names behind prefixes."""
    if isinstance(rule, Rename):
        return replace(rule, theirs=theirs + rule.theirs, ours=ours + rule.ours)
    if isinstance(rule, Merge):
        parts = tuple(replace(part, name=theirs + part.name) for part in rule.theirs)
        return replace(rule, theirs=parts, ours=ours + rule.ours)
    if isinstance(rule, Skip):
        return replace(rule, theirs=theirs + rule.theirs)
    raise TypeError(f"cannot prefix {rule}")
