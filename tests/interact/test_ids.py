"""Observations as token ids, several a step, in a vocabulary that they share with actions."""

import gymnasium
import numpy as np
import torch
from acting import DIM, TinyModel
from gymnasium import spaces

from longburn.cache import AttnWindow
from longburn.interact import Agent, LinearHead, action_codec, rollout


class Digits(gymnasium.Env):
    """Shows three digits: those of 7 times all that was done."""

    observation_space = spaces.MultiDiscrete([4, 4, 4])
    action_space = spaces.MultiDiscrete([3, 2])

    def _digits(self) -> np.ndarray:
        return np.array([self.sum // 16 % 4, self.sum // 4 % 4, self.sum % 4])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sum, self.steps = 0, 0
        return self._digits(), {}

    def step(self, action):
        self.sum, self.steps = self.sum + 7 * int(action[0] + 2 * action[1] + 1), self.steps + 1
        return self._digits(), 0.0, self.steps == 6, False, {}


class Spelled:
    """Ids of digits, after those of actions."""

    def encode(self, observations: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(observations + 5)


@torch.no_grad()
def test_one_sequence_of_ids() -> None:
    torch.manual_seed(0)
    codec = action_codec(Digits.action_space)
    model = TinyModel(codec.width + 4, AttnWindow(7, sink_tokens=1)).double()
    head, seen = LinearHead(DIM, codec.width).double(), []

    class Heard:
        def logits(self, hidden):
            seen.append(head.logits(hidden))
            return seen[-1]

    turns = list(rollout(Agent(Spelled(), model, Heard(), codec), Digits(), steps=6, seed=0))
    ids, asked = [], []
    for turn in turns:
        ids += (turn.observations[0] + 5).tolist()
        asked.append(len(ids) - 1)
        ids += turn.tokens[0].tolist()
        asked.append(len(ids) - 2)
    whole = head.logits(model.whole(model.embed(torch.tensor([ids])))[0, asked])
    assert (torch.cat(seen) - whole).abs().max() <= 1e-11 * whole.abs().max()
    assert {shape[1] for shape in model.fed} == {1, 3, 4}  # an action's second token; the first step; a later one
    assert all(0 <= a < 3 <= b < 5 for a, b in (turn.tokens[0].tolist() for turn in turns))
    assert turns[-1].terminated[0]
