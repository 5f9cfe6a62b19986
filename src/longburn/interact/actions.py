"""Actions as tokens: codecs for gymnasium's Discrete, MultiDiscrete, MultiBinary and Box spaces.

Each component of an action is one token. The ids of components lie one after the other, so that a model can tell them
apart: with sizes 3 and 2, the first token is 0, 1 or 2 and the second 3 or 4.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longburn.interact.continuous import ContinuousCodec
from longburn.interact.extras import gymnasium
from longburn.interact.members import Integers, countable, members
from longburn.interact.protocols import ActionCodec
from longburn.interact.samplers import TokenSampler
from longburn.sampling import SamplerConfig

if TYPE_CHECKING:
    from gymnasium.spaces import Box, Space


class DiscreteCodec:
    """Components that each take one of some integers: Discrete, MultiDiscrete and MultiBinary. One token a component.

    Args:
        space: one of these.

    Raises:
        ValueError: another space.
    """

    def __init__(self, space: "Space[Any]") -> None:
        sizes, self._starts = countable(space, "DiscreteCodec")
        self.space = space
        self._ids = _Ids(sizes)
        self.length, self.width = len(sizes), self._ids.count

    def tokens(self, actions: Any) -> Tensor:
        values = members(self.space, actions, "DiscreteCodec.tokens").astype(np.int64)
        return self._ids.of(values - self._starts)

    def action(self, tokens: Tensor) -> Any:
        values = self._ids.values(tokens) + self._starts
        return values.reshape(len(values), *(self.space.shape or ())).astype(self.space.dtype)

    def idle(self, batch: int) -> Tensor:
        return self._ids.of(np.zeros((batch, self.length), np.int64))

    def restrict(self, logits: Tensor, index: int) -> Tensor:
        return self._ids.restrict(logits, index)

    def sampler(self, configs: list[SamplerConfig], device: Any) -> TokenSampler:
        return TokenSampler(configs, self.width, device)


class BinsCodec:
    """A bounded Box in bins of equal size: one token a component, and an action is the middle of its bins.

    In a Box of integers a bin holds whole numbers.

    Args:
        space: a Box with finite bounds.
        bins: of every component, at least 1.

    Raises:
        ValueError: another space, one without bounds, bins that are no whole number, or more of them than integers.
    """

    def __init__(self, space: "Box", bins: int) -> None:
        spaces = gymnasium("BinsCodec").spaces
        whole = isinstance(bins, int | np.integer) and not isinstance(bins, bool)
        if not isinstance(space, spaces.Box) or not whole or bins < 1:
            raise ValueError(f"BinsCodec: {bins!r} bins of {space}: wanted a Box and a whole number, at least one bin")
        if not space.is_bounded():
            raise ValueError(f"BinsCodec: {space} has no finite bounds to cut into bins; use ContinuousCodec")
        self.space = space
        self.bins = int(bins)
        self._integers = np.issubdtype(space.dtype, np.integer)
        kind = object if self._integers else np.float64  # Python's integers: no bounds are too far apart
        self._low, self._high = space.low.ravel().astype(kind), space.high.ravel().astype(kind)
        if self._integers and int((self._high - self._low).min()) + 1 < bins:
            raise ValueError(f"BinsCodec: {bins} bins of {space}, which has fewer integers; give fewer bins")
        self._ids = _Ids(np.full(self._low.shape, bins))
        self.length, self.width = len(self._low), self._ids.count

    def tokens(self, actions: Any) -> Tensor:
        values = members(self.space, actions, "BinsCodec.tokens").astype(self._low.dtype)
        if self._integers:
            found = (values - self._low) * self.bins // (self._high - self._low + 1)
        else:
            half = self._high / 2 - self._low / 2  # of the extent, which itself may be too large
            found = np.floor((values / 2 - self._low / 2) / np.where(half > 0, half, 1.0) * self.bins)
        return self._ids.of(found.clip(0, self.bins - 1).astype(np.int64))

    def action(self, tokens: Tensor) -> Any:
        bins = self._ids.values(tokens).astype(self._low.dtype)
        if self._integers:
            count = self._high - self._low + 1
            first, end = -(-bins * count // self.bins), -(-(bins + 1) * count // self.bins)
            values = self._low + (first + end - 1) // 2
        else:
            values = 2 * (self._low / 2 + (bins + 0.5) / self.bins * (self._high / 2 - self._low / 2))
        return values.reshape(len(values), *self.space.shape).astype(self.space.dtype)

    def idle(self, batch: int) -> Tensor:
        return self._ids.of(np.zeros((batch, self.length), np.int64))

    def restrict(self, logits: Tensor, index: int) -> Tensor:
        return self._ids.restrict(logits, index)

    def sampler(self, configs: list[SamplerConfig], device: Any) -> TokenSampler:
        return TokenSampler(configs, self.width, device)


def action_codec(space: "Space[Any]", *, bins: int | None = None) -> ActionCodec:
    """The codec of a space.

    Args:
        space: Discrete, MultiDiscrete, MultiBinary or Box.
        bins: of a Box, for every component; None for a Box of continuous actions.

    Raises:
        ValueError: another space, or bins for a space that is no Box.
        ImportError: gymnasium is not installed.
    """
    spaces = gymnasium("action_codec").spaces
    if isinstance(space, spaces.Box):
        return ContinuousCodec(space) if bins is None else BinsCodec(space, bins)
    if not isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise ValueError(
            f"action_codec: {type(space).__name__} is not supported; wanted Discrete, MultiDiscrete, MultiBinary or "
            "Box; write an ActionCodec for it, or wrap the environment with gymnasium.wrappers.TransformAction"
        )
    if bins is not None:
        raise ValueError(f"action_codec: {bins} bins of {space}: only a Box is cut into bins; leave them out")
    return DiscreteCodec(space)


_WHOLE = (torch.int64, torch.int32)


class _Ids:
    """Token ids of components with so many values each, one component's after the other's."""

    def __init__(self, sizes: Integers) -> None:
        self._first = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self._sizes = sizes
        self.count = int(sizes.sum())

    def of(self, values: Integers) -> Tensor:
        return torch.from_numpy(values + self._first)

    def values(self, tokens: Tensor) -> Integers:
        if tokens.dim() != 2 or tokens.shape[1] != len(self._sizes) or tokens.dtype not in _WHOLE:
            raise ValueError(
                f"ActionCodec.action: tokens {tokens.dtype} {list(tokens.shape)}, "
                f"wanted int64 [B, {len(self._sizes)}]: one a component"
            )
        values: Integers = tokens.cpu().numpy() - self._first
        wrong = np.argwhere((values < 0) | (values >= self._sizes))
        if len(wrong):
            row, index = wrong[0].tolist()
            first, size = int(self._first[index]), int(self._sizes[index])
            raise ValueError(
                f"ActionCodec.action: token {index} of row {row} is {int(tokens[row, index])}, "
                f"wanted {first} .. {first + size - 1}"
            )
        return values

    def restrict(self, logits: Tensor, index: int) -> Tensor:
        first, size = int(self._first[index]), int(self._sizes[index])
        only = torch.full_like(logits, -torch.inf)
        only[:, first : first + size] = logits[:, first : first + size]
        return only
