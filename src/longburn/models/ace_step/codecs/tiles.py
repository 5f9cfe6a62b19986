"""A long signal through a stack of convolutions, window by window, with the numbers of one piece and constant memory.

A convolution reads a bounded stretch, so what a stack reads for one frame follows from its kernels, strides,
dilations and paddings (`reach`). Within that distance of a window's inner edges stand zeros of padding for what the
window does not hold. Frames there are dropped, and windows overlap by as much.

All windows have the same length, the last one too, which begins earlier instead: kernels, and whatever is chosen or
compiled by shape, are the same for all of them.

How equal: on the CPU in fp32, bit for bit, as long as a window's part of every convolution's input holds more than
20480 numbers; PyTorch computes shorter signals otherwise, and then results agree to rounding. (Seen with oneDNN 3.12
on AVX-512: the released decoder whole on one thread, all its layers on two.) On GPUs they agree to rounding, because
cuDNN chooses by shape.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longburn.models.ace_step.codecs.geometry import Conv, Reach, length, reach

WINDOW = 512
"""Frames a window: 20 s of ACE-Step 1.5's, of which 3.5 % are computed twice."""


class Signal(Protocol):
    """Audio that can be read in parts, such as a `WavReader`."""

    @property
    def length(self) -> int:
        """Samples in all."""

    def between(self, start: int, stop: int) -> Tensor:
        """Samples `start .. stop - 1`, `[B, C, stop - start]`."""


class Samples:
    """A tensor `[B, C, T]` as a signal."""

    def __init__(self, samples: Tensor) -> None:
        self._samples = samples

    @property
    def length(self) -> int:
        """T."""
        return self._samples.shape[-1]

    def between(self, start: int, stop: int) -> Tensor:
        """`[B, C, stop - start]`, a view."""
        return self._samples[..., start:stop]


class Tile(NamedTuple):
    """A window `start .. stop - 1` of frames, of which `keep_from .. keep_to - 1` are right."""

    start: int
    stop: int
    keep_from: int
    keep_to: int


def tiles(frames: int, window: int, reach: Reach) -> Iterator[Tile]:
    """Windows of one length that together give every frame once; one for all where they fit into it.

    Raises:
        ValueError: no frames, or a window not longer than what its edges lose.
    """
    lost = reach.before + reach.after
    if window <= lost:
        raise ValueError(
            f"tiles: a window of {window} frames, of which {lost} are lost at its edges; wanted at least {lost + 1}"
        )
    if frames < 1:
        raise ValueError(f"tiles: {frames} frames, wanted at least 1")
    return _tiles(frames, window, reach)


def _tiles(frames: int, window: int, reach: Reach) -> Iterator[Tile]:
    done = 0
    while done < frames:
        start = max(0, min(done - reach.before, frames - window))
        stop = min(start + window, frames)
        keep_to = frames if stop == frames else stop - reach.after
        yield Tile(start, stop, done, keep_to)
        done = keep_to


def upsample(
    stack: Callable[[Tensor], Tensor], path: Sequence[Conv], frames: Tensor, *, hop: int, window: int = WINDOW
) -> Iterator[Tensor]:
    """Frames `[B, C, F]` through a stack that gives `hop` samples for each: consecutive pieces `[B, C', n]`.

    Args:
        stack: the module. Gradients are not kept.
        path: its convolutions, in order.
        window: frames a window.

    Raises:
        ValueError: no frames, or a window that is too short.
    """
    total = length(path, frames.shape[-1])
    plan = tiles(frames.shape[-1], window, reach(path, inputs=1, outputs=hop))

    def pieces() -> Iterator[Tensor]:
        for start, stop, keep_from, keep_to in plan:
            with torch.no_grad():
                samples = stack(frames[..., start:stop])
            yield samples[..., (keep_from - start) * hop : min(keep_to * hop, total) - start * hop]

    return pieces()


def downsample(
    stack: Callable[[Tensor], Tensor], path: Sequence[Conv], signal: Signal, *, hop: int, window: int = WINDOW
) -> Iterator[Tensor]:
    """A signal through a stack that gives a frame for every `hop` samples: consecutive pieces `[B, C', n]`.

    Raises:
        ValueError: a signal too short for one frame, or a window that is too short.
    """
    frames = length(path, signal.length)
    if frames < 1:
        raise ValueError(f"downsample: {signal.length} samples do not make a frame; wanted about {hop} or more")
    plan = tiles(frames, window, reach(path, inputs=hop, outputs=1))

    def pieces() -> Iterator[Tensor]:
        for start, stop, keep_from, keep_to in plan:
            samples = signal.between(start * hop, signal.length if stop == frames else stop * hop)
            with torch.no_grad():
                made = stack(samples)
            yield made[..., keep_from - start : keep_to - start]

    return pieces()
