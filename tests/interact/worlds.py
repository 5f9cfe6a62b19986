"""A scripted world: a dot on a small board, moved by four actions. Everything it answers can be computed by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from longburn.interact import WorldStep

MOVES = [(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)]  # up, down, left, right, wait


class DotWorld:
    """The board is 4 x 6 cells of 4 x 4 pixels; the dot leaves a fading trail of `n` frames a step.

    The episode ends when the dot is in the corner below on the right.
    """

    fps = 8.0
    frame_size = (16, 24)

    def __init__(self, n: int = 2) -> None:
        self.n = n
        self.observation_space = spaces.Box(0, 5, (2,), np.int64)
        self.action_space = spaces.Discrete(5)
        self.asked: list[Any] = []

    def reset(self, *, seed: int, options: Mapping[str, Any] | None = None) -> WorldStep:
        unknown = set(options or {}) - {"at"}
        if unknown:
            raise ValueError(f"DotWorld.reset: option {unknown.pop()!r}, wanted 'at'")
        self.asked.append((seed, dict(options or {})))
        rng = np.random.default_rng(seed)
        self.at = (options or {}).get("at", (int(rng.integers(3)), int(rng.integers(5))))
        self.shade = int(rng.integers(50, 200))
        return WorldStep(np.array(self.at), self._frame()[None])

    def step(self, action: Any) -> WorldStep:
        if not 0 <= int(action) < 5:
            raise ValueError(f"DotWorld.step: action {action}, wanted 0 .. 4")
        self.asked.append(int(action))
        before = self._frame()
        down, right = MOVES[int(action)]
        self.at = min(max(self.at[0] + down, 0), 3), min(max(self.at[1] + right, 0), 5)
        over = self.at == (3, 5)
        frames = np.stack([before] * (self.n - 1) + [self._frame()])
        return WorldStep(np.array(self.at), frames, float(over), over, {"at": self.at})

    def _frame(self) -> np.ndarray:
        frame = np.zeros((16, 24, 3), np.uint8)
        top, left = 4 * self.at[0], 4 * self.at[1]
        frame[top : top + 4, left : left + 4] = (255, self.shade, 0)
        return frame

    @property
    def controls(self) -> Mapping[str, str]:
        return {"w": "up", "s": "down", "a": "left", "d": "right"}

    def action_of(self, keys: Sequence[str]) -> int:
        return "wsad".index(keys[-1]) if keys else 4
