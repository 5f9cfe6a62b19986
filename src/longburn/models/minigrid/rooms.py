"""A room of MiniGrid as one frame of 64 symbols: `DoorKeyEnv` of 8 x 8 cells, seen whole.

One symbol a cell, row by row. What the agent holds is in no cell, so the corner at the top left, a wall that nobody can
change, says it instead.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longburn.models.minigrid.cells import (
    DROP,
    EAST,
    FORWARD,
    LEFT,
    NORTH,
    PICK_UP,
    RIGHT,
    SOUTH,
    TOGGLE,
    WEST,
    Cells,
    check_cells,
)
from longburn.models.minigrid.extras import minigrid

SIZE = 8
CELLS = SIZE * SIZE
# Object, colour and state of each symbol; then those of the corner.
KINDS = (
    (1, 0, 0),  # nothing
    (2, 5, 0),  # wall
    (8, 1, 0),  # goal
    (5, 4, 0),  # key
    (4, 4, 0),  # door: open, closed, locked
    (4, 4, 1),
    (4, 4, 2),
    (10, 0, 0),  # agent: facing right, down, left, up
    (10, 0, 1),
    (10, 0, 2),
    (10, 0, 3),
)
WALL, KEY, OPEN, AGENT = 1, 3, 4, 7
EMPTY_HANDED, WITH_KEY, AT_GOAL = 11, 12, 13
SYMBOLS = 14
_STEPS = {EAST: (1, 0), SOUTH: (0, 1), WEST: (-1, 0), NORTH: (0, -1)}

Frame = NDArray[np.uint8]


def room(**settings: Any) -> Any:
    """MiniGrid's `DoorKeyEnv` of 8 x 8 cells, `MiniGrid-DoorKey-8x8-v0`.

    Raises:
        ImportError: minigrid is not installed.
    """
    return minigrid("minigrid.envs", "room").DoorKeyEnv(size=SIZE, **settings)


def cells_of(env: Any) -> Cells:
    """The whole grid of the environment, `[x, y, 3]`, with the agent in it."""
    cells: Cells = env.grid.encode()
    cells[env.agent_pos[0], env.agent_pos[1]] = KINDS[AGENT + env.agent_dir]
    return cells


def frame_of(env: Any) -> Frame:
    """The symbols `[64]` of the environment as it stands."""
    at_goal = getattr(env.grid.get(*env.agent_pos), "type", None) == "goal"
    corner = AT_GOAL if at_goal else EMPTY_HANDED if env.carrying is None else WITH_KEY
    return to_frame(cells_of(env), corner)


def to_frame(cells: Any, corner: int = EMPTY_HANDED) -> Frame:
    """Symbols `[64]` of a grid `[x, y, 3]`.

    Raises:
        ValueError: cells that such a room does not have, no wall in the corner, or not one agent.
    """
    cells = check_cells("to_frame", cells, (SIZE, SIZE))
    code = cells.astype(np.int64) @ (10_000, 100, 1)
    known = np.array(KINDS) @ (10_000, 100, 1)
    if not np.isin(code, known).all():
        x, y = np.argwhere(~np.isin(code, known))[0]
        raise ValueError(f"to_frame: {cells[x, y].tolist()} at column {x}, row {y} stands in no room of `DoorKeyEnv`")
    symbols: Frame = np.argmax(code[..., None] == known, -1).T.astype(np.uint8).reshape(-1)
    if symbols[0] != WALL:
        raise ValueError("to_frame: the corner at the top left is no wall")
    if (agents := int((symbols >= AGENT).sum())) != 1:
        raise ValueError(f"to_frame: {agents} agents in the room, wanted one: a cell [10, 0, direction]")
    symbols[0] = corner
    return symbols


def to_cells(frame: Frame) -> Cells:
    """The grid `[x, y, 3]` of symbols `[64]`; what has no place in a cell becomes a wall."""
    symbols = np.where(frame < len(KINDS), frame, WALL).reshape(SIZE, SIZE).T
    cells: Cells = np.array(KINDS, dtype=np.uint8)[symbols]
    return cells


def draw(frame: Frame, tile: int) -> NDArray[np.uint8]:
    """The picture `[8 * tile, 8 * tile, 3]` of symbols `[64]`, by MiniGrid's own tiles."""
    render = minigrid("minigrid.core.grid", "draw").Grid.render_tile
    decode = minigrid("minigrid.core.world_object", "draw").WorldObj.decode
    rows = []
    for row in to_cells(frame).transpose(1, 0, 2):
        tiles = []
        for kind in row:
            direction = int(kind[2]) if kind[0] == KINDS[AGENT][0] else None
            tiles.append(render(decode(*map(int, kind)), agent_dir=direction, tile_size=tile))
        rows.append(np.concatenate(tiles, 1))
    return np.concatenate(rows, 0).astype(np.uint8)


class Explorer:
    """Wanders through a room and tries things: walks to some cell or object, and does something to what is there.

    Args:
        env: a `room`, right after its reset.
        rng: for its choices.
        goal: whether it may step on the goal, which ends an episode.
    """

    def __init__(self, env: Any, rng: np.random.Generator, *, goal: bool) -> None:
        self.env, self.rng, self.goal = env, rng, goal
        self._plan = iter(())  # type: Iterator[int]

    def action(self) -> int:
        """What it does now."""
        action = next(self._plan, None)
        if action is None:
            self._plan = self._next()
            action = next(self._plan, LEFT)
        ahead = self.env.grid.get(*self.env.front_pos)
        return RIGHT if action == FORWARD and not self.goal and getattr(ahead, "type", None) == "goal" else action

    def _next(self) -> Iterator[int]:
        env, rng = self.env, self.rng
        if rng.random() < 0.3:
            return iter(rng.integers(7, size=rng.integers(1, 12)).tolist())
        things = [
            (x, y)
            for x in range(SIZE)
            for y in range(SIZE)
            if getattr(env.grid.get(x, y), "type", None) in ("key", "door")
        ]
        cells = [(x, y) for x in range(1, SIZE - 1) for y in range(1, SIZE - 1) if env.grid.get(x, y) is None]
        if self.goal and rng.random() < 0.2:
            return self._walk((SIZE - 2, SIZE - 2), ())
        if rng.random() < 0.65:
            there = things[rng.integers(len(things))]
            kind = env.grid.get(*there).type
            last = TOGGLE if kind == "door" else PICK_UP
            steps = [last, FORWARD, FORWARD][: 1 + 2 * int(rng.random() < 0.5)]
            return self._walk(
                there, [*steps, *rng.choice([LEFT, RIGHT, FORWARD, TOGGLE, DROP], rng.integers(4)).tolist()]
            )
        there = cells[rng.integers(len(cells))]
        return self._walk(there, [DROP] if rng.random() < 0.2 else ())

    def _walk(self, there: tuple[int, int], then: Any) -> Iterator[int]:
        """Turns and steps until the cell is ahead, and then some more; as far as there is a way."""
        path = self._path(there)
        for column, row in path or ():
            x, y = map(int, self.env.agent_pos)
            wanted = next((d for d, (dx, dy) in _STEPS.items() if (x + dx, y + dy) == (column, row)), None)
            if wanted is None:
                return  # a step did not go as planned
            while int(self.env.agent_dir) != wanted:
                yield RIGHT if (wanted - int(self.env.agent_dir)) % 4 == 1 else LEFT
            if (column, row) != there or not then:
                yield FORWARD
        yield from then

    def _path(self, there: tuple[int, int]) -> list[tuple[int, int]] | None:
        start = (int(self.env.agent_pos[0]), int(self.env.agent_pos[1]))
        came: dict[tuple[int, int], tuple[int, int]] = {start: start}
        edge = [start]
        while edge and there not in came:
            edge = [cell for at in edge for cell in self._around(at, there, came)]
        if there not in came:
            return None
        path = [there]
        while came[path[-1]] != start:
            path.append(came[path[-1]])
        return path[::-1] if there != start else []

    def _around(
        self, at: tuple[int, int], there: tuple[int, int], came: dict[tuple[int, int], tuple[int, int]]
    ) -> list[tuple[int, int]]:
        found = []
        for dx, dy in _STEPS.values():
            cell = at[0] + dx, at[1] + dy
            thing = self.env.grid.get(*cell)
            if cell not in came and (cell == there or thing is None or (thing.can_overlap() and thing.type != "goal")):
                came[cell] = at
                found.append(cell)
        return found
