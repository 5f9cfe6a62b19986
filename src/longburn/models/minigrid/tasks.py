"""MiniGrid's memory task, as it is or with a gate in the hallway, and somebody who knows how it is done."""

from functools import lru_cache
from typing import Any

import numpy as np

from longburn.models.minigrid.cells import EAST, FORWARD, LEFT, NORTH, RIGHT, SOUTH, WAIT, WEST
from longburn.models.minigrid.extras import minigrid

OUT_OF_SIGHT = 8  # the first column from which the first object is not in view, whichever way the agent looks


def memory_task(
    size: int = 13, *, random_length: bool = False, gate: int | tuple[int, int] | None = None, **settings: Any
) -> Any:
    """MiniGrid's `MemoryEnv`: `MiniGrid-MemoryS13-v0` by default.

    Args:
        size: of the map, odd, at least 7.
        random_length: hallways of random length, as in `MiniGrid-MemoryS17Random-v0`.
        gate: a door at the end of the hallway is locked until this step, or until one of (first, last) that is drawn
            at each reset; None is no door. MiniGrid's own task has none: with it, the environment says how long there
            is something to remember.
        settings: further ones of `MemoryEnv`, such as `max_steps` or `render_mode`.

    Raises:
        ImportError: minigrid is not installed.
        ValueError: a size that makes no such map, or a gate before the first step.
    """
    if size < 7 or size % 2 == 0:
        raise ValueError(f"memory_task: size {size}, wanted an odd number of cells, at least 7")
    opens = None if gate is None else gate if isinstance(gate, tuple) else (gate, gate)
    if opens is not None and not (_whole(opens) and len(opens) == 2 and 1 <= opens[0] <= opens[1]):
        raise ValueError(
            f"memory_task: gate {gate!r}, wanted the step at which it opens, a whole number of at least 1, "
            "or (first, last)"
        )
    if opens is not None:
        settings.setdefault("max_steps", int(opens[1]) + 5 * size**2)
    env = minigrid("minigrid.envs", "memory_task").MemoryEnv(size=size, random_length=random_length, **settings)
    return env if opens is None else _gated()(env, opens)


def _whole(numbers: tuple[Any, ...]) -> bool:
    return all(isinstance(number, int | np.integer) for number in numbers)


@lru_cache(maxsize=1)
def _gated() -> Any:
    import gymnasium

    objects = minigrid("minigrid.core.world_object", "memory_task")

    class Gated(gymnasium.Wrapper[Any, Any, Any, Any]):
        """A locked door where the hallway ends, which opens by itself when it is time."""

        def __init__(self, env: Any, opens: tuple[int, int]) -> None:
            super().__init__(env)
            self.between = opens

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[Any, dict[str, Any]]:
            _, info = self.env.reset(seed=seed, options=options)
            inner: Any = self.unwrapped
            self.opens = int(inner.np_random.integers(self.between[0], self.between[1] + 1))
            self.door = objects.Door("grey", is_locked=True)
            place = hallway_end(inner), inner.height // 2
            inner.grid.set(*place, self.door)
            if tuple(inner.agent_pos) == place:
                inner.agent_pos = np.array((place[0] - 1, place[1]))
            return inner.gen_obs(), info

        def step(self, action: Any) -> Any:
            inner: Any = self.unwrapped
            if inner.step_count + 1 >= self.opens:
                self.door.is_open, self.door.is_locked = True, False
            return self.env.step(action)

    return Gated


def hallway_end(env: Any) -> int:
    """The column of the hallway's last cell."""
    return int(env.success_pos[0]) - 1


def first_object(env: Any) -> tuple[int, int]:
    """Where the object of the first room stands."""
    return 1, env.unwrapped.height // 2 - 1


def sees_first_object(env: Any) -> bool:
    """Whether the object of the first room is in the agent's view."""
    env, there = env.unwrapped, first_object(env)
    x, y = env.get_view_coords(*there)
    size = env.agent_view_size
    if not (0 <= x < size and 0 <= y < size):
        return False
    shown: bool = env.gen_obs()["image"][x, y, 0] == env.grid.get(*there).encode()[0]
    return shown


class Expert:
    """Goes to look at the first object, then to the one like it; walks up and down while a gate is closed.

    It sees the whole map. What it does can still be told from an agent's view and from whether the agent has looked
    already, but for the last turn: that takes the memory of what stood in the first room.

    Args:
        env: a `memory_task`, right after its reset.
        rng: for its detours.
    """

    def __init__(self, env: Any, rng: np.random.Generator) -> None:
        self.env, self.rng = env.unwrapped, rng
        self.has_looked = False

    def action(self) -> int:
        """What it would do now."""
        env = self.env
        x, direction = int(env.agent_pos[0]), int(env.agent_dir)
        if x == 1 or (x == 2 and direction == WEST):
            self.has_looked = True
        if not self.has_looked:
            return FORWARD if direction == WEST else LEFT
        if x == hallway_end(env) + 1:
            return self._choose(direction, up=env.success_pos[1] < env.height // 2)
        if direction == EAST:
            return FORWARD if _is_free(env) else self._pause()
        if direction == WEST and x > OUT_OF_SIGHT and _gate_is_closed(env) and self.rng.random() < 0.8:
            return FORWARD
        return LEFT  # facing north, it is about to walk back; facing west or south, to go on

    def _pause(self) -> int:
        return WAIT if self.rng.random() < 0.5 else LEFT

    @staticmethod
    def _choose(direction: int, *, up: bool) -> int:
        if direction == (NORTH if up else SOUTH):
            return FORWARD
        if direction in (EAST, WEST):
            return LEFT if up == (direction == EAST) else RIGHT
        return RIGHT if direction == NORTH else LEFT  # back to facing east, and then the other way


def _is_free(env: Any) -> bool:
    cell = env.grid.get(*env.front_pos)
    return cell is None or cell.can_overlap()


def _gate_is_closed(env: Any) -> bool:
    gate = env.grid.get(hallway_end(env), env.height // 2)
    return gate is not None and not gate.is_open
