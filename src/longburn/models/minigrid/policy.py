"""A policy with a memory: two tokens a step, and the window over its past decides what it can remember.

The task: MiniGrid's `MemoryEnv`. An object stands in the first room; at the end of a hallway stand two, of which the
agent must go to the same kind. The view is 7 x 7 cells, so everything but the first object is in view when it matters.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longburn.cache import AttnWindow, CacheManager, Step
from longburn.kernels.linear import linear
from longburn.models.minigrid.block import Block, Stack, init_weights
from longburn.models.minigrid.cells import ACTIONS, COLORS, DIRECTIONS, OBJECTS, STATES, VIEW, check_cells
from longburn.rope import RotaryEncoding

SINK_STEPS = 12  # the agent has seen the first object by then, wherever it starts in a hallway of MemoryS17
STEP = 2  # tokens of a step: what was seen, what was done
FULL = AttnWindow()


def window(steps: int, *, sinks: bool) -> AttnWindow:
    """The last `steps` steps, with the first `SINK_STEPS` kept or without."""
    if not sinks:
        return AttnWindow(steps * STEP)
    return AttnWindow(steps * STEP, sink_tokens=SINK_STEPS * STEP, relative_sinks=True)


@dataclass(frozen=True)
class PolicyConfig:
    """Sizes: model M, heads, hidden size of the feed-forward blocks, layers, numbers a cell."""

    dim: int = 64
    heads: int = 4
    hidden: int = 128
    layers: int = 2
    cell: int = 8

    def to_dict(self) -> dict[str, Any]:
        """For `config.json`."""
        return asdict(self)


class MemoryPolicy(nn.Module):
    """What MiniGrid's agent sees and does, two tokens a step, to logits of its seven actions: a `StreamingModel` and,
    with `logits`, a `Head`.

    The token of what it sees is made of the view (every cell's object, colour and state) and of the direction that it
    faces; the features after it give the action, whose token comes next.

    Args:
        config: sizes.
        window: of every layer, in tokens; default all of them. Weights know of no window: the same serve every one.
    """

    def __init__(self, config: PolicyConfig | None = None, *, window: AttnWindow = FULL) -> None:
        super().__init__()
        self.config = config = config or PolicyConfig()
        M, E = config.dim, config.cell
        self.objects, self.colors = nn.Embedding(OBJECTS, E), nn.Embedding(COLORS, E)
        self.states = nn.Embedding(STATES, E)
        self.view = nn.Linear(VIEW * VIEW * E, M)
        self.directions, self.actions = nn.Embedding(DIRECTIONS, M), nn.Embedding(len(ACTIONS), M)
        rope = RotaryEncoding(M // config.heads)
        blocks = [Block(M, config.heads, config.hidden, rope, window) for _ in range(config.layers)]
        self.stack = Stack(blocks, M)
        self.head = nn.Linear(M, len(ACTIONS))
        init_weights(self, config.layers)
        for table in (self.objects, self.colors, self.states, self.directions, self.actions):
            nn.init.normal_(table.weight)
        nn.init.normal_(self.view.weight, std=(VIEW * VIEW * E) ** -0.5)

    @property
    def window(self) -> AttnWindow:
        """Of every layer. To be changed between streams only: caches are made for it."""
        return self.stack.window

    @window.setter
    def window(self, window: AttnWindow) -> None:
        self.stack.window = window

    @property
    def reach(self) -> int | None:
        """How many tokens back anything can still tell on an action, kept sink tokens aside; None: all.

        A layer looks back `size - 1` tokens, at such as have looked back as far in the layer below.
        """
        size = self.window.size
        return None if size is None else self.config.layers * (size - 1)

    def init_cache(self, batch: int, *, max_length: int | None = None) -> CacheManager:
        """Empty caches for `batch` streams of at most `max_length` tokens (None: no end)."""
        return self.stack.init_cache(batch, max_length=max_length, slack=STEP)

    def observe(self, views: Tensor, directions: Tensor) -> Tensor:
        """Tokens `[..., M]` of views `[..., 7, 7, 3]` and directions `[...]`, whole numbers of any type."""
        cells = views.long()
        kinds = self.objects(cells[..., 0]) + self.colors(cells[..., 1]) + self.states(cells[..., 2])
        faced: Tensor = self.directions(directions.long())
        return linear(kinds.flatten(-3), self.view.weight, self.view.bias) + faced

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens `[..., M]` of actions `[...]`."""
        embedded: Tensor = self.actions(tokens.to(self.actions.weight.device))
        return embedded

    def features(self, x: Tensor, step: Step, cache: CacheManager) -> Tensor:
        """`[B, T, M]` of the next tokens of streams; written to the cache, which the caller advances."""
        return self.stack.forward(x, step, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., 7]` of the actions, of features `[..., M]`."""
        return linear(hidden, self.head.weight, self.head.bias)

    def forward(self, views: Tensor, directions: Tensor, taken: Tensor) -> Tensor:
        """Logits `[B, T, 7]` of every action of whole episodes, without a cache (training).

        Args:
            views: `[B, T, 7, 7, 3]`.
            directions, taken: `[B, T]`; the last action taken changes nothing.
        """
        return self.logits(self.hidden(views, directions, taken))

    def hidden(self, views: Tensor, directions: Tensor, taken: Tensor) -> Tensor:
        """Features `[B, T, M]` from which every action of whole episodes is chosen; see `forward`."""
        x = torch.stack([self.observe(views, directions), self.embed(taken.long())], 2).flatten(1, 2)
        return self.stack.forward(x, Step.from_zero(x.shape[1], x.device))[:, ::STEP]


class MemoryEncoder:
    """MiniGrid's observations to tokens of the policy: an `ObservationEncoder`."""

    def __init__(self, policy: MemoryPolicy) -> None:
        self.policy = policy

    def encode(self, observations: Any) -> Tensor:
        """B rows' observations, `{"image": uint8 [B, 7, 7, 3], "direction": [B]}`, to `[B, 1, M]`.

        Raises:
            ValueError: an entry is missing, or not what MiniGrid gives.
        """
        if not isinstance(observations, dict) or not {"image", "direction"} <= set(observations):
            raise ValueError(
                f"MemoryEncoder: got {sorted(observations) if isinstance(observations, dict) else type(observations)}, "
                "wanted MiniGrid's observation with 'image' and 'direction'"
            )
        faced = np.asarray(observations["direction"]).reshape(-1)
        image = check_cells("MemoryEncoder", observations["image"], (len(faced), VIEW, VIEW))
        if faced.size and not (faced.min() >= 0 and faced.max() < DIRECTIONS):
            raise ValueError(f"MemoryEncoder: directions {faced.tolist()}, wanted each in 0 .. {DIRECTIONS - 1}")
        device = self.policy.head.weight.device
        views, directions = torch.from_numpy(image).to(device), torch.from_numpy(faced.astype(np.int64)).to(device)
        return self.policy.observe(views[:, None], directions[:, None])
