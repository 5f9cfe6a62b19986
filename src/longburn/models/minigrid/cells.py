"""What stands in a cell, as MiniGrid encodes it: one (object, colour, state) a cell, and back."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

OBJECTS, COLORS, STATES = 11, 6, 4  # how many of each MiniGrid knows; a state is a door's, or an agent's direction
VIEW = 7  # cells on a side of what an agent sees
DIRECTIONS = 4  # right, down, left, up
ACTIONS = ("turn left", "turn right", "forward", "pick up", "drop", "toggle", "wait")
LEFT, RIGHT, FORWARD, PICK_UP, DROP, TOGGLE, WAIT = range(7)
EAST, SOUTH, WEST, NORTH = range(4)

Cells = NDArray[np.uint8]


def check_cells(operation: str, image: Any, shape: tuple[int, ...]) -> Cells:
    """The array, if it is cells of MiniGrid of this shape (without the last axis of 3).

    Raises:
        ValueError: another shape or type, or numbers that MiniGrid does not have.
    """
    array = np.asarray(image)
    if array.shape != (*shape, 3) or array.dtype != np.uint8:
        raise ValueError(
            f"{operation}: got {array.dtype} of shape {array.shape}, wanted uint8 {(*shape, 3)}: "
            "object, colour and state of every cell, as MiniGrid encodes them"
        )
    for axis, (name, count) in enumerate((("objects", OBJECTS), ("colours", COLORS), ("states", STATES))):
        if (largest := int(array[..., axis].max(initial=0))) >= count:
            raise ValueError(
                f"{operation}: {name} up to {largest}, wanted less than {count}; is this MiniGrid's symbolic image?"
            )
    return array
