"""A world model as an environment of gymnasium's API."""

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longburn.interact.world import WorldModel, WorldStep

try:
    import gymnasium
except ImportError as error:
    raise ImportError("WorldModelEnv needs gymnasium: pip install 'longburn[env]'") from error


@dataclass(frozen=True)
class Latency:
    """Seconds that something took. Two of them compare equal: a measured time is no part of what was computed."""

    seconds: float = field(compare=False)


class WorldModelEnv(gymnasium.Env[Any, Any]):
    """Steps a world model: an action in; its observation out, and in `info` what a person would see.

    `info` of a step holds "frames" (all since the last step, the oldest first: a tuple of uint8 `[height, width, 3]`),
    "latency" (a `Latency`: the model's time for this step) and what the world itself tells. The episode is truncated
    after `horizon` steps.

    Args:
        world: is this environment's alone.
        horizon: most steps of an episode, at least 1; None for no end.
        render_mode: "rgb_array" (the newest frame), "rgb_array_list" (all since the last call) or None.

    Raises:
        ValueError: a horizon or render mode that there is not.
        ImportError: gymnasium is not installed.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "rgb_array_list"]}  # noqa: RUF012 (gymnasium's own)

    def __init__(self, world: WorldModel, *, horizon: int | None = None, render_mode: str | None = None) -> None:
        if horizon is not None and horizon < 1:
            raise ValueError(f"WorldModelEnv: horizon {horizon}, wanted at least 1, or None for no end")
        if render_mode not in (None, *self.metadata["render_modes"]):
            wanted = ", ".join(map(repr, self.metadata["render_modes"]))
            raise ValueError(f"WorldModelEnv: render_mode {render_mode!r}, wanted {wanted} or None")
        self.world, self.horizon, self.render_mode = world, horizon, render_mode
        self.observation_space, self.action_space = world.observation_space, world.action_space
        self.metadata = {**self.metadata, "render_fps": world.fps}
        self._frames: list[NDArray[np.uint8]] = []
        self._steps: int | None = None  # of this episode; None: it has ended, or none has begun

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; without a seed, with the next of the environment's own random numbers.

        Raises:
            ValueError: options that the world does not know. Nothing has changed then.
        """
        before = deepcopy((self._np_random, self._np_random_seed))
        super().reset(seed=seed)
        of_world = int(self.np_random.integers(2**63))
        began = time.perf_counter()
        try:
            step = self.world.reset(seed=of_world, options=options or None)
        except BaseException:
            self._np_random, self._np_random_seed = before
            raise
        seconds = time.perf_counter() - began
        self._frames, self._steps = [], 0
        return step.observation, self._seen(step, seconds)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one action.

        Raises:
            ValueError: the action is not in the action space. Nothing has changed then.
            gymnasium.error.ResetNeeded: no episode has begun, or it has ended.
        """
        if self._steps is None:
            raise gymnasium.error.ResetNeeded("WorldModelEnv.step: no episode, or it has ended; call reset first")
        if not self.action_space.contains(action):
            raise ValueError(f"WorldModelEnv.step: the action {_told(action)} is not in {self.action_space}")
        began = time.perf_counter()
        step = self.world.step(action)
        seconds = time.perf_counter() - began
        self._steps += 1
        truncated = self.horizon is not None and self._steps >= self.horizon and not step.terminated
        info = self._seen(step, seconds)
        if step.terminated or truncated:
            self._steps = None
        return step.observation, step.reward, step.terminated, truncated, info

    def render(self) -> Any:
        """What the render mode says; None without one."""
        if self.render_mode is None or not self._frames:
            return None
        if self.render_mode == "rgb_array":
            return self._frames[-1].copy()
        frames, self._frames = self._frames, self._frames[-1:]
        return [frame.copy() for frame in frames]

    def _seen(self, step: WorldStep, seconds: float) -> dict[str, Any]:
        frames = step.frames
        wanted = (*self.world.frame_size, 3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or len(frames) == 0 or frames.shape[1:] != wanted:
            raise ValueError(
                f"WorldModelEnv: the world gave frames {frames.dtype} {list(frames.shape)}, wanted uint8 "
                f"[n, {wanted[0]}, {wanted[1]}, 3] with n >= 1"
            )
        kept = self._frames if self.render_mode == "rgb_array_list" else []
        self._frames = [*kept, *frames]
        # A tuple: vector environments stack the arrays of an info, and rows may have different numbers of frames.
        return {**step.info, "frames": tuple(frames.copy()), "latency": Latency(seconds)}


def _told(action: Any) -> str:
    """An action in one line, with the types and shapes of its arrays: they decide, too."""
    if isinstance(action, Mapping):
        return "{" + ", ".join(f"{key!r}: {_told(part)}" for key, part in action.items()) + "}"
    if isinstance(action, np.ndarray):
        return f"{action.dtype} {list(action.shape)} {str(action.tolist())[:80]}"
    return str(action)[:80]
