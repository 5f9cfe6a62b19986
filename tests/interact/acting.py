"""A small streaming model, and environments whose every answer is known."""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from longburn.attention import Attention
from longburn.cache import AttnWindow, CacheManager, Step
from longburn.interact import Agent, EmbeddingEncoder, LinearHead, action_codec
from longburn.rope import RotaryEncoding

DIM, HEADS = 32, 4


class TinyModel(nn.Module):
    """Two attention layers; a `StreamingModel`, and the same without a cache."""

    def __init__(self, ids: int, window: AttnWindow | None = None, *, vectors: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(ids, DIM) if vectors is None else nn.Linear(vectors, DIM)
        rope = RotaryEncoding(DIM // HEADS)
        self.layers = nn.ModuleList(Attention(DIM, HEADS, kv_heads=2, window=window, rope=rope) for _ in range(2))
        self.fed: list[tuple[int, ...]] = []  # the shape of everything read

    def init_cache(self, batch: int, *, max_length: int | None = None) -> CacheManager:
        return CacheManager.for_layers(list(self.layers), batch, max_length=max_length)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table(tokens.to(self.table.weight.dtype) if tokens.is_floating_point() else tokens)

    def features(self, x: Tensor, step: Step, cache: CacheManager) -> Tensor:
        self.fed.append(tuple(x.shape))
        for layer, kept in zip(self.layers, cache, strict=True):
            x = x + layer(x, step, cache=kept)
        return x

    def whole(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Recording:
    """A head that remembers the logits it gave."""

    def __init__(self, head: LinearHead) -> None:
        self.head = head
        self.seen: list[Tensor] = []

    def logits(self, hidden: Tensor) -> Tensor:
        self.seen.append(self.head.logits(hidden))
        return self.seen[-1]


def tiny_agent(observations: spaces.Space, actions: spaces.Space, window: AttnWindow | None = None, seed=0) -> Agent:
    """In fp64, with random weights so large that what was seen and done before changes what is done."""
    torch.manual_seed(seed)
    codec = action_codec(actions)
    continuous = isinstance(actions, spaces.Box)
    vectors = codec.width // 2 if continuous else None
    model = TinyModel(codec.width, window, vectors=vectors)
    encoder, head = EmbeddingEncoder(observations, DIM), LinearHead(DIM, codec.width)
    with torch.no_grad():
        for module in (model, head):
            for parameter in module.parameters():
                parameter.mul_(2.0 if parameter.dim() > 1 else 1.0)
    return Agent(encoder.double(), model.double(), Recording(head.double()), codec)


class Ledger(gymnasium.Env):
    """Writes down all that is asked of it. Observation: a hash of its seed, episode and all actions of the episode.

    With seed s, episode number n ends after `2 + (s + n) % cycle` steps, by turns terminated and
    truncated. The reward is the number of the step, and in the info.
    """

    def __init__(self, actions: spaces.Space | None = None, *, cycle: int = 3, never: bool = False) -> None:
        self.observation_space = spaces.Discrete(11)
        self.action_space = actions or spaces.Discrete(4)
        self.cycle, self.never = cycle, never
        self.log: list[Any] = []
        self.number = -1

    def _observation(self) -> int:
        return int((self.key * 7919 + self.number * 104729 + self.done * 31 + self.sum * 17) % 11)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.key, self.number = seed, -1
        self.number += 1
        self.done, self.sum = 0, 0
        self.log.append("reset")
        return self._observation(), {}

    def step(self, action):
        self.log.append(np.asarray(action).tolist())
        self.done += 1
        self.sum += int(np.abs(np.asarray(action, np.float64) * 10).sum() + 3)
        over = not self.never and self.done == 2 + (self.key + self.number) % self.cycle
        return (
            self._observation(),
            float(self.done),
            over and self.number % 2 == 0,
            over and self.number % 2 == 1,
            {"done": self.done},
        )
