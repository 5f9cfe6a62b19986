"""What a bias policy is: an object that states the additive bias of a call in the cheapest exact form it knows."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from longburn.kernels.attend import BiasTerms, Known
from longburn.kernels.attend.call import AttendCall, visible


class BiasContext(NamedTuple):
    """What a policy may look at. Positions say which token stands where, because a ring's slots are in no order.

    Slots without a token (`k_pos` -1) hold anything in `k` and `extra`, NaN included.
    """

    q_pos: Tensor  # [B|1, T] int64, -1: no token
    k_pos: Tensor  # [B|1, S] int64, -1: empty slot
    q: Tensor  # [B, H, T, D] after rotation
    scale: float = 1.0  # of the scores
    window: int | None = None  # these four: as in `AttnWindow`
    sink_tokens: int = 0
    lookahead: int | None = 0
    block: int = 1
    known: tuple[Known, ...] | None = None  # what the host knows of all queries of the call and its keys
    q_sink: Tensor | None = None  # [B, H, T, D] the queries for keys below sink_tokens, if they differ (relative sinks)
    k: Tensor | None = None  # [B, K, S, D] after rotation; only for a policy that says `keys`
    x: Tensor | None = None  # [B, T, M] what the layer was given; only for the bias that an `Attention` owns
    extra: Tensor | None = None  # [B, C, S] the policy's numbers of every token
    own: Tensor | None = None  # [B, C, T] those of the queries' own tokens

    def visible(self) -> Tensor:
        """Which keys each query sees, `[B|1, 1, T, S]`."""
        return visible(
            AttendCall(
                *(self.q, self.q, self.q, self.q_pos, self.k_pos, self.scale),
                window=self.window,
                sink_tokens=self.sink_tokens,
                lookahead=self.lookahead,
                block=self.block,
            )
        )

    def queries(self, start: int, stop: int) -> "BiasContext":
        """The same for the queries `start .. stop - 1` only."""
        return self._replace(
            q_pos=self.q_pos[:, start:stop],
            q=self.q[:, :, start:stop],
            q_sink=None if self.q_sink is None else self.q_sink[:, :, start:stop],
            x=None if self.x is None else self.x[:, start:stop],
            own=None if self.own is None else self.own[:, :, start:stop],
        )


@runtime_checkable
class BiasPolicy(Protocol):
    """Adds something to the attention scores before the softmax."""

    def terms(self, context: BiasContext) -> BiasTerms:
        """The bias of this call; nothing in it may depend on how the stream was cut into calls."""
        ...


class Policy(nn.Module, ABC):
    """A policy with parameters, numbers of its own for every token, or rows that are large. `Attention(bias=)` owns it.

    Attributes:
        channels: C, numbers that the cache keeps for every token, in at least fp32.
        sums: they are running sums of which only differences matter. The cache keeps those of the newest tokens near 0.
        rows: `terms` writes dense rows, unless `writes_rows` says more. It is then asked for few queries at a time when
            all of them would be large.
        keys: `terms` looks at the keys.
        renews: queries change what is kept for the tokens that they see.
        causal: it is about the keys up to the query; windows with later keys are refused.
        reads_queries: `terms` computes with the queries as they were projected, which `prescale` would change.

    Where it has `heads` or `head_dim`, they are what it was built for, and the layer's must be the same.
    """

    channels: int = 0
    sums: bool = False
    rows: bool = False
    keys: bool = False
    renews: bool = False
    causal: bool = False
    reads_queries: bool = False

    @abstractmethod
    def terms(self, context: BiasContext) -> BiasTerms:
        """The bias of this call; nothing in it may depend on how the stream was cut into calls."""

    def writes_rows(self, context: BiasContext) -> bool:
        """Whether `terms` writes dense rows for this call."""
        return self.rows

    def of_tokens(self, x: Tensor, q: Tensor, k: Tensor, positions: Tensor, previous: Tensor) -> Tensor:
        """What to keep for new tokens, `[B, C, T]`; later tokens never change it, unless the policy `renews` it.

        Args:
            x: `[B, T, M]`, what the layer was given.
            q, k: `[B, H, T, D]` and `[B, K, T, D]` before rotation.
            positions: `[B|1, T]` int64, -1: no token, of which anything may be kept.
            previous: `[B, C]`, what is kept for the token right before the first of these; 0 at the start. As it is all
                that is known of the past, rewinds, resets and passes that are not committed need no other state.
        """
        raise TypeError(f"{type(self).__name__}: keeps {self.channels} numbers a token, but does not say which")

    def renewed(self, context: BiasContext, call: BiasContext) -> Tensor:
        """What to keep for all tokens, `[B, C, S]`, after the queries of the context, which are some or all of those of
        the call."""
        raise TypeError(f"{type(self).__name__}: renews what it keeps, but does not say how")

    def queries(self, q: Tensor) -> Tensor:
        """The queries `[B, H, T, D]` that attend, from the projected (and normed) ones."""
        return q

    @property
    def changes_queries(self) -> bool:
        """Whether it has `queries` of its own."""
        return type(self).queries is not Policy.queries


@dataclass(frozen=True)
class Bound:
    """A policy with what only its layer knows, on its way to `attend`.

    `keep` takes positions `[B|1, S]` and what a policy that `renews` has for the tokens there from now on, `[B, C, S]`.
    """

    policy: BiasPolicy
    x: Tensor
    extra: Tensor | None
    own: Tensor | None
    keep: Callable[[Tensor, Tensor], None] | None = None

    def complete(self, context: BiasContext) -> BiasContext:
        return context._replace(x=self.x, extra=self.extra, own=self.own)
