"""Numbers that a cache keeps for every token beside keys and values, for a bias."""

from typing import NamedTuple

import torch
from torch import Tensor

REBASED = 32  # tokens after which running sums are brought back near 0


class Extra(NamedTuple):
    """C numbers for every token, in at least fp32.

    With `sums` they are running sums of which only differences matter. All that a row holds is then moved by one whole
    number every few tokens, so that those of its newest tokens are near 0: a stream of any length keeps their
    differences as exactly as a short one. (A whole number takes no digits away from what becomes smaller by it.)
    """

    channels: int = 0
    sums: bool = False


NO_EXTRA = Extra()


def span(size: int, extra: Extra) -> int:
    """Tokens that a window of `size` must find: also the one right before a new token, from which its numbers go on."""
    return max(size, 2) if extra.channels else size


def joined(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """Numbers of old tokens and of new ones, where there are any."""
    return None if old is None or new is None else torch.cat([old, new], 2)
