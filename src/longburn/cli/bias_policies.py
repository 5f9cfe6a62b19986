"""The biases that `longburn bias-view` knows by name, each as a fresh layer would have it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

    from longburn.bias import BiasPolicy

PolicyName = Literal[
    "alibi",
    "t5",
    "kerple-log",
    "kerple-power",
    "sandwich",
    "fire",
    "relative",
    "curves",
    "forget",
    "selective",
    "cope",
    "dape",
]


@dataclass(frozen=True)
class Layer:
    """The sizes of the layer that streams: model size, query heads, their size, window and kept sink tokens."""

    dim: int
    heads: int
    head_dim: int
    window: int
    sink_tokens: int


@dataclass(frozen=True)
class Kind:
    """A policy by name.

    Attributes:
        title: name and formula, for query position p and key position j.
        parameters: what they are before any training.
        build: makes it; random parameters come from PyTorch's default generator.
    """

    title: str
    parameters: str
    build: "Callable[[Layer], BiasPolicy]"


def _alibi(layer: Layer) -> "BiasPolicy":
    from longburn.bias import Alibi

    return Alibi(layer.heads)


def _t5(layer: Layer) -> "BiasPolicy":
    from torch.nn.init import normal_

    from longburn.bias import T5Buckets

    policy = T5Buckets(layer.heads)
    normal_(policy.weight)
    return policy


def _kerple_log(layer: Layer) -> "BiasPolicy":
    from longburn.bias import KerpleLog

    return KerpleLog(layer.heads)


def _kerple_power(layer: Layer) -> "BiasPolicy":
    from longburn.bias import KerplePower

    return KerplePower(layer.heads)


def _sandwich(layer: Layer) -> "BiasPolicy":
    from longburn.bias import Sandwich

    return Sandwich(layer.heads)


def _fire(layer: Layer) -> "BiasPolicy":
    from longburn.bias import Fire

    return Fire(layer.heads, length=layer.window)


def _relative(layer: Layer) -> "BiasPolicy":
    from torch.nn.init import normal_

    from longburn.bias import RelativeBias

    policy = RelativeBias(layer.dim, layer.heads, head_dim=layer.head_dim)
    normal_(policy.u)
    normal_(policy.v)
    return policy


def _curves(layer: Layer) -> "BiasPolicy":
    from longburn.bias import DistanceCurves

    policy = DistanceCurves(layer.dim, layer.heads, curves=4, distances=layer.window)
    _draw_smooth(policy.bank)
    return policy


def _forget(layer: Layer) -> "BiasPolicy":
    import torch

    from longburn.bias import ForgetBias

    policy = ForgetBias(layer.dim, layer.heads)
    torch.nn.init.normal_(policy.gate.weight, std=layer.dim**-0.5)
    with torch.no_grad():
        policy.gate.bias.copy_(torch.linspace(0, 6, layer.heads))
    return policy


def _selective(layer: Layer) -> "BiasPolicy":
    from longburn.bias import SelectiveBias

    return SelectiveBias()


def _cope(layer: Layer) -> "BiasPolicy":
    from longburn.bias import Cope

    policy = Cope(layer.head_dim, layer.window)
    _draw_smooth(policy.pos_emb)
    return policy


def _draw_smooth(weight: "Tensor") -> None:
    """Random walks along the last dimension, whose ends spread by 1."""
    import torch

    with torch.no_grad():
        weight.normal_(std=weight.shape[-1] ** -0.5).copy_(weight.cumsum(-1))


def _dape(layer: Layer) -> "BiasPolicy":
    from longburn.bias import Alibi, Dape

    return Dape(Alibi(layer.heads), layer.heads)


NOTHING = "none"
FRESH = "random, as in a new layer"
DRAWN = "drawn from N(0, 1)"
WALKS = "random walks over distance"

# p is the position of the query, j that of the key. What is 0 in a new layer, and so shows nothing, is drawn instead.
KINDS: dict[PolicyName, Kind] = {
    "alibi": Kind("ALiBi: -slope · |p - j|", NOTHING, _alibi),
    "t5": Kind("T5: a learned number for every bucket of distances", DRAWN, _t5),
    "kerple-log": Kind("KERPLE: -a · log(1 + b · |p - j|)", FRESH, _kerple_log),
    "kerple-power": Kind("KERPLE: -a · |p - j|^b", FRESH, _kerple_power),
    "sandwich": Kind("Sandwich: inner products of sinusoidal embeddings", NOTHING, _sandwich),
    "fire": Kind("FIRE: a learned function of the distance as a share of p", FRESH, _fire),
    "relative": Kind("Transformer-XL: (query + v) · W R(p - j)", f"u and v {DRAWN}, W {FRESH}", _relative),
    "curves": Kind(
        "Distance curves that every query mixes for itself", f"curves are {WALKS}, their mixing {FRESH}", _curves
    ),
    "forget": Kind(
        "FoX: every token weakens all before it by its own gate",
        "what goes into the gates is drawn from N(m, 1), m from 0 in the first head to 6 in the last",
        _forget,
    ),
    "selective": Kind("Selective attention: queries of head 1 mask keys for those after them", NOTHING, _selective),
    "cope": Kind("CoPE: positions that count what the query cares for", WALKS, _cope),
    "dape": Kind("DAPE: ALiBi, adapted to the scores across heads", FRESH, _dape),
}
assert tuple(KINDS) == get_args(PolicyName)
