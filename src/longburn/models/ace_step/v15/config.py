"""The sizes of an ACE-Step 1.5 model, read from the official `config.json` or from those of a diffusers pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longburn.cache import AttnWindow
from longburn.rope import RotaryEncoding

SLIDING, FULL = "sliding_attention", "full_attention"
FRAME_RATE = 25  # latent frames a second

_SIZES = (  # that every configuration states
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_ENCODER = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")  # the encoders' own
_DEFAULTS = {
    "in_channels": 192,
    "audio_acoustic_hidden_dim": 64,
    "patch_size": 2,
    "text_hidden_dim": 1024,
    "timbre_hidden_dim": 64,
    "timbre_fix_frame": 750,
    "num_lyric_encoder_hidden_layers": 8,
    "num_timbre_encoder_hidden_layers": 4,
    "num_attention_pooler_hidden_layers": 2,
    "pool_window_size": 5,
}
_PARTS = {  # diffusers' class names
    "transformer": "AceStepTransformer1DModel",
    "condition_encoder": "AceStepConditionEncoder",
    "audio_tokenizer": "AceStepAudioTokenizer",
    "audio_token_detokenizer": "AceStepAudioTokenDetokenizer",
}


@dataclass(frozen=True)
class AceStep15Config:
    """A model's sizes, under the names of the official `config.json`.

    `hidden_size`, heads and so on are the diffusion transformer's. `encoder_*` are those of everything around it:
    encoders of conditions, tokenizer and detokenizer. `sliding_window` is a count of neighbours on each side (None: all
    layers see everything). `layer_types` holds "sliding_attention" or "full_attention" for every layer of the
    transformer; the n layers of an encoder are of the first n types.

    Raises:
        ValueError: sizes that do not fit together, and layer types that are unknown or not one a layer.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    encoder_hidden_size: int
    encoder_intermediate_size: int
    encoder_num_attention_heads: int
    encoder_num_key_value_heads: int
    rope: RotaryEncoding
    layer_types: tuple[str, ...]
    sliding_window: int | None = 128
    rms_norm_eps: float = 1e-6
    in_channels: int = 192
    audio_acoustic_hidden_dim: int = 64
    patch_size: int = 2
    text_hidden_dim: int = 1024
    timbre_hidden_dim: int = 64
    timbre_fix_frame: int = 750
    num_lyric_encoder_hidden_layers: int = 8
    num_timbre_encoder_hidden_layers: int = 4
    num_attention_pooler_hidden_layers: int = 2
    pool_window_size: int = 5
    fsq_input_levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    is_turbo: bool = False
    model_version: str = ""

    def __post_init__(self) -> None:
        if len(self.layer_types) != self.num_hidden_layers or not {SLIDING, FULL}.issuperset(self.layer_types):
            raise ValueError(
                f"AceStep15Config: layer_types is {list(self.layer_types)}, wanted {SLIDING!r} or {FULL!r} for each of "
                f"{self.num_hidden_layers} layers"
            )
        deepest = max(
            self.num_lyric_encoder_hidden_layers,
            self.num_timbre_encoder_hidden_layers,
            self.num_attention_pooler_hidden_layers,
        )
        if deepest > self.num_hidden_layers:
            raise ValueError(
                f"AceStep15Config: an encoder of {deepest} layers beside a transformer of {self.num_hidden_layers}: "
                "layer_types says nothing of the others"
            )
        if self.in_channels <= self.audio_acoustic_hidden_dim:
            raise ValueError(
                f"AceStep15Config: in_channels is {self.in_channels}, wanted more than the "
                f"{self.audio_acoustic_hidden_dim} of the latents: the context's are among them"
            )
        if min(self.fsq_input_levels, default=0) < 2:
            raise ValueError(f"AceStep15Config: fsq_input_levels is {self.fsq_input_levels}, wanted at least 2 each")

    @classmethod
    def released(cls, name: str) -> "AceStep15Config":
        """The sizes of a released model: "base", "sft", "turbo" (2 billion parameters), "xl-base" and so on (4).

        Raises:
            ValueError: another name.
        """
        size, _, version = name.rpartition("-")
        if size not in ("", "xl") or version not in ("base", "sft", "turbo"):
            raise ValueError(
                f"AceStep15Config: no release {name!r}; there are base, sft and turbo, and xl- before each"
            )
        small = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8}
        large = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8}
        return cls.from_config(
            {
                **(large if size else small),
                **{f"encoder_{key}": value for key, value in small.items()},
                "num_hidden_layers": 32 if size else 24,
                "head_dim": 128,
                "is_turbo": version == "turbo",
                "model_version": version,
            }
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AceStep15Config":
        """From the dictionary of the official `config.json`. Keys with None count as absent.

        Raises:
            ValueError: names the key: missing, out of range, or a setting that this architecture does not have.
        """
        given = {key: value for key, value in config.items() if value is not None}
        for key, wanted in (("attention_bias", False), ("fsq_input_num_quantizers", 1), ("hidden_act", "silu")):
            if given.get(key, wanted) != wanted:
                raise ValueError(f"AceStep15Config: {key} is {given[key]!r}, wanted {wanted!r}")
        sizes = {name: _count(given, name) for name in _SIZES}
        encoder = {f"encoder_{name}": _count(given, f"encoder_{name}", sizes[name]) for name in _ENCODER}
        inner = encoder["encoder_hidden_size"]
        if (fsq := _count(given, "fsq_dim", inner)) != inner:
            raise ValueError(f"AceStep15Config: fsq_dim is {fsq}, wanted the encoders' size {inner}")
        layers = sizes["num_hidden_layers"]
        types = given.get("layer_types", [FULL if layer % 2 else SLIDING for layer in range(layers)])
        return cls(
            **sizes,
            **encoder,
            **{name: _count(given, name, default) for name, default in _DEFAULTS.items()},
            rope=_rope(given),
            layer_types=tuple(types),
            sliding_window=_count(given, "sliding_window", 128) if given.get("use_sliding_window", True) else None,
            rms_norm_eps=float(given.get("rms_norm_eps", 1e-6)),
            fsq_input_levels=tuple(given.get("fsq_input_levels", (8, 8, 8, 5, 5, 5))),
            is_turbo=bool(given.get("is_turbo", given.get("model_version") == "turbo")),
            model_version=str(given.get("model_version", "")),
        )

    @classmethod
    def from_diffusers(cls, parts: Mapping[str, Mapping[str, Any]]) -> "AceStep15Config":
        """From the `config.json` of a diffusers pipeline's parts, by their directories' names.

        Args:
            parts: "transformer" and "condition_encoder"; "audio_tokenizer" and "audio_token_detokenizer" if there.

        Raises:
            ValueError: a part that is missing or of another class, parts that disagree, and what `from_config` finds.
        """
        stated = {part: {k: v for k, v in config.items() if v is not None} for part, config in parts.items()}
        for part in ("transformer", "condition_encoder"):
            if part not in stated:
                raise ValueError(f"AceStep15Config.from_diffusers: no {part}; there are {', '.join(stated) or 'none'}")
        for part, config in stated.items():
            if (came := config.get("_class_name", _PARTS.get(part))) != _PARTS.get(part):
                raise ValueError(f"AceStep15Config.from_diffusers: {part} is a {came!r}, wanted {_PARTS.get(part)!r}")
        merged: dict[str, Any] = {}
        for part, config in stated.items():
            own = _in_official_names(part, config)
            for key, value in own.items():
                if merged.setdefault(key, value) != value:
                    raise ValueError(
                        f"AceStep15Config.from_diffusers: {key} is {value!r} in {part}, but {merged[key]!r} elsewhere"
                    )
        return cls.from_config(merged)

    @property
    def context_channels(self) -> int:
        """Of the context: source latents and mask of what is to be made."""
        return self.in_channels - self.audio_acoustic_hidden_dim

    def window(self, layer: int) -> AttnWindow:
        """What the queries of a layer see: `sliding_window` neighbours on both sides, or everything."""
        if self.layer_types[layer] == FULL or self.sliding_window is None:
            return AttnWindow.two_sided()
        return AttnWindow.two_sided(self.sliding_window, self.sliding_window)


def _in_official_names(part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A part's settings as the official file has them. Types of an encoder's layers are the first of the others'."""
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    if part == "transformer":
        return own
    own.pop("layer_types", None)
    return {f"encoder_{key}" if key in _ENCODER else key: value for key, value in own.items()}


def _rope(config: Mapping[str, Any]) -> RotaryEncoding:
    own = {key: value for key, value in config.items() if "rope" in key}
    theta = {} if "rope_theta" in own or "rope_parameters" in own else {"rope_theta": 1e6}
    return RotaryEncoding.from_config({"head_dim": config["head_dim"], **own, **theta})


def _count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if value is None:
        raise ValueError(f"AceStep15Config: the configuration has no {name!r}; wanted that of ACE-Step 1.5")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"AceStep15Config: {name} is {value!r}, wanted a whole number of at least 1")
    return value
