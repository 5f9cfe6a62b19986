"""The names of checkpoints of CLIP's vision tower, both ways: those released with Wan 2.1, and transformers'."""

from dataclasses import dataclass

from torch import Tensor

from longburn.weights import Part, Rename, Rule, Skip, Split

_PARTS = ("weight", "bias")
_LAYER = {  # released, and transformers'
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_ATTENTION = tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v"))
_TEXT = (
    "log_scale",
    *(f"textual.{name}_embedding.weight" for name in ("token", "type", "pos")),
    *(f"textual.norm.{part}" for part in _PARTS),
    *(f"textual.blocks.{{i}}.{name}.{part}" for name in ("norm1", "norm2", "ffn.0", "ffn.2") for part in _PARTS),
    *(f"textual.blocks.{{i}}.attn.{name}.{part}" for name in ("q", "k", "v", "o") for part in _PARTS),
    *(f"textual.head.{n}.weight" for n in (0, 2)),
)


@dataclass(frozen=True)
class LeadingOnes:
    """Theirs has `count` more dimensions at the beginning, all of size 1."""

    count: int

    def to_ours(self, tensor: Tensor) -> Tensor:
        if any(size != 1 for size in tensor.shape[: self.count]):
            raise ValueError(f"{list(tensor.shape)} does not begin with {self.count} sizes of 1")
        return tensor.reshape(tensor.shape[self.count :])

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor[(None,) * self.count]


def tower_rules(layers: int, width: int) -> tuple[Rule, ...]:
    """The rules for both kinds of names; saved as released.

    Args:
        layers: of the whole tower; the last one is left out.
        width: of its hidden states.
    """
    return (*_released(layers, width), *_transformers(layers, "vision_model."), *_transformers(layers, ""))


def _released(layers: int, width: int) -> list[Rule]:
    embeddings = "model.embeddings"
    rules: list[Rule] = [
        Rename("visual.patch_embedding.weight", f"{embeddings}.patch_embedding.weight"),
        Rename("visual.cls_embedding", f"{embeddings}.class_embedding", LeadingOnes(2)),
        Rename("visual.pos_embedding", f"{embeddings}.position_embedding.weight", LeadingOnes(1)),
    ]
    for part in _PARTS:
        rules += _before_the_end(
            "visual.pre_norm", "visual.transformer", "visual.post_norm", "pre_layrnorm", layers, part, _LAYER
        )
        for i in range(layers - 1):
            names = tuple(Part(f"model.encoder.layers.{i}.{name}.{part}", width) for name in _ATTENTION)
            rules.append(Split(f"visual.transformer.{i}.attn.to_qkv.{part}", names))
        rules.append(Skip(f"visual.transformer.{layers - 1}.attn.to_qkv.{part}", _LAST))
    rules.append(Skip("visual.head", _LAST))
    return rules + [Skip(name, "the text tower is not used") for name in _TEXT]


def _transformers(layers: int, prefix: str) -> list[Rule]:
    embeddings = "embeddings.{}".format
    rules: list[Rule] = [
        Rename(f"{prefix}{embeddings(name)}", f"model.{embeddings(name)}")
        for name in ("patch_embedding.weight", "class_embedding", "position_embedding.weight")
    ]
    rules.append(Skip(f"{prefix}embeddings.position_ids", "they are counted"))
    names = {name: name for name in (*_LAYER.values(), *_ATTENTION)}
    for part in _PARTS:
        rules += _before_the_end(
            f"{prefix}pre_layrnorm",
            f"{prefix}encoder.layers",
            f"{prefix}post_layernorm",
            "pre_layrnorm",
            layers,
            part,
            names,
        )
    return rules


_LAST = "the output of the last layer but one is used"


def _before_the_end(
    before: str, stack: str, after: str, ours: str, layers: int, part: str, names: dict[str, str]
) -> list[Rule]:
    """The norm before the layers, the layers, of which the last is left out, and the norm after them, left out too."""
    rules: list[Rule] = [Rename(f"{before}.{part}", f"model.{ours}.{part}"), Skip(f"{after}.{part}", _LAST)]
    for theirs, mine in names.items():
        rules += [
            Rename(f"{stack}.{i}.{theirs}.{part}", f"model.encoder.layers.{i}.{mine}.{part}") for i in range(layers - 1)
        ]
        rules.append(Skip(f"{stack}.{layers - 1}.{theirs}.{part}", _LAST))
    return rules
