"""Routing on the device: a few tokens a program, their k largest logits one after the other."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longburn.kernels.triton import overlaps

if TYPE_CHECKING:
    from longburn.kernels.route import RouteCall

LOGITS = 2048  # a program


@triton.jit
def _route(
    logits, chosen, weights, n, count, stride, k,
    KP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """k rounds: take the largest logit, then set it aside. A NaN counts as the largest; the weights are then NaN."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert, place = tl.arange(0, BLOCK), tl.arange(0, KP)
    there = row[:, None] < n
    at = row[:, None].to(tl.int64) * stride + expert[None]
    left = tl.load(logits + at, mask=there & (expert < count)[None], other=-float("inf")).to(tl.float32)
    rank = tl.where(left != left, float("inf"), left)
    free = tl.zeros_like(rank).to(tl.int1) | (expert < count)[None]
    top = tl.full((ROWS, KP), -float("inf"), tl.float32)
    best = tl.zeros((ROWS, KP), tl.int32)
    for i in range(k):
        # Logits may all be -inf: what is taken is told apart from what never was there by `free` alone.
        most = tl.max(tl.where(free, rank, -float("inf")), 1)
        index = tl.min(tl.where(free & (rank == most[:, None]), expert[None], BLOCK), 1)
        taken = expert[None] == index[:, None]
        value = tl.sum(tl.where(taken, left, 0.0), 1)
        top = tl.where(place[None] == i, value[:, None], top)
        best = tl.where(place[None] == i, index[:, None], best)
        free = free & (taken == 0)
    used = (place < k)[None]
    first = tl.sum(tl.where(place[None] == 0, top, 0.0), 1)
    share = tl.where(used, tl.exp(top - first[:, None]), 0.0)
    share = share / tl.sum(share, 1)[:, None]
    out = row[:, None].to(tl.int64) * k + place[None]
    tl.store(chosen + out, best.to(tl.int64), mask=there & used)
    tl.store(weights + out, share, mask=there & used)


def route(call: "RouteCall") -> tuple[Tensor, Tensor]:
    """The k largest logits of each token and the softmax over them."""
    logits, (n, count) = call.logits, call.logits.shape
    chosen = torch.empty(n, call.k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(n, call.k, dtype=torch.float32, device=logits.device)
    block = max(triton.next_power_of_2(count), 16)
    rows = 1 if n <= 256 else max(LOGITS // block, 1)
    if n:
        pdl = overlaps(logits.device)
        _route[triton.cdiv(n, rows),](
            *(logits, chosen, weights, n, count, logits.stride(0), call.k),
            KP=triton.next_power_of_2(call.k), BLOCK=block, ROWS=rows, PDL=pdl, num_warps=1, launch_pdl=pdl,
        )  # fmt: skip
    return chosen, weights
