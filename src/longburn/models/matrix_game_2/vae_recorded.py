"""Decoding as CUDA graphs: one for the first latent frame of a stream, one for all others."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longburn.models.matrix_game_2.vae_memory import FrameMemory, Pass, StreamedDecoder


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    latent: Tensor  # from where it reads
    pictures: Tensor  # to where it writes


class RecordedDecoder:
    """A `VideoDecoder` that on CUDA replays what another one did, without the host's part in it; the same bits.

    A frame of either kind runs as usual the first time, which makes the memory and warms up kernels, and is recorded
    the second time. Elsewhere than on CUDA every frame runs as usual. Graphs belong to a memory and go with it; call
    `decode` on one stream of work at a time.

    Args:
        decoder: its parameters must stay where they are.
    """

    def __init__(self, decoder: StreamedDecoder) -> None:
        self.decoder = decoder
        self._seen: WeakKeyDictionary[FrameMemory, set[bool]] = WeakKeyDictionary()
        self._recordings: WeakKeyDictionary[FrameMemory, dict[bool, _Recording]] = WeakKeyDictionary()

    def prepare(self, memory: FrameMemory, *, batch: int, height: int, width: int) -> None:
        """Do at once what the first frames would wait for, and leave the memory as a new stream finds it.

        Args:
            memory: of streams to come.
            batch, height, width: of their latents.
        """
        like = self.decoder.like
        latents = like.new_zeros(batch, self.decoder.latent_channels, 3, height, width)
        for frames in (3, 1):
            memory.reset()
            self.decode(latents[:, :, :frames], memory)
        memory.reset()

    def decode(self, latents: Tensor, memory: FrameMemory) -> Tensor:
        """As `StreamedDecoder.decode`."""
        if not latents.is_cuda:
            return self.decoder.decode(latents, memory)
        self.decoder.check(latents, memory)
        pictures = [self._decode_frame(latent, memory) for latent in torch.split(latents, 1, 2)]
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures, 2)

    def _decode_frame(self, latent: Tensor, memory: FrameMemory) -> Tensor:
        first = memory.frames == 0
        seen = self._seen.setdefault(memory, set())
        if first not in seen:
            seen.add(first)
            return self.decoder.decode(latent, memory)
        recordings = self._recordings.setdefault(memory, {})
        if first not in recordings:
            recordings[first] = self._record(latent[:, :, 0], memory, recordings.get(not first))
        recording = recordings[first]
        recording.latent.copy_(latent[:, :, 0])
        recording.graph.replay()
        memory.frames += 1
        return recording.pictures.clone()

    @torch.no_grad()
    def _record(self, latent: Tensor, memory: FrameMemory, other: _Recording | None) -> _Recording:
        """The two graphs of a memory never run at once and keep nothing between runs, so they share their space."""
        given = latent.clone(memory_format=torch.contiguous_format)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=other.graph.pool() if other else None):
            pictures = self.decoder.decode_frame(given, Pass(memory))
        return _Recording(graph, given, pictures)
