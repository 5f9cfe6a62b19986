"""From observations to embeddings, for the usual spaces, and the smallest head."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longburn.interact.extras import gymnasium
from longburn.interact.members import countable, members, scaling

if TYPE_CHECKING:
    from gymnasium.spaces import Box, Space


class EmbeddingEncoder(nn.Module):
    """Discrete, MultiDiscrete or MultiBinary observations: one token, the sum of its components' embeddings.

    Args:
        space: of one row's observations.
        dim: D.
    """

    def __init__(self, space: "Space[Any]", dim: int) -> None:
        super().__init__()
        sizes, starts = countable(space, "EmbeddingEncoder")
        self.space = space
        self._offset = np.cumsum(sizes) - sizes - starts
        self.table = nn.Embedding(int(sizes.sum()), dim)

    def encode(self, observations: Any) -> Tensor:
        """`[B, 1, D]` of integers `[B, *shape]`.

        Raises:
            ValueError: another shape, or an observation that is not in the space; says which row's.
        """
        rows = members(self.space, observations, "EmbeddingEncoder.encode")
        weight = self.table.weight
        ids = torch.from_numpy(rows.astype(np.int64) + self._offset).to(weight.device)
        return weight[ids].sum(1, keepdim=True)


class LinearEncoder(nn.Module):
    """A Box as one token: bounded components are scaled to -1 .. 1, and a linear layer follows.

    Args:
        space: of one row's observations.
        dim: D.
    """

    def __init__(self, space: "Box", dim: int) -> None:
        super().__init__()
        if not isinstance(space, gymnasium("LinearEncoder").spaces.Box):
            raise ValueError(f"LinearEncoder: {space}: wanted a Box")
        self.space = space
        # A bound so far away that nothing ever comes near it, as some environments have, is none.
        self._middle, self._reach = scaling(space, far=1e6)
        self.linear = nn.Linear(len(self._middle), dim)

    def encode(self, observations: Any) -> Tensor:
        """`[B, 1, D]` of numbers `[B, *shape]`."""
        rows = _rows(self.space, observations, "LinearEncoder.encode")
        scaled = (rows.reshape(len(rows), -1) - self._middle) / self._reach
        weight = self.linear.weight
        x: Tensor = self.linear(torch.from_numpy(scaled).to(weight.device, weight.dtype))
        return x[:, None]


class PatchEncoder(nn.Module):
    """Images as one token a patch, in the order of reading.

    Args:
        space: a Box of uint8 `[height, width, channels]`.
        dim: D.
        patch: height and width of a patch; both must divide the image.
    """

    def __init__(self, space: "Box", dim: int, patch: tuple[int, int]) -> None:
        super().__init__()
        box = isinstance(space, gymnasium("PatchEncoder").spaces.Box)
        if not box or len(space.shape) != 3 or space.dtype != np.uint8:
            raise ValueError(f"PatchEncoder: {space}: wanted a Box of images, uint8 [height, width, channels]")
        height, width, channels = space.shape
        if min(patch) < 1 or height % patch[0] or width % patch[1]:
            raise ValueError(f"PatchEncoder: patches of {patch} do not divide images of {height} x {width}")
        self.space = space
        self.project = nn.Conv2d(channels, dim, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn((height // patch[0]) * (width // patch[1]), dim))

    def encode(self, observations: Any) -> Tensor:
        """`[B, patches, D]` of images `[B, height, width, channels]`, uint8 or other integers within 0 .. 255.

        Raises:
            ValueError: another shape, numbers of another type, or beyond 0 .. 255.
        """
        rows = _bytes(_rows(self.space, observations, "PatchEncoder.encode"))
        weight = self.project.weight
        images = torch.from_numpy(np.ascontiguousarray(rows)).to(weight.device).permute(0, 3, 1, 2)
        patches: Tensor = self.project(images.to(weight.dtype) / 127.5 - 1)
        return patches.flatten(2).transpose(1, 2) + self.places


class LinearHead(nn.Module):
    """Logits by one linear layer: the least that makes a streaming model act.

    Args:
        dim: M of the features.
        width: V, of the codec.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, width)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[B, V]` of features `[B, M]`."""
        out: Tensor = self.linear(hidden)
        return out


def _rows(space: "Space[Any]", observations: Any, operation: str) -> NDArray[Any]:
    """B rows' observations as an array.

    Raises:
        ValueError: another shape.
    """
    rows = np.asarray(observations)
    if rows.ndim < 1 or rows.shape[1:] != space.shape:
        wanted = ", ".join(["B", *map(str, space.shape or ())])
        raise ValueError(f"{operation}: observations of shape {list(rows.shape)}, wanted [{wanted}]")
    return rows


def _bytes(images: NDArray[Any]) -> NDArray[np.uint8]:
    if images.dtype == np.uint8:
        return images
    wanted = "wanted uint8 or other integers within 0 .. 255"
    if images.dtype.kind not in "iu":
        raise ValueError(f"PatchEncoder.encode: images of {images.dtype}, {wanted}")
    wrong = images[(images < 0) | (images > 255)]
    if len(wrong):
        raise ValueError(f"PatchEncoder.encode: images that hold {wrong[0]}, {wanted}")
    return images.astype(np.uint8)
