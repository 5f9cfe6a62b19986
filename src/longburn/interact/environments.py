"""Environments of gymnasium's API as rows: one environment, or a vector of them in any autoreset mode."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from longburn.interact.extras import gymnasium

if TYPE_CHECKING:
    from gymnasium import Env
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv

Flags = NDArray[np.bool_]


class Tick(NamedTuple):
    """What came of one step of B rows.

    Args:
        observations: what is to be acted upon now, in the form of a vector environment.
        begins: rows whose observation is an episode's first.
        waits: rows whose episode has ended and whose next action will be ignored.
        acted: rows whose action was taken.
        rewards: fp64 `[B]`, of the actions taken.
        terminated, truncated: rows whose episode the action ended.
        info: as the environment gives it.
    """

    observations: Any
    begins: Flags
    waits: Flags
    acted: Flags
    rewards: NDArray[np.float64]
    terminated: Flags
    truncated: Flags
    info: dict[str, Any]


class Rows(Protocol):
    """B environments, each a row."""

    batch: int
    observation_space: "Space[Any]"  # of one row, as the next
    action_space: "Space[Any]"

    def reset(self, seed: int | None) -> Tick:
        """Begin an episode in every row: row b is seeded with seed + b, or not at all."""
        ...

    def step(self, actions: Any) -> Tick:
        """Take the actions of all rows; whatever ends begins again, at once or a step later."""
        ...


def rows_of(env: "Env[Any, Any] | VectorEnv[Any, Any, Any]") -> Rows:
    """The environment as rows.

    Raises:
        ValueError: no environment of gymnasium's API, or a vector environment that does not say its autoreset mode.
        ImportError: gymnasium is not installed.
    """
    gym = gymnasium("rows_of")
    if isinstance(env, gym.Env):
        return _Single(env)
    if not isinstance(env, gym.vector.VectorEnv):
        raise ValueError(f"rows_of: {type(env).__name__}: wanted a gymnasium.Env or gymnasium.vector.VectorEnv")
    mode = env.metadata.get("autoreset_mode")
    kinds: dict[Any, Callable[[Any], Rows]] = {
        gym.vector.AutoresetMode.NEXT_STEP: _NextStep,
        gym.vector.AutoresetMode.SAME_STEP: _SameStep,
        gym.vector.AutoresetMode.DISABLED: _Disabled,
    }
    if mode not in kinds:
        raise ValueError(
            f"rows_of: {type(env).__name__} has metadata['autoreset_mode'] {mode!r}; "
            "wanted a member of gymnasium.vector.AutoresetMode"
        )
    return kinds[mode](env)


class _Single:
    """One environment; it is reset as soon as its episode has ended."""

    batch = 1

    def __init__(self, env: "Env[Any, Any]") -> None:
        self._env = env
        self._utils = gymnasium("rows_of").vector.utils
        self.observation_space, self.action_space = env.observation_space, env.action_space

    def reset(self, seed: int | None) -> Tick:
        observation, info = self._env.reset(seed=seed)
        return _first(self._batched(observation), 1, info)

    def step(self, actions: Any) -> Tick:
        action = next(iter(self._utils.iterate(self._utils.batch_space(self.action_space, 1), actions)))
        observation, reward, terminated, truncated, info = self._env.step(action)
        ended = bool(terminated or truncated)
        if ended:
            last, (observation, first) = observation, self._env.reset()
            info = {"final_obs": last, "final_info": info, **first}
        return Tick(
            self._batched(observation),
            begins=np.array([ended]),
            waits=np.array([False]),
            acted=np.array([True]),
            rewards=np.array([float(reward)]),
            terminated=np.array([bool(terminated)]),
            truncated=np.array([bool(truncated)]),
            info=info,
        )

    def _batched(self, observation: Any) -> Any:
        empty = self._utils.create_empty_array(self.observation_space, n=1, fn=np.zeros)
        return self._utils.concatenate(self.observation_space, [observation], empty)


class _Vector(ABC):
    """What the three modes share."""

    def __init__(self, env: "VectorEnv[Any, Any, Any]") -> None:
        self._env = env
        self.batch: int = env.num_envs
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space
        self._reuses = not getattr(env.unwrapped, "copy", True)  # its next step overwrites what it gave

    def reset(self, seed: int | None) -> Tick:
        observations, info = self._env.reset(seed=seed)
        self._waits = np.zeros(self.batch, bool)
        return _first(self._kept(observations), self.batch, info)

    @abstractmethod
    def step(self, actions: Any) -> Tick: ...

    def _stepped(self, actions: Any) -> tuple[Any, NDArray[np.float64], Flags, Flags, dict[str, Any]]:
        observations, rewards, terminated, truncated, info = self._env.step(actions)
        flags = np.asarray(terminated, bool), np.asarray(truncated, bool)
        return self._kept(observations), np.asarray(rewards, np.float64), *flags, info

    def _kept(self, observations: Any) -> Any:
        return deepcopy(observations) if self._reuses else observations


class _NextStep(_Vector):
    """The step after an end returns the next episode's first observation, and ignores the action."""

    def step(self, actions: Any) -> Tick:
        begins = self._waits
        observations, rewards, terminated, truncated, info = self._stepped(actions)
        self._waits = terminated | truncated
        return Tick(observations, begins, self._waits, ~begins, rewards, terminated, truncated, info)


class _SameStep(_Vector):
    """The step that ends an episode returns the next one's first observation."""

    def step(self, actions: Any) -> Tick:
        observations, rewards, terminated, truncated, info = self._stepped(actions)
        ended = terminated | truncated
        return Tick(observations, ended, self._waits, ~self._waits, rewards, terminated, truncated, info)


class _Disabled(_Vector):
    """Rows that ended are reset here, by a mask."""

    def step(self, actions: Any) -> Tick:
        iterate = gymnasium("rows_of").vector.utils.iterate
        observations, rewards, terminated, truncated, info = self._stepped(actions)
        ended = terminated | truncated
        if ended.any():
            last = np.full(self.batch, None, dtype=object)
            for row, observation in enumerate(iterate(self._env.observation_space, observations)):
                last[row] = deepcopy(observation) if ended[row] else None
            observations, first = self._env.reset(options={"reset_mask": ended.copy()})
            observations, info = self._kept(observations), {"final_obs": last, "final_info": info, **first}
        return Tick(observations, ended, self._waits, ~self._waits, rewards, terminated, truncated, info)


def _first(observations: Any, batch: int, info: dict[str, Any]) -> Tick:
    none = np.zeros(batch, bool)
    return Tick(observations, ~none, none, none, np.zeros(batch), none, none, info)
