"""The arithmetic of sampling as pure functions of tensors; `longburn.sampling.sample` puts them in order.

Two choices make a row's result independent of its batch mates and of the kernels that torch picks:

- *Order is exact.* Tokens are ordered by logit, then by lowest id, through one int64 key per token. No two keys are
  equal, so `topk` needs no stability and ties have one result.
- *Mass is an integer.* A token's weight is its probability relative to the most likely token in units of 2**-42.
  Integer sums do not depend on the order of addition, so cumulative sums are the same alone and batched, and padding
  with zeros cannot move a draw. Rounding down costs less than V * 2**-42 in total variation (1.2e-8 for V = 49152);
  a token below 2**-42 = 2.3e-13 of the most likely one is never drawn.

Letters: B rows, V vocabulary, n candidates (V, or as many as top-k keeps).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FULL_WEIGHT = 2**42  # weight of the most likely token
MAX_VOCABULARY = 2**20  # so that the weights of a row sum to less than 2**63
_DIGIT_BITS = 11  # three digits make 32 bits, and a histogram fits the first-level cache
_BLOCK = 64


def clean(logits: Tensor) -> Tensor:
    """NaN becomes -inf (no candidate), +inf the largest finite float (several such tokens share the probability)."""
    return torch.nan_to_num(logits, nan=-torch.inf, posinf=torch.finfo(logits.dtype).max, neginf=-torch.inf)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive and multiply negative logits of `seen` tokens by `penalty` (CTRL, arXiv:1909.05858, section 4.1).

    Shapes: logits and seen (bool) `[B, V]`, penalty `[B, 1]`.
    """
    penalised = logits.clamp_min(0) / penalty + logits.clamp_max(0) * penalty  # one of the two terms is 0
    return torch.where(seen, penalised, logits)


def penalise_frequency(logits: Tensor, counts: Tensor, penalty: Tensor) -> Tensor:
    """Subtract `penalty` `[B, 1]` once per occurrence, from logits and counts `[B, V]` (OpenAI's API)."""
    return logits - counts * penalty


def penalise_presence(logits: Tensor, counts: Tensor, penalty: Tensor) -> Tensor:
    """Subtract `penalty` `[B, 1]` once if there is any occurrence, from logits and counts `[B, V]` (OpenAI's API)."""
    return logits - counts.clamp_max(1) * penalty


def most_likely(logits: Tensor, n: int) -> Tensor:
    """Ids `[B, n]` of the n largest float32 logits `[B, V]`, largest first, lowest id first among equals."""
    vocab_size = logits.shape[-1]
    if n * _BLOCK < vocab_size:
        # Only the n blocks with the largest maxima can hold one of the n largest, so look at those alone.
        padded = F.pad(logits, (0, -vocab_size % _BLOCK), value=-torch.inf)
        blocks = padded.view(len(logits), -1, _BLOCK)
        chosen = most_likely(blocks.amax(-1), n).sort(-1).values  # in order of ids, for the ties
        found = most_likely(blocks.gather(1, chosen[..., None].expand(-1, -1, _BLOCK)).flatten(1), n)
        return chosen.gather(-1, found // _BLOCK) * _BLOCK + found % _BLOCK
    keys = (_sortable(logits).long() << 31) - torch.arange(vocab_size, device=logits.device)
    return -keys.topk(n).values & (2**31 - 1)


def weigh(logits: Tensor, temperature: Tensor | None = None) -> Tensor:
    """Integer weights `[B, n]`: `exp((logit - max) / temperature)` in float64, in units of 2**-42, rounded down.

    The most likely token weighs exactly `FULL_WEIGHT`; a row of -inf weighs nothing. Temperature `[B, 1]` float64 > 0.
    """
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)  # -inf - -inf would be NaN
    exponent = logits.double().sub_(top)
    if temperature is not None:
        exponent = exponent.div_(temperature)
    return exponent.exp_().mul_(FULL_WEIGHT).long()


def keep_top_k(ranked: Tensor, k: Tensor) -> Tensor:
    """Zero all but the first `k` `[B, 1]` of weights `[B, n]` ranked from most to least likely."""
    return ranked * (torch.arange(ranked.shape[-1], device=ranked.device) < k)


def keep_top_p_ranked(ranked: Tensor, p: Tensor) -> Tensor:
    """Zero ranked weights `[B, n]` that follow after the mass has reached `p` `[B, 1]` of the total."""
    mass = ranked.cumsum(-1)
    return ranked * (mass - ranked < _share(mass[:, -1:], p))


def keep_top_p(weights: Tensor, p: Tensor, logits: Tensor) -> Tensor:
    """`keep_top_p_ranked` for weights `[B, V]` in the order of ids, without a sort of a large vocabulary.

    A radix selection by mass, O(V): the logit at which the mass reaches `p` is found digit by digit, each from a
    histogram of the weights over the logits still in question. Of several tokens at that logit the first are kept.
    """
    if weights.shape[-1] <= 2**_DIGIT_BITS:  # a sort costs less than the histograms
        ids = most_likely(logits, weights.shape[-1])
        return torch.zeros_like(weights).scatter_(-1, ids, keep_top_p_ranked(weights.gather(-1, ids), p))
    key = _sortable(logits).long() + 2**31  # 0 .. 2**32 - 1
    wanted = _share(weights.sum(-1, keepdim=True), p)
    cutoff = torch.zeros_like(wanted)
    for shift in range(2 * _DIGIT_BITS, -1, -_DIGIT_BITS):
        # Bin 0 takes all that lies below the logits in question, the last bin all that lies above.
        bins = ((key >> shift) - ((cutoff >> shift) - 1)).clamp_(0, 2**_DIGIT_BITS + 1)
        found, above = _crossing(bins, weights, wanted)
        cutoff = cutoff + (found - 1 << shift)
    tied = weights * (key == cutoff)
    early = tied.cumsum(-1) - tied < wanted - above
    return weights * ((key > cutoff) | (early & (tied > 0)))


def keep_min_p(weights: Tensor, min_p: Tensor) -> Tensor:
    """Zero weights `[B, n]` below `min_p` `[B, 1]` times the weight of the most likely token (arXiv:2407.01082)."""
    return weights * (weights >= (min_p * FULL_WEIGHT).long())


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index `[B]` at which the cumulative weight passes the share `uniform` `[B]` of the total; -1 if that is zero.

    Inverse transform sampling over the weights `[B, n]` in the order they come; `uniform` in [0, 1).
    """
    mass = weights.cumsum(-1)
    total = mass[:, -1:]
    target = (uniform[:, None] * total).long()  # below the total: uniform is at least 2**-53 below 1
    index = torch.searchsorted(mass, target, right=True)
    return torch.where(total > 0, index, -1).squeeze(-1)


def _share(total: Tensor, p: Tensor) -> Tensor:
    """The least integer mass that is at least `p` of `total`, within 1 .. max(total, 1)."""
    # A total beyond 2**53 loses bits in the product; p = 1 must keep every token all the same.
    return torch.where(p < 1, (total * p).ceil().long().minimum(total), total).clamp_min(1)


def _sortable(logits: Tensor) -> Tensor:
    """int32 that compares as the float32 does: the bits of a negative number are flipped below the sign."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0: the two are equal
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _crossing(bins: Tensor, mass: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The largest bin `[B, 1]` such that the bins from it on have the `wanted` mass, and the mass above that bin."""
    up_to = mass.new_zeros(len(mass), 2**_DIGIT_BITS + 2).scatter_add_(-1, bins, mass).cumsum_(-1)
    total = up_to[:, -1:]
    found = torch.searchsorted(up_to, total - wanted, right=True)
    return found, total - up_to.gather(-1, found)
