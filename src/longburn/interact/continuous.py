"""Continuous actions: one token an action, and that token is a vector."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
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
        values = _finite(members(self.space, actions, "ContinuousCodec.tokens"), "ContinuousCodec.tokens")
        return torch.from_numpy((values - self._middle) / self._reach).float()[:, None]

    def action(self, tokens: Tensor) -> Any:
        d = len(self._middle)
        if tokens.dim() != 3 or tokens.shape[1:] != (1, d):
            raise ValueError(f"ContinuousCodec.action: tokens of shape {list(tokens.shape)}, wanted [B, 1, {d}]")
        vectors = _finite(tokens[:, 0].double().cpu().numpy(), "ContinuousCodec.action")
        values = (vectors * self._reach + self._middle).reshape(-1, *self.space.shape)
        return values.clip(self.space.low, self.space.high).astype(self.space.dtype)

    def idle(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1, len(self._middle))

    def restrict(self, logits: Tensor, index: int) -> Tensor:
        return logits

    def sampler(self, configs: list[SamplerConfig], device: Any) -> GaussianSampler:
        low, high = ((bound.ravel() - self._middle) / self._reach for bound in (self.space.low, self.space.high))
        return GaussianSampler(configs, torch.from_numpy(low), torch.from_numpy(high), device)


def _finite(vectors: NDArray[Any], operation: str) -> NDArray[Any]:
    """The vectors `[B, d]`.

    Raises:
        ValueError: a number in them is NaN or infinite.
    """
    wrong = np.argwhere(~np.isfinite(vectors))
    if len(wrong):
        row, component = wrong[0].tolist()
        raise ValueError(
            f"{operation}: component {component} of row {row} is {vectors[row, component]}, wanted a finite number"
        )
    return vectors
