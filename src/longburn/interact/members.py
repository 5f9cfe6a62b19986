"""Whether what came is in a space, and how a Box is brought to -1 .. 1."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longburn.interact.extras import gymnasium

if TYPE_CHECKING:
    from gymnasium.spaces import Box, Space


def members(space: "Space[Any]", values: Any, operation: str) -> NDArray[Any]:
    """B rows' members of a space of numbers, as `[B, components]`. Any type of number will do, if it lies in the space.

    Raises:
        ValueError: another shape, or a value that is not in the space; says which row's.
    """
    rows = np.asarray(values)
    if rows.ndim < 1 or rows.shape[1:] != space.shape:
        wanted = ", ".join(["B", *map(str, space.shape or ())])
        raise ValueError(f"{operation}: values of shape {list(rows.shape)}, wanted [{wanted}] for {space}")
    for row, value in enumerate(rows):
        if not holds(space, value):
            raise ValueError(f"{operation}: row {row} has {value.tolist()}, which is not in {space}")
    return rows.reshape(len(rows), -1)


def holds(space: "Space[Any]", value: Any) -> bool:
    """Whether a number or array lies in the space, whatever its type: a Box of fp32 also takes fp64."""
    spaces: Any = gymnasium("a space").spaces
    if isinstance(space, spaces.Box):
        return bool(np.all((value >= space.low) & (value <= space.high)))
    if value.dtype.kind not in "iub":
        return False
    if isinstance(space, spaces.Discrete):
        return bool(space.start <= value < space.start + space.n)
    return bool(space.contains(value.astype(space.dtype)))


def scaling(space: "Box", far: float = np.inf) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Middle and half of the extent of every component, `[d]`; 0 and 1 of those with a bound at `far` or beyond."""
    low, high = (bound.ravel().astype(np.float64) for bound in (space.low, space.high))
    bounded = (np.abs(low) < far) & (np.abs(high) < far)
    low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
    return (low + high) / 2, np.where(high > low, (high - low) / 2, 1.0)
