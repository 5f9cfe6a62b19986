"""The Llama family: RMSNorm, GQA with RoPE, SwiGLU, a tied or untied head (Touvron et al., arXiv 2302.13971).

Checkpoints: Hugging Face's layout (`LlamaForCausalLM`) and GGUF files of the architecture `llama`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from longburn.attention import Attention
from longburn.cache import RollingKVCache, Step, WindowPolicy
from longburn.models.decoder import Decoder
from longburn.nn import RMSNorm, SwiGLU
from longburn.rope import LinearScaling, RopeScaling, RotaryEncoding, YarnScaling
from longburn.weights import InterleavedRows, Merge, Part, Rename, Rule, Skip, Tied


@dataclass(frozen=True)
class LlamaConfig:
    """A model's sizes, under the names of a Hugging Face `config.json`.

    `qk_norm` is an RMSNorm over every head's q and k, before the rotation (Qwen3).
    """

    MODEL_TYPE: ClassVar[str] = "llama"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RotaryEncoding
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the dictionary of a `config.json`.

        Raises:
            ValueError: another architecture or activation, a missing key, or a rope setting that is not known.
        """
        _expect(cls.__name__, "model_type", config.get("model_type"), (cls.MODEL_TYPE,))
        _expect(cls.__name__, "hidden_act", config.get("hidden_act", "silu"), ("silu",))
        heads = _need(cls.__name__, config, "num_attention_heads")
        hidden = _need(cls.__name__, config, "hidden_size")
        return cls(
            vocab_size=_need(cls.__name__, config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_need(cls.__name__, config, "intermediate_size"),
            num_hidden_layers=_need(cls.__name__, config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rope=RotaryEncoding.from_config(_with_theta(config)),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, tied: bool) -> "LlamaConfig":
        """From the metadata of a GGUF file; `tied` if the file has no tensor `output.weight`.

        Raises:
            ValueError: another architecture, a missing key, or a rope scaling that is not known.
        """
        _expect(cls.__name__, "general.architecture", metadata.get("general.architecture"), ("llama",))
        heads = _need(cls.__name__, metadata, "llama.attention.head_count")
        hidden = _need(cls.__name__, metadata, "llama.embedding_length")
        head_dim = metadata.get("llama.attention.key_length") or hidden // heads
        context = _need(cls.__name__, metadata, "llama.context_length")
        tokens = metadata.get("tokenizer.ggml.tokens")
        return cls(
            vocab_size=metadata.get("llama.vocab_size") or len(tokens or ()),
            hidden_size=hidden,
            intermediate_size=_need(cls.__name__, metadata, "llama.feed_forward_length"),
            num_hidden_layers=_need(cls.__name__, metadata, "llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=metadata.get("llama.attention.head_count_kv") or heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            rope=RotaryEncoding(
                head_dim,
                theta=metadata.get("llama.rope.freq_base", 10000.0),
                rotary_dim=metadata.get("llama.rope.dimension_count"),
                scaling=_gguf_scaling(metadata, context),
            ),
            rms_norm_eps=_need(cls.__name__, metadata, "llama.attention.layer_norm_rms_epsilon"),
            tie_word_embeddings=tied,
        )


class LlamaBlock(nn.Module):
    """One layer: attention and feed-forward, each behind an RMSNorm and added to the stream."""

    def __init__(self, config: LlamaConfig, layer: int, policy: WindowPolicy, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            window=policy.of_layer(layer),
            rope=config.rope,
            qk_norm=config.rms_norm_eps if config.qk_norm else None,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            dtype=dtype,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, dtype=dtype)

    def forward(self, x: Tensor, step: Step, cache: RollingKVCache | None) -> Tensor:
        x = self.attention.forward(self.attention_norm.forward(x), step, cache=cache, residual=x)
        return self.mlp.forward(self.mlp_norm.forward(x), residual=x)


class Llama(Decoder):
    """A Llama model; implements `AutoregressiveModel`.

    Args:
        config: sizes.
        policy: the window of every layer; default all keys everywhere, as it was trained.
        dtype: of the parameters.
    """

    def __init__(
        self, config: LlamaConfig, *, policy: WindowPolicy | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        policy = policy or WindowPolicy.full()
        super().__init__(
            config.vocab_size,
            config.hidden_size,
            (LlamaBlock(config, layer, policy, dtype) for layer in range(config.num_hidden_layers)),
            RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype),
            tied=config.tie_word_embeddings,
            dtype=dtype,
        )
        self.config = config


def hf_rules(config: LlamaConfig) -> tuple[Rule, ...]:
    """Names of Hugging Face's `LlamaForCausalLM` and `Qwen3ForCausalLM`."""
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    prefix = "model.layers.{i}."
    rules: list[Rule] = [
        Rename("model.embed_tokens.weight", "embed.weight"),
        Rename("model.norm.weight", "norm.weight"),
        Tied("lm_head.weight", "head.weight")
        if config.tie_word_embeddings
        else Rename("lm_head.weight", "head.weight"),
        Rename(prefix + "input_layernorm.weight", "layers.{i}.attention_norm.weight"),
        Rename(prefix + "post_attention_layernorm.weight", "layers.{i}.mlp_norm.weight"),
        Skip(prefix + "self_attn.rotary_emb.inv_freq", "the frequencies follow from the configuration"),
    ]
    if config.qk_norm:
        rules += [
            Rename(f"{prefix}self_attn.{part}_norm.weight", f"layers.{{i}}.attention.{part}_norm.weight")
            for part in ("q", "k")
        ]
    for kind in ("weight", "bias"):
        attention, mlp = prefix + "self_attn.{}_proj." + kind, prefix + "mlp.{}_proj." + kind
        if kind == "weight" or config.attention_bias:
            parts = (
                Part(_named(attention, "q"), q),
                Part(_named(attention, "k"), kv),
                Part(_named(attention, "v"), kv),
            )
            rules.append(Merge(parts, "layers.{i}.attention.qkv." + kind))
            rules.append(Rename(_named(attention, "o"), "layers.{i}.attention.out." + kind))
        if kind == "weight" or config.mlp_bias:
            size = config.intermediate_size
            rules.append(
                Merge(
                    (Part(_named(mlp, "gate"), size), Part(_named(mlp, "up"), size)), "layers.{i}.mlp.gate_up." + kind
                )
            )
            rules.append(Rename(_named(mlp, "down"), "layers.{i}.mlp.down." + kind))
    return tuple(rules)


def gguf_rules(config: LlamaConfig) -> tuple[Rule, ...]:
    """Names of GGUF's architecture `llama`, whose q and k rows are ordered for interleaved rotary pairs."""
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rules: list[Rule] = [
        Rename("token_embd.weight", "embed.weight"),
        Rename("output_norm.weight", "norm.weight"),
        Tied("output.weight", "head.weight") if config.tie_word_embeddings else Rename("output.weight", "head.weight"),
        Rename("blk.{i}.attn_norm.weight", "layers.{i}.attention_norm.weight"),
        Rename("blk.{i}.ffn_norm.weight", "layers.{i}.mlp_norm.weight"),
        Merge(
            (
                Part("blk.{i}.attn_q.weight", H * D, InterleavedRows(H)),
                Part("blk.{i}.attn_k.weight", K * D, InterleavedRows(K)),
                Part("blk.{i}.attn_v.weight", K * D),
            ),
            "layers.{i}.attention.qkv.weight",
        ),
        Rename("blk.{i}.attn_output.weight", "layers.{i}.attention.out.weight"),
        Merge(
            (
                Part("blk.{i}.ffn_gate.weight", config.intermediate_size),
                Part("blk.{i}.ffn_up.weight", config.intermediate_size),
            ),
            "layers.{i}.mlp.gate_up.weight",
        ),
        Rename("blk.{i}.ffn_down.weight", "layers.{i}.mlp.down.weight"),
    ]
    return tuple(rules)


def _named(pattern: str, part: str) -> str:
    return pattern.replace("{}", part)


def _need(reader: str, config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise ValueError(f"{reader}: the configuration has no {key!r}")
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{reader}: {key} is {value!r}, wanted a number above 0")
    return value


def _with_theta(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with Llama's own base of RoPE where it states none: the first Llamas have no such key."""
    given = (config, config.get("rope_scaling") or {}, config.get("rope_parameters") or {})
    stated = any(place.get("rope_theta") is not None for place in given)
    return config if stated else {**config, "rope_theta": 10000.0}


def _expect(reader: str, key: str, came: Any, known: Sequence[str]) -> None:
    if came not in known:
        raise ValueError(f"{reader}: {key} is {came!r}, wanted {' or '.join(map(repr, known))}")


def _gguf_scaling(metadata: Mapping[str, Any], context: int) -> RopeScaling | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    factor = metadata.get("llama.rope.scaling.factor", 1.0)
    if kind == "none":
        return None
    if kind == "linear":
        return LinearScaling(factor)
    if kind == "yarn":
        return YarnScaling(factor, metadata.get("llama.rope.scaling.original_context_length", context))
    raise ValueError(f"LlamaConfig: llama.rope.scaling.type is {kind!r}, wanted 'none', 'linear' or 'yarn'")
