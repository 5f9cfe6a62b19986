"""Selective attention (Leviathan et al., arXiv 2410.02703): tokens ask those after them to forget others."""

import torch
from torch import Tensor

from longburn.bias.distance import written_out
from longburn.bias.policy import BiasContext, Policy
from longburn.bias.scores import check_causal, scores
from longburn.kernels.attend import BiasTerms

BEFORE, LAST, BEGUN, ENDED = range(4)  # what is kept for a token
MARKS = 2**24 - 1  # positions are told apart by their remainder, which fp32 holds exactly
NEVER = torch.iinfo(torch.int64).max


class SelectiveBias(Policy):
    """The bias `-F` in every head, where F of a query and a key sums `relu(score)` of head 0 over the earlier queries
    that see the key, the key's own excepted. Position 0 is never masked. Nothing is learned for it.

    F is one number a token, which every query adds to. Beside it stands what the last call added and where that call
    began and ended: four numbers a token. So a stream may go on where its last call ended or, as after a pass that was
    not committed or a rewind of it, where that began; from anywhere else F is not known, and it refuses.

    Head 0's scores are computed once more. One query a row is then one number a key; more are rows for one head, which
    stand in order of position within a call.

    Raises:
        ValueError: (when used) a window with later keys, or a stream that goes on from within what its last call wrote
            or from before it.
    """

    channels = 4
    rows = True
    keys = True
    renews = True
    causal = True

    def terms(self, context: BiasContext) -> BiasTerms:
        check_causal("SelectiveBias", context.lookahead, context.block)
        masked = self._masked(context)[:, None]
        if context.q_pos.shape[1] > 1:
            added = _additions(context)
            masked = masked + added.cumsum(1) - added
        return written_out(-masked[None])

    def of_tokens(self, x: Tensor, q: Tensor, k: Tensor, positions: Tensor, previous: Tensor) -> Tensor:
        first = _first(positions)
        _check_goes_on(first, previous)
        new = previous.new_zeros(x.shape[0], self.channels, x.shape[1])
        new[:, BEGUN] = new[:, ENDED] = _mark(first).to(new.dtype)
        return new

    def renewed(self, context: BiasContext, call: BiasContext) -> Tensor:
        first, part = _first(call.q_pos), _first(context.q_pos)
        end = context.q_pos.amax(1, keepdim=True) + 1
        kept = self._kept(context)
        added = _additions(context).sum(1)
        goes_on = first != part  # this part is not the call's first
        before = torch.where(goes_on, kept[:, BEFORE], self._masked(context))
        last = torch.where(goes_on, kept[:, LAST] + added, added)
        marks = [_mark(at).to(kept.dtype).expand_as(before) for at in (first, end)]
        return torch.where((part == NEVER)[:, None], kept, torch.stack([before, last, *marks], 1))

    def _kept(self, context: BiasContext) -> Tensor:
        """What is kept, `[B, 4, S]`; 0 where nothing is."""
        if context.extra is not None:
            return torch.where((context.k_pos >= 0)[:, None], context.extra, 0)
        wide = torch.promote_types(context.q.dtype, torch.float32)
        return context.q.new_zeros(context.q.shape[0], self.channels, context.k_pos.shape[1], dtype=wide)

    def _masked(self, context: BiasContext) -> Tensor:
        """F before the first query of each row, `[B, S]`: without what that query's own call once added."""
        kept = self._kept(context)
        goes_on = kept[:, ENDED] == _mark(_first(context.q_pos)).to(kept.dtype)
        return kept[:, BEFORE] + torch.where(goes_on, kept[:, LAST], 0)


def _additions(context: BiasContext) -> Tensor:
    """What each query adds to F of each key, `[B, T, S]`."""
    assert context.k is not None
    first_head = context._replace(
        q=context.q[:, :1],
        k=context.k[:, :1],
        q_sink=None if context.q_sink is None else context.q_sink[:, :1],
    )
    p, j = context.q_pos[:, :, None], context.k_pos[:, None, :]
    counts = context.visible()[:, 0] & (j > 0) & (j != p)
    return torch.where(counts, scores(first_head)[:, 0].relu(), 0)


def _first(positions: Tensor) -> Tensor:
    """The first position of each row, `[B|1, 1]`; NEVER if it has none."""
    return torch.where(positions < 0, NEVER, positions).amin(1, keepdim=True)


def _mark(position: Tensor) -> Tensor:
    """A position as a number that fp32 holds; 0 is no position."""
    return position % MARKS + 1


def _check_goes_on(first: Tensor, previous: Tensor) -> None:
    """Each row goes on where its last call ended or began."""
    mark = _mark(first)[:, 0]
    begun, ended = previous[:, BEGUN], previous[:, ENDED]
    known = (first[:, 0] == 0) | (first[:, 0] == NEVER) | (ended == 0) | (ended == mark) | (begun == mark)
    message = "SelectiveBias: a row goes on from where its last call neither began nor ended"
    if known.device.type != "cpu":
        torch._assert_async(known.all(), message)
    elif not bool(known.all()):
        row = int((~known).nonzero()[0])
        raise ValueError(
            f"{message}: row {row} at position {int(first.expand(len(known), 1)[row])}; what later queries added to a "
            "token cannot be taken back from there: rewind the whole last call, or reset the row and read it again"
        )
