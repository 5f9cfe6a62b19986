"""A pass of a model as a CUDA graph, recorded by the shapes that it is called with."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from longburn.kernels.registry import chosen

Settings = TypeVar("Settings", bound=Hashable)
Tensors = tuple[Tensor, ...]


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    changing: Tensors  # what the graph reads
    fixed: Tensors
    out: Tensor  # and where it writes


class Recorded(Generic[Settings]):
    """`run(changing, fixed, settings)`, which launches once per call on CUDA what it would launch kernel by kernel.

    A loop of passes over one input is bound by the host where the passes are short. The first call of a set of shapes
    runs as it is, the second one is recorded, further ones replay it. Elsewhere, and where somebody wants gradients,
    `run` is simply called. The bits are the same. Calls belong on one stream.

    Args:
        run: gives one tensor. It must not wait for the device, nor keep what it is given.
        model: whose parameters it reads; where they have moved, it is recorded anew.
        keep: sets of shapes whose graphs (and the memory of their passes, which they share) are kept.

    Attributes:
        captures: how many graphs were captured so far.
        why_not: why none can be, or None.
    """

    def __init__(self, run: Callable[[Tensors, Tensors, Settings], Tensor], model: nn.Module, *, keep: int = 2) -> None:
        self.run, self.model, self.keep = run, model, keep
        self.captures = 0
        self.why_not: str | None = None
        self._recordings: OrderedDict[Hashable, _Recording | None] = OrderedDict()  # None: called once
        self._copied: dict[Hashable, tuple[Tensors, tuple[int, ...]]] = {}
        self._pool: object = None

    def __call__(self, changing: Sequence[Tensor], fixed: Sequence[Tensor], settings: Settings) -> Tensor:
        """A tensor of the caller's own.

        Args:
            changing: copied at every call.
            fixed: copied only when they are other tensors than at the last call, or were written to.
            settings: whatever else the pass depends on.
        """
        changing, fixed = tuple(changing), tuple(fixed)
        every = (*changing, *fixed)
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (*every, *self.model.parameters()))
        if self.why_not is not None or not every[0].is_cuda or wanted or torch.cuda.is_current_stream_capturing():
            return self.run(changing, fixed, settings)
        key = (chosen(), torch.are_deterministic_algorithms_enabled(), settings, _shapes(every), self._addresses())
        if key not in self._recordings:
            self._make_room()
            self._recordings[key] = None
            return self.run(changing, fixed, settings)
        self._recordings.move_to_end(key)
        recording = self._recordings[key] or self._record(key, changing, fixed, settings)
        if recording is None:
            return self.run(changing, fixed, settings)
        for own, given in zip(recording.changing, changing, strict=True):
            own.copy_(given)
        self._copy_fixed(key, recording, fixed)
        recording.graph.replay()
        return recording.out.clone()

    def forget(self) -> None:
        """Give back all graphs and their memory."""
        self._recordings.clear()
        self._copied.clear()
        self._pool = None

    def _copy_fixed(self, key: Hashable, recording: _Recording, fixed: Tensors) -> None:
        versions = _versions(fixed)
        held, seen = self._copied.get(key, ((), ()))
        if seen != versions or len(held) != len(fixed) or any(a is not b for a, b in zip(held, fixed, strict=True)):
            for own, given in zip(recording.fixed, fixed, strict=True):
                own.copy_(given)
            self._copied[key] = fixed, versions

    def _make_room(self) -> None:
        while len(self._recordings) >= self.keep:
            oldest, _ = self._recordings.popitem(last=False)
            self._copied.pop(oldest, None)

    @torch.inference_mode(False)  # what is made here is written to in either mode
    @torch.no_grad()
    def _record(self, key: Hashable, changing: Tensors, fixed: Tensors, settings: Settings) -> _Recording | None:
        device = changing[0].device
        own = tuple(t.clone() for t in changing), tuple(t.clone() for t in fixed)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(device),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),  # type: ignore[arg-type]
            ):
                out = self.run(*own, settings)
        except Exception as reason:  # whatever it is, the pass can run as usual
            self.why_not = f"{type(reason).__name__}: {reason}"
            torch.cuda.synchronize(device)
            self.forget()
            return None
        self.captures += 1
        self._recordings[key] = recording = _Recording(graph, *own, out)
        self._copied[key] = fixed, _versions(fixed)
        return recording

    def _addresses(self) -> Hashable:
        return tuple(t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers()))


def _shapes(tensors: Tensors) -> Hashable:
    return tuple((t.shape, t.dtype, t.device) for t in tensors)


def _versions(tensors: Tensors) -> tuple[int, ...]:
    """How often each was written to, as far as PyTorch counts it."""
    return tuple(0 if t.is_inference() else t._version for t in tensors)
