"""What a bias policy is: an object that states the additive bias of a call in the cheapest exact form it knows."""

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from longburn.kernels.attend import BiasTerms


class BiasContext(NamedTuple):
    """What a policy may look at. Positions say which token stands where, because a ring's slots are in no order."""

    q_pos: Tensor  # [B|1, T] int64, -1: no token
    k_pos: Tensor  # [B|1, S] int64, -1: empty slot
    q: Tensor  # [B, H, T, D] after rotation


@runtime_checkable
class BiasPolicy(Protocol):
    """Adds something to the attention scores before the softmax."""

    def terms(self, context: BiasContext) -> BiasTerms:
        """The bias of this call; nothing in it may depend on how the stream was cut into calls."""
        ...
