"""World models: an action goes in, what is then seen comes out.

A `WorldModel` is one stream with a state of its own (its caches); several may share one network. `WorldModelEnv`
(`longburn.interact.env`) offers one as a `gymnasium.Env`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gymnasium.spaces import Space


@dataclass(frozen=True)
class WorldStep:
    """What came of one step, or of a reset. All of it is on the host, so that a step's time is a step's time.

    Args:
        observation: what an agent sees now, a member of the world's `observation_space`.
        frames: uint8 `[n, height, width, 3]`, what a person sees since the last step, the oldest first; n >= 1.
        reward: of this step.
        terminated: the episode has ended; a world without ends never says so.
        info: anything else worth telling.
    """

    observation: Any
    frames: NDArray[np.uint8]
    reward: float = 0.0
    terminated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class WorldModel(Protocol):
    """A model of what follows an action."""

    @property
    def observation_space(self) -> "Space[Any]":
        """The gymnasium space of observations; gymnasium is imported when somebody asks."""
        ...

    @property
    def action_space(self) -> "Space[Any]":
        """The gymnasium space of actions."""
        ...

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of every frame, in pixels."""
        ...

    @property
    def fps(self) -> float:
        """Frames a second at which its frames are meant to be seen."""
        ...

    def reset(self, *, seed: int, options: Mapping[str, Any] | None = None) -> WorldStep:
        """Begin again. The same seed and options, and then the same actions, give the same steps.

        Args:
            seed: in [0, 2**63).
            options: of this kind of world, such as a start image.

        Raises:
            ValueError: an option it does not know, or one that does not fit. The world is then as it was.
        """
        ...

    def step(self, action: Any) -> WorldStep:
        """What follows one action.

        Raises:
            ValueError: no action of this world. The world is then as it was.
        """
        ...


@runtime_checkable
class PlayableWorld(WorldModel, Protocol):
    """A world that a person can play by keys."""

    @property
    def controls(self) -> Mapping[str, str]:
        """What each key does, in the order to be shown: {"w": "forward", "left": "turn left", ...}.

        Keys are single characters, or "up", "down", "left", "right", "space", "enter". "q", "p" and "escape" belong to
        the player.
        """
        ...

    def action_of(self, keys: Sequence[str]) -> Any:
        """The action for the keys that were pressed since the last step, in order; for none of them, waiting."""
        ...
