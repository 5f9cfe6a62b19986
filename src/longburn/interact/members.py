"""Whether what came is in a space, and how a Box is brought to -1 .. 1."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longburn.interact.extras import gymnasium

if TYPE_CHECKING:
    from gymnasium.spaces import Box, Space

Integers = NDArray[np.int64]


def members(space: "Space[Any]", values: Any, operation: str) -> NDArray[Any]:
    """B rows' members of a space of numbers, as `[B, components]`. Any type of number will do, if it lies in the space:
    a Box of fp32 also takes fp64.

    Raises:
        ValueError: another shape, or a value that is not in the space; says which row's.
    """
    rows = np.asarray(values)
    if rows.ndim < 1 or rows.shape[1:] != space.shape:
        wanted = ", ".join(["B", *map(str, space.shape or ())])
        raise ValueError(f"{operation}: values of shape {list(rows.shape)}, wanted [{wanted}] for {space}")
    low, high, kinds = _bounds(space, operation)
    flat = rows.reshape(len(rows), low.size)
    numbers = rows.dtype.kind in kinds
    inside = (flat >= low) & (flat <= high) if numbers else np.zeros(flat.shape, bool)
    wrong = np.flatnonzero(~inside.all(1))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"{operation}: row {row} has {rows[row].tolist()}, which is not in {space}")
    return flat


def countable(space: "Space[Any]", operation: str) -> tuple[Integers, Integers]:
    """How many values each component of a Discrete, MultiDiscrete or MultiBinary has, `[components]`, and the first.

    Raises:
        ValueError: another space.
    """
    spaces = gymnasium(operation).spaces
    if isinstance(space, spaces.Discrete):
        sizes, starts = np.array([space.n]), np.array([space.start])
    elif isinstance(space, spaces.MultiDiscrete):
        sizes, starts = space.nvec.ravel(), space.start.ravel()
    elif isinstance(space, spaces.MultiBinary):
        sizes, starts = np.full(space.shape, 2).ravel(), np.zeros(space.shape).ravel()
    else:
        raise ValueError(f"{operation}: {space}: wanted Discrete, MultiDiscrete or MultiBinary")
    return sizes.astype(np.int64), starts.astype(np.int64)


def _bounds(space: Any, operation: str) -> tuple[NDArray[Any], NDArray[Any], str]:
    """The least and the greatest value of every component, and the kinds of numbers that they may be."""
    if isinstance(space, gymnasium(operation).spaces.Box):
        return space.low.ravel(), space.high.ravel(), "iubf" if np.issubdtype(space.dtype, np.floating) else "iub"
    sizes, starts = countable(space, operation)
    return starts, starts + sizes - 1, "iub"


def scaling(space: "Box", far: float = np.inf) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Middle and half of the extent of every component, `[d]`; 0 and 1 of those with a bound at `far` or beyond."""
    low, high = (bound.ravel().astype(np.float64) for bound in (space.low, space.high))
    bounded = (np.abs(low) < far) & (np.abs(high) < far)
    low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
    low, high = low / 2, high / 2  # so that no bounds are too far apart
    return low + high, np.where(high > low, high - low, 1.0)
