"""The four things that stand between a streaming model and an environment, and what that model must be.

A row of tokens is one environment's episode: its observation's tokens, its action's tokens, the next observation's, and
so on. The features after an observation give the action's first token, those after that one its second.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from longburn.cache import CacheManager, Step
from longburn.sampling import SamplerConfig

if TYPE_CHECKING:
    from gymnasium.spaces import Space


@runtime_checkable
class ObservationEncoder(Protocol):
    """From what environments say to what a model reads."""

    def encode(self, observations: Any) -> Tensor:
        """One time step of B rows, in the form that gymnasium's vector environments have (arrays whose first axis is
        the row, or dictionaries and tuples of them), as embeddings `[B, n, D]` or token ids `[B, n]`; n is constant.

        Raises:
            ValueError: observations of another shape.
        """
        ...


@runtime_checkable
class ActionCodec(Protocol):
    """Between an environment's actions and tokens, both ways.

    Attributes:
        space: the gymnasium space of one row's actions.
        length: tokens of one action, k.
        width: numbers that a head gives for one token, V; of token ids, how many there are.
    """

    space: "Space[Any]"
    length: int
    width: int

    def tokens(self, actions: Any) -> Tensor:
        """The tokens of B rows' actions, int64 `[B, k]` (continuous ones: fp32 `[B, k, d]`).

        Raises:
            ValueError: an action that is not in the space; says which row's.
        """
        ...

    def action(self, tokens: Tensor) -> Any:
        """The actions of B rows, in the form that gymnasium's vector environments take."""
        ...

    def idle(self, batch: int) -> Tensor:
        """The tokens of some action, for rows whose action is ignored."""
        ...

    def restrict(self, logits: Tensor, index: int) -> Tensor:
        """Logits `[B, V]` of an action's token number `index`, with -inf for ids that it cannot be."""
        ...

    def sampler(self, configs: list[SamplerConfig], device: Any) -> "Sampler":
        """A seeded sampler for rows with these settings."""
        ...


@runtime_checkable
class Head(Protocol):
    """From a model's features to what a sampler reads."""

    def logits(self, hidden: Tensor) -> Tensor:
        """`[B, V]` of features `[B, M]`; V is the codec's `width`."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Chooses a token of every row."""

    def __call__(self, logits: Tensor, draw: Tensor) -> Tensor:
        """`[B]` (continuous ones: `[B, d]`) from logits `[B, V]`. `draw` int64 `[B]` counts each row's own choices, so
        that a row's randomness does not depend on its neighbours. A token of -1 (of continuous ones, a number that is
        not finite) says that a row has nothing to choose from."""
        ...


@runtime_checkable
class StreamingModel(Protocol):
    """A model over caches, up to its features."""

    def init_cache(self, batch: int, *, max_length: int | None = None) -> CacheManager:
        """Empty caches for `batch` rows of at most `max_length` positions (None: no end)."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """`[B, n, D]` of tokens `[B, n]`: of actions, and of observations that an encoder gives as ids."""
        ...

    def features(self, x: Tensor, step: Step, cache: CacheManager) -> Tensor:
        """`[B, T, M]` of embeddings `[B, T, D]` at the positions of `step` (-1: no token).

        Writes them to the cache; the caller commits the step.
        """
        ...


@dataclass(frozen=True)
class Agent:
    """A model with all that it needs to act."""

    encoder: ObservationEncoder
    model: StreamingModel
    head: Head
    codec: ActionCodec
