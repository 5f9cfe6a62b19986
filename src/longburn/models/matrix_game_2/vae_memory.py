"""What streamed convolutions over time remember between frames, and who decodes video that way."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call


class FrameMemory:
    """The last input frames of every layer that looks back in time: the whole state of one group of streams.

    Rows of a batch begin together and know nothing of each other. Memory is made when the first frame comes, of its
    size, and then stays where it is, so that a recorded graph may write to it; it does not grow.

    Attributes:
        frames: latent frames taken in so far.
        tensors: what is kept, one a layer, in the order in which a pass meets them. Zeros mean "nothing before".
    """

    def __init__(self) -> None:
        self.frames = 0
        self.tensors: list[Tensor] = []
        self._of: tuple[weakref.ref[object], str, str] | None = None  # whose it is, and for what frames
        self._whole = True

    def reset(self) -> None:
        """Begin again, for streams of the same size, in the same memory."""
        for tensor in self.tensors:
            tensor.zero_()
        self.frames, self._whole = 0, True

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def fit(self, owner: object, operation: str, frame: Tensor) -> None:
        """See that a frame `[B, C, height, width]` of `owner` belongs to the streams; the first one decides.

        Raises:
            ValueError: it is of someone else, or of another shape, type or device.
            RuntimeError: a pass was interrupted.
        """
        came = f"frames {list(frame.shape)} (rows, channels, height, width), {frame.dtype} on {frame.device}"
        whose, of, had = self._of = self._of or (weakref.ref(owner), operation, came)
        if (whose(), of, had) != (owner, operation, came):
            other = "" if whose() is owner else " of another model"
            raise ValueError(
                f"{operation}: {came}, but this FrameMemory is of {of}{other} with {had}; use one for each model, "
                "size, batch and direction"
            )
        if not self._whole:
            raise RuntimeError(f"{operation}: a pass over this FrameMemory was interrupted; reset() begins again")

    @contextmanager
    def open(self) -> "Iterator[Pass]":
        """One pass over the next latent frame, which counts when it ends without an exception."""
        self._whole = False
        yield Pass(self)
        self._whole = True
        self.frames += 1


class Pass:
    """One walk through all layers: hands each the memory that is its own.

    Attributes:
        first: whether nothing was taken in before.
    """

    def __init__(self, memory: FrameMemory) -> None:
        self.first = memory.frames == 0
        self._tensors, self._next = memory.tensors, 0

    def take(self, x: Tensor, frames: int) -> Tensor:
        """The `frames` last inputs `[B, frames, H, W, C]` of the layer whose next input is x `[B, T, H, W, C]`."""
        if self._next == len(self._tensors):
            self._tensors.append(zeros(x, x.shape[0], frames, *x.shape[2:]))
        self._next += 1
        return self._tensors[self._next - 1]

    def singly(self, x: Tensor) -> Iterator[Tensor]:
        """The frames of x `[B, T, H, W, C]` one by one, `[B, 1, H, W, C]`, each for the same layers, which must make
        all of them. Where pictures are large, this bounds what exists at once.
        """
        start = self._next
        for frame in torch.split(x, 1, 1):
            self._next = start
            yield frame

    def extend(self, x: Tensor, frames: int) -> Tensor:
        """x with the frames before it, `[B, frames + T, H, W, C]`, the last of which are now the remembered ones."""
        past = self.take(x, frames)
        y = torch.cat([past, x], 1)
        past.copy_(y[:, -frames:])
        return y


class VideoDecoder(Protocol):
    """Turns latent frames into pictures as they come."""

    def decode(self, latents: Tensor, memory: FrameMemory) -> Tensor:
        """Latents `[B, C, F, h, w]` to pictures `[B, 3, n, H, W]` in -1 .. 1; the first latent frame of a stream is one
        picture, every other one four.
        """
        ...


class StreamedDecoder(nn.Module, ABC):
    """A decoder that takes one latent frame at a time, whatever it is given: cutting a stream never changes a bit.

    Subclasses define `decode_frame`.
    """

    latent_channels: int

    @abstractmethod
    def decode_frame(self, latent: Tensor, step: Pass) -> Tensor:
        """One latent frame `[B, C, h, w]` to pictures `[B, 3, n, H, W]`, on the device alone: it can be recorded.

        The first one of a memory goes through it on the meta device too, if it can.
        """

    def forward(self, latent: Tensor, step: Pass) -> Tensor:
        """`decode_frame`."""
        return self.decode_frame(latent, step)

    @property
    def like(self) -> Tensor:
        """A parameter: latents are of its type and on its device."""
        return next(self.parameters())

    @torch.no_grad()
    def decode(self, latents: Tensor, memory: FrameMemory) -> Tensor:
        """Latents `[B, C, F, h, w]`, F >= 1, to pictures `[B, 3, n, H, W]` in -1 .. 1.

        The first latent frame of a stream is one picture, every other one as many as the time factor says.

        Raises:
            ValueError: another shape, type or device, or frames of another size than the stream's. The memory is then
                as it was.
        """
        self.check(latents, memory)
        if not memory.tensors:
            self._furnish(memory, latents[:, :, 0])
        pictures = []
        for latent in latents.unbind(2):
            with memory.open() as step:
                pictures.append(self.decode_frame(latent, step))
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures, 2)

    def _furnish(self, memory: FrameMemory, latent: Tensor) -> None:
        """Make all memory before the first pass: among what that uses only once it would leave gaps for ever.

        A decoder that cannot go through the meta device (a quantised one, or one with hooks that look at numbers) makes
        it in its first pass.
        """
        dry = FrameMemory()
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        nowhere = {name: tensor.to("meta") for name, tensor in state.items()}
        try:
            functional_call(self, nowhere, (latent.to("meta"), Pass(dry)))
        except RuntimeError:  # as both of these are told
            return
        sizes = [tensor.numel() for tensor in dry.tensors]
        parts = torch.split(zeros(latent, sum(sizes)), sizes)
        memory.tensors = [part.view(tensor.shape) for part, tensor in zip(parts, dry.tensors, strict=True)]

    def check(self, latents: Tensor, memory: FrameMemory) -> None:
        """See that `decode` can take these latents.

        Raises:
            ValueError: it cannot.
        """
        name, like = type(self).__name__, self.like
        if latents.dim() != 5 or latents.shape[1] != self.latent_channels or 0 in latents.shape:
            raise ValueError(
                f"{name}.decode: the latents are {list(latents.shape)}, wanted [B, {self.latent_channels}, F, h, w]"
            )
        if latents.dtype != like.dtype or latents.device != like.device:
            raise ValueError(
                f"{name}.decode: the latents are {latents.dtype} on {latents.device}, the decoder is {like.dtype} on "
                f"{like.device}; move one to the other"
            )
        memory.fit(self, f"{name}.decode", latents[:, :, 0])


def zeros(like: Tensor, *shape: int) -> Tensor:
    """New memory, which may be written to in and out of `torch.inference_mode` wherever it was made."""
    with torch.inference_mode(False):
        return like.new_zeros(shape)


def to_uint8(pictures: Tensor) -> Tensor:
    """Pictures `[B, 3, n, H, W]` in -1 .. 1 to bytes `[B, n, H, W, 3]` to be shown, on the same device."""
    return (pictures.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
