"""A world model of a room: what is seen next, given what is done now.

One frame of 64 tokens a step, block-causal: the tokens of a frame see each other, the frames before it in the window,
and the first frame for ever. One pass over a frame and the action taken in it gives every cell of the next frame.
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from longburn.cache import AttnWindow, CacheManager, Step
from longburn.kernels.linear import linear
from longburn.models.minigrid.block import Block, Stack, init_weights
from longburn.models.minigrid.cells import ACTIONS
from longburn.models.minigrid.rooms import CELLS, SIZE, SYMBOLS
from longburn.rope import Rope3dEncoding


@dataclass(frozen=True)
class RoomConfig:
    """Sizes: model M, heads, hidden size of the feed-forward blocks, layers; frames in the window and kept for ever."""

    dim: int = 128
    heads: int = 4
    hidden: int = 256
    layers: int = 4
    window: int = 4
    sinks: int = 1

    def to_dict(self) -> dict[str, Any]:
        """For `config.json`."""
        return asdict(self)


def frames_window(frames: int, sinks: int) -> AttnWindow:
    """The window of so many frames, the newest one counted, and so many first ones kept.

    A window slides by tokens: of the oldest frame a token sees what stands after its own place.

    Raises:
        ValueError: no frame at all.
    """
    if frames < 1 or sinks < 0:
        raise ValueError(f"RoomModel: a window of {frames} frames, {sinks} kept: wanted at least 1 and at least 0")
    return AttnWindow(frames * CELLS, sink_tokens=sinks * CELLS, block=CELLS)


class RoomModel(nn.Module):
    """Symbols of a frame and the action taken in it, to logits of the next frame's symbols.

    Args:
        config: sizes.
    """

    def __init__(self, config: RoomConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RoomConfig()
        M = config.dim
        self.symbols, self.places = nn.Embedding(SYMBOLS, M), nn.Embedding(CELLS, M)
        self.actions = nn.Embedding(len(ACTIONS), M)
        rope = Rope3dEncoding(M // config.heads, (SIZE, SIZE))
        window = frames_window(config.window, config.sinks)
        self.stack = Stack([Block(M, config.heads, config.hidden, rope, window) for _ in range(config.layers)], M)
        self.head = nn.Linear(M, SYMBOLS)
        init_weights(self, config.layers)

    def init_cache(self, batch: int) -> CacheManager:
        """Empty caches for `batch` streams without end. A frame is written in place."""
        return self.stack.init_cache(batch, slack=CELLS)

    def forward(
        self, frames: Tensor, actions: Tensor, *, positions: Tensor | None = None, cache: CacheManager | None = None
    ) -> Tensor:
        """Logits `[B, F, 64, 14]` of the frames that follow.

        Args:
            frames: symbols `[B, F, 64]`, whole numbers of any type.
            actions: taken in them, `[B, F]`.
            positions: of the tokens, `[B, F * 64]`; default from 0 on. Not with a cache.
            cache: the frames go on where it stands, and are committed.

        Raises:
            ValueError: shapes that disagree.
        """
        B, F, cells = frames.shape
        if cells != CELLS or actions.shape != (B, F):
            raise ValueError(
                f"RoomModel: frames {tuple(frames.shape)}, actions {tuple(actions.shape)}: "
                f"wanted [B, F, {CELLS}], [B, F]"
            )
        x = self.symbols(frames.long()) + self.places.weight + self.actions(actions.long())[:, :, None]
        x = x.flatten(1, 2)
        if cache is None:
            features = self.stack.forward(x, Step.from_zero(F * cells, x.device) if positions is None else positions)
        else:
            step = cache.positions(F * cells)
            features = self.stack.forward(x, step, cache)
            cache.advance(step)
        return linear(features, self.head.weight, self.head.bias).view(B, F, cells, SYMBOLS)
