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


class _Last(NamedTuple):
    """A call, and its graph."""

    varying: Hashable
    fixed: Tensors
    parameters: Tensors
    addresses: Hashable
    recording: _Recording


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
        self._last: _Last | None = None
        self._pool: object = None

    def __call__(self, changing: Sequence[Tensor], fixed: Sequence[Tensor], settings: Settings) -> Tensor:
        """A tensor of the caller's own.

        Args:
            changing: copied at every call.
            fixed: copied only when they are other tensors than at the last call, or were written to.
            settings: whatever else the pass depends on.
        """
        changing, fixed = tuple(changing), tuple(fixed)
        if self.why_not is not None or not changing[0].is_cuda or torch.cuda.is_current_stream_capturing():
            return self.run(changing, fixed, settings)
        recording = self._of_last(changing, fixed, settings) or self._of(changing, fixed, settings)
        if recording is None:
            return self.run(changing, fixed, settings)
        for own, given in zip(recording.changing, changing, strict=True):
            own.copy_(given)
        recording.graph.replay()
        return recording.out.clone()

    def forget(self) -> None:
        """Give back all graphs and their memory."""
        self._recordings.clear()
        self._last = self._pool = None

    def _of_last(self, changing: Tensors, fixed: Tensors, settings: Settings) -> _Recording | None:
        """The graph of the last call, if this one goes on with it: a loop's host must not fall behind its device."""
        if self._last is None:
            return None
        last = self._last
        same = len(last.fixed) == len(fixed) and all(a is b for a, b in zip(last.fixed, fixed, strict=True))
        goes_on = same and last.varying == _varying(changing, fixed, settings)
        return last.recording if goes_on and last.addresses == _addresses(last.parameters) else None

    def _of(self, changing: Tensors, fixed: Tensors, settings: Settings) -> _Recording | None:
        """The graph of such a call, which has these fixed tensors now; None if it is the first one."""
        parameters = (*self.model.parameters(), *self.model.buffers())
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*changing, *fixed, *parameters)):
            return None
        shapes = tuple((t.shape, t.dtype, t.device) for t in fixed)
        key = (_varying(changing, (), settings), shapes, _addresses(parameters))
        if key not in self._recordings:
            while len(self._recordings) >= self.keep:
                self._recordings.popitem(last=False)
            self._recordings[key], self._last = None, None
            return None
        self._recordings.move_to_end(key)
        recording = self._recordings[key] or self._record(changing, fixed, settings)
        if recording is not None:
            self._recordings[key] = recording
            for own, given in zip(recording.fixed, fixed, strict=True):
                own.copy_(given)
            varying = _varying(changing, fixed, settings)
            self._last = _Last(varying, fixed, parameters, _addresses(parameters), recording)
        return recording

    @torch.inference_mode(False)  # what is made here is written to in either mode
    @torch.no_grad()
    def _record(self, changing: Tensors, fixed: Tensors, settings: Settings) -> _Recording | None:
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
        return _Recording(graph, *own, out)


def _addresses(tensors: Tensors) -> Hashable:
    return tuple(t.data_ptr() for t in tensors)


def _varying(changing: Tensors, fixed: Tensors, settings: Hashable) -> Hashable:
    """What a graph depends on; and how often its fixed tensors were written to, as far as PyTorch counts it."""
    shapes = tuple((t.shape, t.dtype, t.device) for t in changing)
    versions = tuple(0 if t.is_inference() else t._version for t in fixed)
    return chosen(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), settings, shapes, versions
