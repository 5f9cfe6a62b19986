"""How good a world model of a room is: one step from the truth, and many steps from the first frame."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longburn.models.minigrid.rooms import CELLS, Explorer, Frame, frame_of, room
from longburn.models.minigrid.world import RoomModel

ENDED = 255  # action of the steps after an end


class Explored(NamedTuple):
    """Episodes of an explorer: frames `[E, steps + 1, 64]` and the actions taken in them `[E, steps]`.

    After an end the last frame is repeated, and actions are `ENDED`.
    """

    frames: Frame
    actions: NDArray[np.uint8]


def explore(episodes: int, steps: int, *, seed: int, goals: float) -> Explored:
    """Let an explorer wander through a room an episode, whose seeds are `seed`, `seed + 1`, ...

    goals: share of episodes in which it may step on the goal, which ends them.
    """
    frames = np.zeros((episodes, steps + 1, CELLS), dtype=np.uint8)
    actions = np.full((episodes, steps), ENDED, dtype=np.uint8)
    for row in range(episodes):
        rng = np.random.default_rng(seed + row)
        env = room()
        env.reset(seed=seed + row)
        explorer = Explorer(env, rng, goal=bool(rng.random() < goals))
        frames[row] = frame_of(env)
        for step in range(steps):
            actions[row, step] = explorer.action()
            _, _, terminated, truncated, _ = env.step(int(actions[row, step]))
            frames[row, step + 1 :] = frame_of(env)
            if terminated or truncated:
                break
    return Explored(frames, actions)


class Drift(NamedTuple):
    """Shares over episodes, of every step `[steps]`: cells that are right, frames that are right as a whole.

    `told_*`: one step from the true frames. `free_*`: as many steps from the first frame, on its own frames.
    """

    told_cells: Tensor
    told_frames: Tensor
    free_cells: Tensor
    free_frames: Tensor


@torch.no_grad()
def drift(model: RoomModel, frames: Tensor, actions: Tensor) -> Drift:
    """Play episodes `[E, steps + 1, 64]` by their actions `[E, steps]`; none of them ends. Most likely symbols."""
    told, free = model.init_cache(len(frames)), model.init_cache(len(frames))
    shares: list[list[Tensor]] = []
    own = frames[:, 0]
    for step in range(actions.shape[1]):
        action = actions[:, step : step + 1]
        guess = model.forward(frames[:, step : step + 1], action, cache=told).argmax(-1)[:, 0]
        own = model.forward(own[:, None], action, cache=free).argmax(-1)[:, 0]
        right = [one == frames[:, step + 1] for one in (guess, own)]
        shares.append([share for one in right for share in (one.double().mean(), one.all(1).double().mean())])
    return Drift(*torch.tensor(shares).T)
