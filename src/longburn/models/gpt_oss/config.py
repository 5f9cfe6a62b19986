"""The sizes of a GPT-OSS model, read from either form of its `config.json` and written back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longburn.cache import AttnWindow, WindowPolicy
from longburn.rope import RotaryEncoding, YarnScaling, ntk_yarn

SLIDING, FULL = "sliding_attention", "full_attention"

# OpenAI's flat keys of RoPE, and what Hugging Face calls them inside `rope_scaling` or `rope_parameters`.
_FLAT_ROPE = {
    "rope_scaling_factor": "factor",
    "rope_ntk_alpha": "beta_slow",
    "rope_ntk_beta": "beta_fast",
    "initial_context_length": "original_max_position_embeddings",
}
_SIZES = (  # under one name in both forms
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
)
_YARN_DEFAULTS = {"beta_slow": 1.0, "beta_fast": 32.0}


@dataclass(frozen=True)
class GptOssConfig:
    """A model's sizes, under the names of OpenAI's `config.json`, and of Hugging Face's for what only that one states.

    `sliding_window` counts the query itself. `layer_types` holds "sliding_attention" or "full_attention" for every
    layer; None is a window in layers 0, 2, 4, ... as released.

    Raises:
        ValueError: layer types that are unknown or not one a layer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    sliding_window: int
    rope: RotaryEncoding
    max_position_embeddings: int = 131072
    layer_types: tuple[str, ...] | None = None
    rms_norm_eps: float = 1e-5
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    def __post_init__(self) -> None:
        types = _alternating(self.num_hidden_layers) if self.layer_types is None else tuple(self.layer_types)
        if len(types) != self.num_hidden_layers or not {SLIDING, FULL}.issuperset(types):
            raise ValueError(
                f"GptOssConfig: layer_types is {list(types)}, wanted {SLIDING!r} or {FULL!r} for each of "
                f"{self.num_hidden_layers} layers"
            )
        object.__setattr__(self, "layer_types", types)

    @classmethod
    def gpt_oss_20b(cls) -> "GptOssConfig":
        """The sizes of gpt-oss-20b: 20.9 billion parameters, 3.6 of them active for a token."""
        return _released(layers=24, experts=32)

    @classmethod
    def gpt_oss_120b(cls) -> "GptOssConfig":
        """The sizes of gpt-oss-120b: 116.8 billion parameters, 5.1 of them active for a token."""
        return _released(layers=36, experts=128)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "GptOssConfig":
        """From the dictionary of a `config.json`: OpenAI's original (flat), or Hugging Face's.

        Keys that say the same thing twice are read if they agree. Keys with None count as absent.

        Raises:
            ValueError: names the key: missing, out of range, contradicted by another, unknown with "rope" in it, or a
                setting that GPT-OSS does not have.
        """
        given = {key: value for key, value in config.items() if value is not None}
        for key, wanted in (("model_type", "gpt_oss"), ("attention_bias", True), ("tie_word_embeddings", False)):
            if given.get(key, wanted) != wanted:
                raise ValueError(f"GptOssConfig: {key} is {given[key]!r}, wanted {wanted!r}")
        rope = RotaryEncoding.from_config(_nested_rope(given))
        scaling = rope.scaling
        stretched = int(scaling.factor * scaling.original_context) if isinstance(scaling, YarnScaling) else 131072
        return cls(
            **{name: _size(given, name) for name in _SIZES},
            num_experts=_size(given, "num_experts", "num_local_experts"),
            experts_per_token=_size(given, "experts_per_token", "num_experts_per_tok"),
            rope=rope,
            max_position_embeddings=given.get("max_position_embeddings", stretched),
            layer_types=given.get("layer_types"),
            rms_norm_eps=_positive(given, "rms_norm_eps", 1e-5),
            swiglu_alpha=_positive(given, "swiglu_alpha", 1.702),
            swiglu_limit=_positive(given, "swiglu_limit", 7.0),
        )

    def policy(self, full: AttnWindow | None = None) -> WindowPolicy:
        """The window of every layer: `sliding_window` where the model has one, `full` (default all keys) elsewhere."""
        sliding, elsewhere = AttnWindow(self.sliding_window), full or AttnWindow()
        assert self.layer_types is not None
        return WindowPolicy.explicit([sliding if kind == SLIDING else elsewhere for kind in self.layer_types])

    def to_original(self) -> dict[str, Any]:
        """The `config.json` of OpenAI's format.

        Raises:
            ValueError: a setting for which that format has no key.
        """
        fixed = {
            "layer_types": (self.layer_types, _alternating(self.num_hidden_layers)),
            "rms_norm_eps": (self.rms_norm_eps, 1e-5),
            "swiglu_alpha": (self.swiglu_alpha, 1.702),
            "truncate": (self._yarn.truncate, False),
            "attention_factor": (self._yarn.attention_factor, None),
        }
        for key, (came, wanted) in fixed.items():
            if came != wanted:
                raise ValueError(
                    f"GptOssConfig.to_original: the format fixes {key} to {wanted}, this model's is {came}"
                )
        rope = self._rope_parameters()
        return self._sizes() | {
            "num_experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
            "swiglu_limit": self.swiglu_limit,
            "rope_theta": self.rope.theta,
            **{flat: rope[nested] for flat, nested in _FLAT_ROPE.items()},
        }

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of Hugging Face's `GptOssForCausalLM`; says nothing of quantisation."""
        return self._sizes() | {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "layer_types": list(self.layer_types or ()),
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "swiglu_alpha": self.swiglu_alpha,
            "swiglu_limit": self.swiglu_limit,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "hidden_act": "silu",  # what the released files say, though the activation is the clamped SwiGLU
            "rope_theta": self.rope.theta,
            "rope_scaling": self._rope_parameters(),
        }

    def _sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _SIZES}

    @property
    def _yarn(self) -> YarnScaling:
        if not isinstance(self.rope.scaling, YarnScaling):
            raise ValueError(f"GptOssConfig: cannot write the RoPE scaling {self.rope.scaling}, only YaRN")
        return self.rope.scaling

    def _rope_parameters(self) -> dict[str, Any]:
        yarn = self._yarn
        stated = {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "truncate": yarn.truncate,
            "original_max_position_embeddings": yarn.original_context,
            "attention_factor": yarn.attention_factor,
        }
        return {key: value for key, value in stated.items() if value is not None}


def is_gpt_oss(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of this architecture. OpenAI's says so only by its keys."""
    return bool(config.get("model_type", "gpt_oss" if "rope_ntk_alpha" in config else None) == "gpt_oss")


def _released(*, layers: int, experts: int) -> GptOssConfig:
    return GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_experts=experts,
        experts_per_token=4,
        sliding_window=128,
        rope=ntk_yarn(64, theta=150_000.0, factor=32.0, original_context=4096, truncate=False),
    )


def _alternating(layers: int) -> tuple[str, ...]:
    return tuple(FULL if layer % 2 else SLIDING for layer in range(layers))


def _nested_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with OpenAI's flat keys of RoPE as Hugging Face nests them.

    Raises:
        ValueError: no scaling at all (a model that loses YaRN works on short prompts only), or two that differ.
    """
    flat = {name: config[key] for key, name in _FLAT_ROPE.items() if key in config}
    rest = {key: value for key, value in config.items() if key not in _FLAT_ROPE}
    place = next((key for key in ("rope_parameters", "rope_scaling") if rest.get(key)), None)
    if place is None:
        if missing := [key for key in _FLAT_ROPE if key not in config]:
            raise ValueError(
                f"GptOssConfig: the configuration has neither rope_scaling nor rope_parameters, nor {missing[0]!r}"
            )
        return rest | {"rope_scaling": {"rope_type": "yarn", "truncate": False, **flat}}
    nested = {key: value for key, value in rest[place].items() if value is not None}
    if nested.get("rope_type", nested.get("type")) == "yarn":
        stated = _YARN_DEFAULTS | nested
        for key, name in _FLAT_ROPE.items():
            if name in flat and stated.setdefault(name, flat[name]) != flat[name]:
                raise ValueError(
                    f"GptOssConfig: {key} is {flat[name]!r}, but {place} says {name} = {stated[name]!r}; keep one"
                )
        rest[place] = stated
    elif flat.get("factor", 1) != 1:
        raise ValueError(f"GptOssConfig: rope_scaling_factor is {flat['factor']!r}, but {place} has no YaRN; keep one")
    return rest


def _size(config: Mapping[str, Any], *names: str) -> int:
    """The count that the configuration holds under one or several of these names."""
    found = {name: config[name] for name in names if name in config}
    if not found:
        raise ValueError(f"GptOssConfig: the configuration has no {' or '.join(map(repr, names))}")
    for name, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"GptOssConfig: {name} is {value!r}, wanted a whole number of at least 1")
    if len(set(found.values())) > 1:
        listed = " but ".join(f"{name} is {value}" for name, value in found.items())
        raise ValueError(f"GptOssConfig: {listed}; they mean the same, keep one")
    return int(found.popitem()[1])


def _positive(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"GptOssConfig: {name} is {value!r}, wanted a number above 0")
    return float(value)
