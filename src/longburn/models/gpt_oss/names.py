"""The names of GPT-OSS checkpoints: OpenAI's original format and Hugging Face's, both ways.

The formats hold the same bytes. Hugging Face's splits q, k and v, and stores dense experts transposed, `[E, in, out]`.
"""

from longburn.models.gpt_oss.config import GptOssConfig
from longburn.nn import ExpertStorage
from longburn.weights import Merge, PackedNames, Part, Rename, Rule, TensorSource, Transposed

# How the expert weights are called, packed as MXFP4 and dense.
ORIGINAL_EXPERTS = PackedNames(("mlp1_weight", "mlp2_weight"), ".")
HF_EXPERTS = PackedNames(("experts.gate_up_proj", "experts.down_proj"), "_", transposed=True)

_ORIGINAL = {
    "embedding.weight": "embed.weight",
    "norm.scale": "norm.weight",
    "unembedding.weight": "head.weight",
    "block.{i}.attn.norm.scale": "layers.{i}.attention_norm.weight",
    "block.{i}.attn.qkv.weight": "layers.{i}.attention.qkv.weight",
    "block.{i}.attn.qkv.bias": "layers.{i}.attention.qkv.bias",
    "block.{i}.attn.sinks": "layers.{i}.attention.sinks",
    "block.{i}.attn.out.weight": "layers.{i}.attention.out.weight",
    "block.{i}.attn.out.bias": "layers.{i}.attention.out.bias",
    "block.{i}.mlp.norm.scale": "layers.{i}.mlp_norm.weight",
    "block.{i}.mlp.gate.weight": "layers.{i}.mlp.router.weight",
    "block.{i}.mlp.gate.bias": "layers.{i}.mlp.router.bias",
    "block.{i}.mlp.mlp1_bias": "layers.{i}.mlp.experts.gate_up_bias",
    "block.{i}.mlp.mlp2_bias": "layers.{i}.mlp.experts.down_bias",
}
_ORIGINAL_EXPERTS = {
    "block.{i}.mlp.mlp1_weight": "layers.{i}.mlp.experts.gate_up",
    "block.{i}.mlp.mlp2_weight": "layers.{i}.mlp.experts.down",
}
_HF = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.attention_norm.weight",
    "model.layers.{i}.self_attn.sinks": "layers.{i}.attention.sinks",
    "model.layers.{i}.self_attn.o_proj.weight": "layers.{i}.attention.out.weight",
    "model.layers.{i}.self_attn.o_proj.bias": "layers.{i}.attention.out.bias",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.mlp_norm.weight",
    "model.layers.{i}.mlp.router.weight": "layers.{i}.mlp.router.weight",
    "model.layers.{i}.mlp.router.bias": "layers.{i}.mlp.router.bias",
    "model.layers.{i}.mlp.experts.gate_up_proj_bias": "layers.{i}.mlp.experts.gate_up_bias",
    "model.layers.{i}.mlp.experts.down_proj_bias": "layers.{i}.mlp.experts.down_bias",
}
_HF_EXPERTS = {
    "model.layers.{i}.mlp.experts.gate_up_proj": "layers.{i}.mlp.experts.gate_up",
    "model.layers.{i}.mlp.experts.down_proj": "layers.{i}.mlp.experts.down",
}


def original_rules(config: GptOssConfig, storage: ExpertStorage) -> tuple[Rule, ...]:
    """Names of OpenAI's format, whose experts are MXFP4; dense ones keep the rows of a linear map, `[E, out, in]`."""
    rules: list[Rule] = [Rename(theirs, ours) for theirs, ours in _ORIGINAL.items()]
    for theirs, ours in _ORIGINAL_EXPERTS.items():
        rules += _packed(theirs, ours, ".") if storage == "mxfp4" else [Rename(theirs, ours)]
    return tuple(rules)


def hf_rules(config: GptOssConfig, storage: ExpertStorage) -> tuple[Rule, ...]:
    """Names of Hugging Face's `GptOssForCausalLM`."""
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    rules: list[Rule] = [Rename(theirs, ours) for theirs, ours in _HF.items()]
    for kind in ("weight", "bias"):
        parts = (Part(f"model.layers.{{i}}.self_attn.{p}_proj.{kind}", n) for p, n in (("q", q), ("k", kv), ("v", kv)))
        rules.append(Merge(tuple(parts), f"layers.{{i}}.attention.qkv.{kind}"))
    for theirs, ours in _HF_EXPERTS.items():
        rules += _packed(theirs, ours, "_") if storage == "mxfp4" else [Rename(theirs, ours, Transposed())]
    return tuple(rules)


def is_original(source: TensorSource) -> bool:
    """Whether the checkpoint is in OpenAI's format, by its names."""
    return any(name.startswith(("block.", "embedding.", "unembedding.")) for name in source.tensors)


def _packed(theirs: str, ours: str, separator: str) -> list[Rule]:
    return [Rename(f"{theirs}{separator}{half}", f"{ours}.{half}") for half in ("blocks", "scales")]
