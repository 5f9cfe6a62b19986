"""Reading the RoPE part of a Hugging Face `config.json`.

Both spellings are read: `rope_theta` beside `rope_scaling` (transformers up to 4), and one `rope_parameters` dict that
holds everything, possibly one dict per layer type (transformers 5). A key that is not known here stops the reading: a
scaling that is silently left out gives a model that works on short prompts and fails on long ones.
"""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from longburn.rope.scaling import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    ProportionalScaling,
    RopeScaling,
    YarnScaling,
    is_number,
)


class RopeSettings(NamedTuple):
    """The arguments of `RotaryEncoding` that a config determines."""

    head_dim: int
    theta: float
    rotary_dim: int
    interleaved: bool
    scaling: RopeScaling | None


_SCALINGS: dict[str, type[Any] | None] = {
    "default": None,
    "linear": LinearScaling,
    "ntk": NtkScaling,
    "dynamic": DynamicNtkScaling,
    "yarn": YarnScaling,
    "llama3": Llama3Scaling,
    "longrope": LongRopeScaling,
    "su": LongRopeScaling,  # the name in the first Phi-3 checkpoints
    "proportional": ProportionalScaling,
}

# A field's key is its own name, except for these.
_KEYS = {
    (DynamicNtkScaling, "original_context"): "max_position_embeddings",
    (YarnScaling, "original_context"): "original_max_position_embeddings",
    (Llama3Scaling, "original_context"): "original_max_position_embeddings",
    (LongRopeScaling, "original_context"): "original_max_position_embeddings",
    (ProportionalScaling, "proportion"): "partial_rotary_factor",
}
_COMMON_KEYS = {"rope_type", "rope_theta", "partial_rotary_factor"}
_ALSO_AT_TOP_LEVEL = {
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
}

# Known top-level keys with "rope" or "rotary" in their name. The `no_rope_*` ones say which layers rotate at all: the
# model's business, not the encoding's.
_TOP_LEVEL_KEYS = {
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "rope_interleaved",
    "rope_interleave",
    "no_rope_layers",
    "no_rope_layer_interval",
}


def read_config(config: Mapping[str, Any], layer_type: str | None = None) -> RopeSettings:
    """Return what `config` says about RoPE, for layers of `layer_type` where it differs by layer.

    Raises ValueError, naming the key, for an unknown or missing key, an unknown `rope_type`, or two places of the
    config that contradict each other. A key whose value is None counts as absent.
    """
    top = {key: value for key, value in config.items() if value is not None}
    _reject_unknown("the config", (key for key in top if {"rope", "rotary"} & set(key.split("_"))), _TOP_LEVEL_KEYS)
    params = _rope_dict(top, layer_type)
    rope_type = params.get("rope_type", "default")
    if rope_type not in _SCALINGS:
        raise ValueError(f"RotaryEncoding.from_config: unknown rope_type {rope_type!r}; known are {sorted(_SCALINGS)}")
    kind = _SCALINGS[rope_type]
    settings = {} if kind is None else {_KEYS.get((kind, field.name), field.name): field for field in fields(kind)}
    known = _COMMON_KEYS | settings.keys()
    _reject_unknown(f"rope_type {rope_type!r}", params, known)
    for key in _ALSO_AT_TOP_LEVEL & known & top.keys():
        _put(params, key, top[key])

    if kind is LongRopeScaling and "factor" not in params:
        params |= _stretch(params, top)
    for key, field in settings.items():
        if field.default is MISSING:
            _require(params, key, f"rope_type {rope_type!r} needs it")
    arguments = {settings[key].name: params[key] for key in settings.keys() & params.keys()}

    head_dim = top["head_dim"] if "head_dim" in top else _derived_head_dim(top)
    # Under "proportional" this key is the share of pairs that turn, and every channel takes part in the pairing.
    partial = 1.0 if kind is ProportionalScaling else params.get("partial_rotary_factor", 1.0)
    if not (is_number(partial) and 0 < partial <= 1):
        raise ValueError(f"RotaryEncoding.from_config: partial_rotary_factor = {partial!r}; want a number in (0, 1]")
    return RopeSettings(
        head_dim=head_dim,
        theta=_require(params, "rope_theta", "model classes differ in their default, so state it"),
        rotary_dim=int(head_dim * partial),
        interleaved=top.get("rope_interleaved", top.get("rope_interleave", False)),
        scaling=None if kind is None else kind(**arguments),
    )


def _rope_dict(top: Mapping[str, Any], layer_type: str | None) -> dict[str, Any]:
    """`rope_scaling` and `rope_parameters` (of the layer type) as one flat dict, with "type" renamed to "rope_type"."""
    params: dict[str, Any] = {}
    for source in ("rope_scaling", "rope_parameters"):
        for key, value in _of_layer(top.get(source, {}), layer_type, source).items():
            if value is not None:
                _put(params, "rope_type" if key == "type" else key, value)
    return params


def _of_layer(params: Mapping[str, Any], layer_type: str | None, source: str) -> Mapping[str, Any]:
    """The RoPE dict of one layer type; a flat dict holds for all of them."""
    per_layer = {key for key, value in params.items() if isinstance(value, Mapping)}
    if not per_layer:
        return params
    _reject_unknown(f"{source} by layer type", (key for key in params if params[key] is not None), per_layer)
    if layer_type not in per_layer:
        raise ValueError(
            f"RotaryEncoding.from_config: {source} differs by layer type and has nothing for layer_type = "
            f"{layer_type!r}; want one of {sorted(per_layer)}"
        )
    chosen: Mapping[str, Any] = params[layer_type]
    return chosen


def _stretch(params: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, float]:
    """LongRoPE's factor where the config leaves it out, as Phi-3's do: longest context / original context."""
    longest, original = top.get("max_position_embeddings"), params.get("original_max_position_embeddings")
    return {"factor": max(longest / original, 1.0)} if longest and original else {}


def _derived_head_dim(top: Mapping[str, Any]) -> int:
    why = "head_dim is absent, and is hidden_size / num_attention_heads then"
    return int(_require(top, "hidden_size", why) // _require(top, "num_attention_heads", why))


def _put(params: dict[str, Any], key: str, value: Any) -> None:
    if params.setdefault(key, value) != value:
        raise ValueError(
            f"RotaryEncoding.from_config: {key} is given twice, as {params[key]!r} and as {value!r}; keep one"
        )


def _require(params: Mapping[str, Any], key: str, why: str) -> Any:
    if key not in params:
        raise ValueError(f"RotaryEncoding.from_config: key {key!r} is missing ({why})")
    return params[key]


def _reject_unknown(place: str, keys: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(keys) - set(known)):
        raise ValueError(
            f"RotaryEncoding.from_config: unknown key {', '.join(map(repr, unknown))} in {place}; "
            f"known are {sorted(known)}"
        )
