"""Rings of latent frames: what a block of frames sees, where it stands, and attention to all that a ring holds."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longburn.attention import attend
from longburn.bias import BiasContext
from longburn.cache import AttnWindow, KeyValues, RollingKVCache, Step
from longburn.kernels.attend import BiasTerms, Known
from longburn.models.matrix_game_2.config import BLOCK_FRAMES, MatrixGame2Config, Ropes
from longburn.rope import Angles


@dataclass(frozen=True)
class FrameWindow:
    """What a block of latent frames sees: kept first frames, the newest frames, and itself; `frames` in all.

    Args:
        frames: L, with the kept ones and the block.
        sink_frames: s first frames of the video that stay visible for ever.
        relative_sinks: never look at kept frames from farther away than across a full window. Otherwise they stand
            where they stood, and a stream goes where the model was not trained.
        past_log_weights: added to the scores of past frames, by their age in frames: the first number for the frame
            right before the block, the last one for all that are older. Kept frames and the block itself have 0.

    Raises:
        ValueError: numbers of frames that are not whole, a window that cannot hold kept frames and a block, or weights
            that are no numbers.
    """

    frames: int
    sink_frames: int = 0
    relative_sinks: bool = False
    past_log_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("frames", "sink_frames"):
            settle(self, name, whole, "a whole number of latent frames")
        settle(self, "past_log_weights", numbers, "numbers or -inf, one an age")
        if self.sink_frames < 0 or self.sink_frames + BLOCK_FRAMES > self.frames:
            raise ValueError(
                f"FrameWindow: {self.sink_frames} kept frames and a block of {BLOCK_FRAMES} do not fit a window of "
                f"{self.frames} latent frames; wanted sinks + block <= window"
            )
        if self.relative_sinks and not self.sink_frames:
            raise ValueError("FrameWindow: relative_sinks without kept frames; give sink_frames")
        if not all(weight < math.inf for weight in self.past_log_weights):
            raise ValueError(f"FrameWindow: past_log_weights are {self.past_log_weights}, wanted numbers or -inf")

    def ring(self, tokens: int, *, sinks: bool) -> tuple[AttnWindow, int]:
        """The window and capacity of a cache with so many tokens a frame, which holds exactly what a block may see.

        A block is written before it attends, over the frames that it pushes out: what is left is the whole window.
        """
        kept = self.sink_frames if sinks else 0
        size = (self.frames - kept - BLOCK_FRAMES) * tokens + 1
        return AttnWindow(size, sink_tokens=kept * tokens), self.frames * tokens


def settle(settings: object, name: str, read: Callable[[Any], object], wanted: str) -> None:
    """Replace a field of a frozen dataclass by what `read` makes of it.

    Raises:
        ValueError: it can make nothing of it; says what was wanted.
    """
    value = getattr(settings, name)
    try:
        object.__setattr__(settings, name, read(value))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{type(settings).__name__}: {name} is {value!r}, wanted {wanted}") from None


def whole(value: Any) -> int:
    """An integer of any type, but no truth value."""
    if isinstance(value, bool):
        raise TypeError("a truth value")
    return operator.index(value)


def numbers(values: Any) -> tuple[float, ...]:
    """Real numbers of any type."""
    return tuple(number(value) for value in values)


def number(value: Any) -> float:
    """A real number of any type, but no truth value."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError("no number")
    return float(value)


class Caches:
    """The rings of one stream of B rows: of every layer's video, and of the mouse and keys where a layer hears them.

    Those of the mouse have a row for every place of a frame, and those of actions keep no first frames.

    Args:
        tokens: of a latent frame.
        packed: keep the video's keys and values as fp8, see `RollingKVCache`.
    """

    def __init__(
        self,
        config: MatrixGame2Config,
        window: FrameWindow,
        batch: int,
        tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        packed: bool = False,
    ) -> None:
        self.window, self.tokens = window, tokens
        action = config.action_config

        def ring(rows: int, heads: int, size: int, unit: int, *, sinks: bool) -> RollingKVCache:
            seen, capacity = window.ring(unit, sinks=sinks)
            kind = {"dtype": dtype, "device": device, "packed": packed and sinks}
            return RollingKVCache(rows, heads, size, window=seen, capacity=capacity, **kind)  # type: ignore[arg-type]

        def rings(rows: int) -> tuple[RollingKVCache, ...]:
            return tuple(ring(rows, action.heads_num, action.head_dim, 1, sinks=False) for _ in action.blocks)

        self.video = tuple(
            ring(batch, config.num_heads, config.head_dim, tokens, sinks=True) for _ in range(config.num_layers)
        )
        self.keyboard = rings(batch)
        self.mouse = rings(batch * tokens) if action.enable_mouse else ()

    @property
    def every(self) -> tuple[RollingKVCache, ...]:
        """All rings."""
        return (*self.video, *self.keyboard, *self.mouse)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and positions."""
        return sum(cache.nbytes for cache in self.every)

    def reset(self) -> None:
        """Forget everything."""
        for cache in self.every:
            cache.reset()


class Place(NamedTuple):
    """Where a block of F frames stands: made once a block, for all its passes and layers.

    Of tokens `[1, F * tokens]` and of frames `[1, F]`: positions, and angles. A pass is given them as tensors, so one
    that is recorded is right for every block.
    """

    tokens: Step
    frames: Step
    angles: Angles
    sink_angles: Angles | None
    frame_angles: Angles
    query_angles: Angles  # of the frames, for every token
    ones: Tensor  # the weight of norms over a head's channels
    full: bool  # every slot of every ring is filled once the block is written


def place_of(
    ropes: Ropes,
    window: FrameWindow,
    first: Tensor,
    frames: int,
    *,
    full: bool,
    dtype: torch.dtype,
) -> Place:
    """The place of `frames` frames from frame number `first` on, int64 `[1]` on the model's device."""
    rope = ropes.video
    device, n = first.device, rope.frame_tokens
    times = first + torch.arange(frames, device=device)
    positions = first * n + torch.arange(frames * n, device=device)
    wide = torch.promote_types(dtype, torch.float32)
    sink_angles = None
    if window.relative_sinks:
        beyond = (first + frames - window.frames).clamp_min(0)
        shown = (times - beyond).repeat_interleave(n)
        sink_angles = rope.angles(positions[None], wide, time=shown[None])
    turns = ropes.action.angles(times[None], wide)
    return Place(
        Step(positions[None], None, None, fits=True),
        Step(times[None], None, None, fits=True),
        rope.angles(positions[None], wide),
        sink_angles,
        turns,
        Angles(*(x.repeat_interleave(n, 2) for x in turns)),
        torch.ones(ropes.action.head_dim, device=device, dtype=dtype),
        full,
    )


class _KeyBias(NamedTuple):
    """A bias policy: these numbers `[1, 1, S]`, one a slot."""

    key: Tensor

    def terms(self, context: BiasContext) -> BiasTerms:
        return BiasTerms(key=self.key)


def attend_ring(
    held: KeyValues, place: Place, step: Step, scale: float, *, q: Tensor | None = None, window: FrameWindow | None
) -> Tensor:
    """Attention of a block's queries to all that a ring holds, `[B, H, T, D]`.

    Args:
        step: the positions that were written last.
        q: queries, where they are not those of `held`.
        window: with kept frames and past weights; None for a ring that has neither.
    """
    queries = held.q if q is None else q
    assert queries is not None
    T, S = queries.shape[2], held.pos.shape[1]
    everything = AttnWindow(lookahead=None)
    if held.q_sink is not None and window is not None:
        everything = AttnWindow(max(S, T), sink_tokens=window.sink_frames * (S // window.frames), lookahead=None)
    bias = None
    if window is not None and window.past_log_weights:
        bias = step.share(("past weights", S), lambda: _KeyBias(_weights(held, step, window)))
    if place.full:  # nothing is hidden then, so it does not matter what stands where: slots will do as positions
        q_pos = step.share(("slots", T), lambda: torch.arange(T, device=queries.device)[None])
        k_pos = step.share(("slots", S), lambda: torch.arange(S, device=queries.device)[None])
        known = (Known(0, T, S, 0, 0, True),)
    else:
        q_pos, k_pos, known = step.positions, held.pos, None
        q_pos = q_pos if q_pos.shape[1] == T else q_pos[:, -1:].expand(-1, T)
    return attend(
        queries,
        held.k,
        held.v,
        q_pos=q_pos,
        k_pos=k_pos,
        window=everything,
        bias=bias,
        scale=scale,
        q_sink=held.q_sink,
        known=known,
        before=held.before,
        scales=held.scales,
    )


def _weights(held: KeyValues, step: Step, window: FrameWindow) -> Tensor:
    """`past_log_weights` in every slot, `[1, 1, S]`."""
    tokens = held.pos.shape[1] // window.frames
    frame = held.pos // tokens
    age = step.positions[:, :1] // tokens - frame
    device = held.pos.device  # where the numbers are made: a recorded pass copies nothing from the host
    table = torch.cat([torch.full((1,), weight, device=device) for weight in window.past_log_weights])
    past = (age > 0) & (frame >= window.sink_frames)
    return torch.where(past, table[(age - 1).clamp(0, len(window.past_log_weights) - 1)], 0.0)[:, None]
