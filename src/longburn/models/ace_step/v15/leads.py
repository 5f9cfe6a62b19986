"""What leads a run besides words: a recording to make another version of, to mend, or to go on with.

A task looks at its recording's length alone, and refuses at once what cannot be made of it.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from longburn.models.ace_step.planner.codes import LONGEST, SHORTEST
from longburn.models.ace_step.v15.config import FRAME_RATE
from longburn.models.ace_step.v15.tasks import Span, frame_span, frames_of


@dataclass(frozen=True, eq=False)
class Cover:
    """Another version of a recording, from what its audio tokens say of it.

    Args:
        source: the recording's latents `[1, N, 64]` (`MusicMaker.listen`), 10 to 600 s.
        strength: part of the steps that are led by it, 0 to 1.
        closeness: 0 starts from noise, more starts nearer to the recording itself, up to 1.

    Raises:
        ValueError: a recording or a number out of range.
    """

    source: Tensor
    strength: float = 1.0
    closeness: float = 0.0

    def __post_init__(self) -> None:
        _check_length("Cover", self.source)
        for name in ("strength", "closeness"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"Cover: {name} is {value}, wanted a number in [0, 1]")


@dataclass(frozen=True, eq=False)
class Repaint:
    """A recording with the span from `start` to `end` seconds made anew.

    Args:
        source: the recording's latents `[1, N, 64]`, 10 to 600 s.
        start, end: what lies outside the recording is cut off.

    Raises:
        ValueError: a recording out of range, or a span that is empty or lies outside it.
    """

    source: Tensor
    start: float
    end: float

    def __post_init__(self) -> None:
        _check_length("Repaint", self.source)
        _ = self.span

    @property
    def span(self) -> Span:
        """Frames to make anew."""
        return frame_span(self.start, self.end, self.source.shape[1])


@dataclass(frozen=True, eq=False)
class Extend:
    """A recording that goes on for `seconds` more.

    Args:
        source: its latents `[1, N, 64]`.
        seconds: to add.
        context: seconds at its end that the new part is made under; None is all of it. More costs more, and what is
            not heard is not referred to.

    Raises:
        ValueError: nothing to add or to hear, or not 10 to 600 s of both together.
    """

    source: Tensor
    seconds: float
    context: float | None = None

    def __post_init__(self) -> None:
        there = check_latents("Extend", self.source)
        numbers = (self.seconds, 1.0 if self.context is None else self.context)
        if not all(0 < number < math.inf for number in numbers) or not 0 < self.heard <= there:
            raise ValueError(
                f"Extend: {self.seconds} s to add under {'all' if self.context is None else f'{self.context} s'} of "
                f"{there / FRAME_RATE} s; wanted more than 0 s, under more than 0 s and at most all of it"
            )
        together = (self.heard + self.more) / FRAME_RATE
        if not SHORTEST <= together <= LONGEST:
            raise ValueError(
                f"Extend: {self.heard / FRAME_RATE} s that are heard and {self.seconds} s to add are {together} s; "
                f"wanted {SHORTEST} to {LONGEST} s together"
            )

    @property
    def heard(self) -> int:
        """Frames at the recording's end that are heard."""
        return self.source.shape[1] if self.context is None else frames_of(self.context)

    @property
    def more(self) -> int:
        """Frames to add."""
        return frames_of(self.seconds)


Task = Cover | Repaint | Extend


def check_latents(name: str, latents: Tensor, channels: int | None = None) -> int:
    """How many frames latents `[1, N, C]` of one recording have; raises ValueError unless they are that."""
    shape = tuple(latents.shape)
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 1 or shape[2] != (shape[2] if channels is None else channels):
        raise ValueError(
            f"{name}: latents {shape}, wanted [1, N, {channels or 'C'}] with N of at least 1; take them one by one"
        )
    return shape[1]


def _check_length(owner: str, source: Tensor) -> None:
    seconds = check_latents(owner, source) / FRAME_RATE
    if not SHORTEST <= seconds <= LONGEST:
        raise ValueError(f"{owner}: the recording is {seconds} s long, wanted {SHORTEST} to {LONGEST} s; take a part")
