"""Choosing one token of each row: the most likely one, or a draw under the settings that a group of rows shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longburn.kernels import triton
from longburn.kernels.registry import Impl, Operation
from longburn.sampling.processors import (
    clean,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_top_p_ranked,
    most_likely,
    pick,
    weigh,
)
from longburn.sampling.uniform import uniform

WIDEST = 1024  # candidates of top-k that one program on the GPU sorts


class DrawCall(NamedTuple):
    """Rows that draw, with their settings as columns `[b, 1]`; None is off for all of them.

    With `width` > 0 all rows use top-k of at most that, and everything after it costs O(width). With 0 none does.
    """

    logits: Tensor  # [b, V]
    draw: Tensor | int  # [b] int64
    stream: Tensor  # [b] int64
    width: int
    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    cut_temperature: Tensor | None = None  # of the weights that top-p and min-p look at; None is the temperature


def _most_likely_reference(logits: Tensor) -> Tensor:
    best, token = clean(logits.float()).max(-1)  # of equal maxima, the first
    return torch.where(best > -torch.inf, token, -1)


@triton.on_its_device
def _most_likely_triton(logits: Tensor) -> Tensor:
    from longburn.kernels.triton.draw import most_likely_token

    return most_likely_token(logits)


def _triton_why_not(logits: Tensor) -> str | None:
    if reason := triton.why_not(logits):
        return reason
    if logits.dtype not in triton.TYPES:
        return f"takes fp32, bf16 or fp16, got {logits.dtype}"
    return None if logits.stride(-1) == 1 and logits.numel() else "logits have gaps, or there are none"


MOST_LIKELY: Operation[Tensor, Tensor] = Operation(
    "most_likely",
    (
        Impl("triton", _most_likely_triton, _triton_why_not),
        Impl("reference", _most_likely_reference, lambda logits: None),
    ),
)


def _draw_reference(call: DrawCall) -> Tensor:
    scores = clean(call.logits.float())
    ids = most_likely(scores, call.width) if call.width else None
    considered = scores if ids is None else scores.gather(-1, ids)
    cut = call.cut_temperature
    mass = weigh(considered, call.temperature if cut is None else cut)
    if call.top_k is not None:
        mass = keep_top_k(mass, call.top_k)
    if call.top_p is not None:
        mass = keep_top_p(mass, call.top_p, scores) if ids is None else keep_top_p_ranked(mass, call.top_p)
    if call.min_p is not None:
        mass = keep_min_p(mass, call.min_p)
    if cut is not None:
        mass = weigh(considered, call.temperature) * (mass > 0)
    index = pick(mass, uniform(call.stream, call.draw))
    return index if ids is None else take(ids, index, missing=-1)


@triton.on_its_device
def _draw_triton(call: DrawCall) -> Tensor:
    from longburn.kernels.triton.draw import Settings, draw
    from longburn.kernels.triton.draw_ranked import draw_ranked

    rows, device = call.logits.shape[0], call.logits.device

    def column(given: Tensor | None, off: float) -> Tensor:
        return torch.full((rows,), off, dtype=torch.float64, device=device) if given is None else given[:, 0]

    at = call.draw if isinstance(call.draw, Tensor) else torch.full((rows,), call.draw, device=device)
    settings = Settings(
        stream=call.stream,
        draw=at,
        temperature=column(call.temperature, 1.0),
        top_k=torch.full((rows,), call.width, device=device) if call.top_k is None else call.top_k[:, 0],
        top_p=None if call.top_p is None else call.top_p[:, 0],
        min_p=column(call.min_p, 0.0),
        cut_temperature=None if call.cut_temperature is None else call.cut_temperature[:, 0],
    )
    return draw_ranked(call.logits, settings, call.width) if call.width else draw(call.logits, settings)


def _draw_triton_why_not(call: DrawCall) -> str | None:
    if call.width > WIDEST:
        return f"sorts {WIDEST} candidates at most, got {call.width}"
    return _triton_why_not(call.logits)


DRAW: Operation[DrawCall, Tensor] = Operation(
    "draw",
    (
        Impl("triton", _draw_triton, _draw_triton_why_not),
        Impl("reference", _draw_reference, lambda call: None),
    ),
)


def take(values: Tensor, index: Tensor, missing: float) -> Tensor:
    """`values[b, index[b]]`, or `missing` where the index is -1."""
    taken = values.gather(-1, index.clamp_min(0)[:, None]).squeeze(-1)
    return torch.where(index >= 0, taken, missing)
