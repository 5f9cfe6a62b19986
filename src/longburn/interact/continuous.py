"""Continuous actions: one token an action, and that token is a vector."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longburn.interact.extras import gymnasium
from longburn.interact.members import members, scaling
from longburn.interact.samplers import GaussianSampler
from longburn.sampling import SamplerConfig

if TYPE_CHECKING:
    from gymnasium.spaces import Box


class ContinuousCodec:
    """A Box of d real numbers as one vector: bounded components are scaled to -1 .. 1, others stay as they are.

    A head gives means and logarithms of standard deviations, `width` 2 d.

    Args:
        space: a Box of floating-point numbers.

    Raises:
        ValueError: another space.
    """

    def __init__(self, space: "Box") -> None:
        spaces = gymnasium("ContinuousCodec").spaces
        if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
            raise ValueError(f"ContinuousCodec: {space}: wanted a Box of floating-point numbers; use BinsCodec")
        self.space = space
        self._middle, self._reach = scaling(space)
        self.length, self.width = 1, 2 * len(self._middle)

    def tokens(self, actions: Any) -> Tensor:
        values = members(self.space, actions, "ContinuousCodec.tokens")
        return torch.from_numpy((values - self._middle) / self._reach).float()[:, None]

    def action(self, tokens: Tensor) -> Any:
        vectors = tokens[:, 0].double().cpu().numpy()
        wrong = np.argwhere(np.isnan(vectors))
        if len(wrong):
            raise ValueError(f"ContinuousCodec.action: component {wrong[0][1]} of row {wrong[0][0]} is NaN")
        values = (vectors * self._reach + self._middle).reshape(-1, *self.space.shape)
        return values.clip(self.space.low, self.space.high).astype(self.space.dtype)

    def idle(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1, len(self._middle))

    def restrict(self, logits: Tensor, index: int) -> Tensor:
        return logits

    def sampler(self, configs: list[SamplerConfig], device: Any) -> GaussianSampler:
        low, high = ((bound.ravel() - self._middle) / self._reach for bound in (self.space.low, self.space.high))
        return GaussianSampler(configs, torch.from_numpy(low), torch.from_numpy(high), device)
