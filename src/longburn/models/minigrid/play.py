"""The room's world model as a `PlayableWorld`: an action in, what is then seen out, as symbols and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longburn.cache import CacheManager
from longburn.interact import WorldStep
from longburn.interact.extras import gymnasium
from longburn.models.minigrid.cells import ACTIONS, DROP, FORWARD, LEFT, PICK_UP, RIGHT, TOGGLE, WAIT
from longburn.models.minigrid.rooms import (
    AT_GOAL,
    CELLS,
    EMPTY_HANDED,
    SIZE,
    SYMBOLS,
    WITH_KEY,
    Frame,
    draw,
    frame_of,
    room,
    to_cells,
    to_frame,
)
from longburn.models.minigrid.world import RoomModel
from longburn.sampling import Sampler, SamplerConfig

MAX_STEPS = 10 * SIZE**2  # as of MiniGrid's own room: what a reward is measured by
_KEYS = {"up": FORWARD, "left": LEFT, "right": RIGHT, "space": TOGGLE, "g": PICK_UP, "d": DROP}


class RoomWorld:
    """One stream through a room that the model imagines.

    MiniGrid draws the first frame and the pictures; what happens in between is the model's word alone.

    Args:
        model: as `load_room` gives it. Several worlds may share one.
        tile: pixels on a side of a cell.
        sampler: how symbols are chosen; default the most likely ones.

    Raises:
        ImportError: minigrid is not installed.
        ValueError: tiles of no pixels, or a sampler with penalties or without a symbol to choose.
    """

    fps = 6.0

    def __init__(self, model: RoomModel, *, tile: int = 32, sampler: SamplerConfig | None = None) -> None:
        if tile < 4:
            raise ValueError(f"RoomWorld: tiles of {tile} pixels, wanted at least 4")
        spaces = gymnasium("RoomWorld").spaces
        self.observation_space: Any = spaces.Dict(
            {"image": spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8), "has_key": spaces.Discrete(2)}
        )
        self.action_space: Any = spaces.Discrete(len(ACTIONS))
        self.frame_size = (SIZE * tile, SIZE * tile)
        self.model, self.tile = model, tile
        self.sampler = _checked(SamplerConfig(temperature=0.0) if sampler is None else sampler)
        self._cache: CacheManager | None = None
        self._frame: Frame = np.zeros(CELLS, np.uint8)
        self._choose: Sampler | None = None
        self._steps = 0

    @property
    def controls(self) -> Mapping[str, str]:
        """What each key does."""
        return {key: ACTIONS[action] for key, action in _KEYS.items()}

    def action_of(self, keys: Sequence[str]) -> int:
        """The action of the last key that is one; waiting if none is."""
        return next((_KEYS[key] for key in reversed(keys) if key in _KEYS), WAIT)

    def reset(self, *, seed: int, options: Mapping[str, Any] | None = None) -> WorldStep:
        """A new room, drawn by MiniGrid from the seed.

        Args:
            seed: in [0, 2**63).
            options: "image": start from this room instead, uint8 `[8, 8, 3]` as `FullyObsWrapper` gives it.

        Raises:
            ValueError: another option, or a room that is none. The world is then as it was.
        """
        given = dict(options or {})
        image = given.pop("image", None)
        if given:
            raise ValueError(f"RoomWorld.reset: options {sorted(given)}: there is only 'image'")
        if not 0 <= seed < 2**63:
            raise ValueError(f"RoomWorld.reset: seed {seed}, wanted a number in [0, 2**63)")
        if image is None:
            env = room()
            env.reset(seed=seed % 2**32)
            frame = frame_of(env)
        else:
            frame = to_frame(image)
        settings = replace(_checked(self.sampler), seed=seed)
        cache = self.model.init_cache(1)
        choose = Sampler([settings] * CELLS, batch=CELLS, vocab_size=SYMBOLS, device=cache.device)
        self._frame, self._steps, self._cache, self._choose = frame, 0, cache, choose
        return self._seen()

    @torch.no_grad()
    def step(self, action: Any) -> WorldStep:
        """What the model says follows.

        Raises:
            ValueError: no action of MiniGrid's, before a reset, or after the goal was reached; or the model gives a
                cell nothing but NaN, after which there is no room until the next reset.
        """
        if not self.action_space.contains(action):
            raise ValueError(f"RoomWorld.step: action {action!r}, wanted 0 .. {len(ACTIONS) - 1}: {', '.join(ACTIONS)}")
        if self._cache is None or self._choose is None:
            raise ValueError("RoomWorld.step: no room yet; call reset first")
        if self._frame[0] == AT_GOAL:
            raise ValueError("RoomWorld.step: the goal was reached; call reset first")
        device = self._cache.device
        frame = torch.from_numpy(self._frame).to(device)[None, None]
        logits = self.model(frame, torch.full((1, 1), int(action), device=device), cache=self._cache)[0, 0]
        draws: Tensor = torch.arange(CELLS, device=device) + self._steps * CELLS
        chosen = self._choose(_fitting(logits), draw=draws).tokens.cpu().numpy()
        if chosen.min() < 0:
            self._cache = None  # it has read a frame that nothing follows
            row, column = divmod(int(chosen.argmin()), SIZE)
            raise ValueError(
                f"RoomWorld.step: column {column}, row {row} has nothing to choose from: the model gave it NaN; "
                "look at its weights"
            )
        self._frame, self._steps = chosen.astype(np.uint8), self._steps + 1
        return self._seen()

    def _seen(self) -> WorldStep:
        ended = bool(self._frame[0] == AT_GOAL)
        observation = {"image": to_cells(self._frame), "has_key": np.int64(self._frame[0] == WITH_KEY)}
        reward = 1 - 0.9 * self._steps / MAX_STEPS if ended else 0.0
        return WorldStep(observation, draw(self._frame, self.tile)[None], max(0.0, reward), ended)


def _checked(sampler: SamplerConfig) -> SamplerConfig:
    """The settings, if symbols can be chosen by them.

    Raises:
        ValueError: a penalty, an id that is no symbol, or bans that leave a cell nothing.
    """
    if sampler.uses_counts:
        raise ValueError(
            "RoomWorld: repetition, frequency and presence penalties are of text; leave them out for symbols"
        )
    sampler.check_vocabulary(SYMBOLS)
    banned = set(sampler.banned_tokens)
    for place, first, end in (("the corner", EMPTY_HANDED, SYMBOLS), ("a cell", 0, EMPTY_HANDED)):
        if banned.issuperset(range(first, end)):
            raise ValueError(f"RoomWorld: all symbols of {place}, {first} .. {end - 1}, are banned; leave one")
    return sampler


def _fitting(logits: Tensor) -> Tensor:
    """Logits `[64, 14]` without the symbols that have no place: the corner's elsewhere, and the others there."""
    symbol, cell = torch.arange(SYMBOLS, device=logits.device), torch.arange(CELLS, device=logits.device)[:, None]
    return logits.masked_fill((symbol >= EMPTY_HANDED) != (cell == 0), -torch.inf)
