"""A step recorded once and made again without Python: the CPU's counterpart of a CUDA graph.

While a function runs, every launch of a compiled kernel is written down with the addresses it was given, and every
tensor that the function makes is kept, so that those addresses stay valid. To run the tape is to make the same launches
again, on whatever the inputs hold by then.

That is the same function only if nothing else computed on the way. PyTorch's dispatcher shows every operator to the
recorder, which lets pass: those that only look at memory in another shape, those that see no input nor anything
computed from one (their results are constants), and a few that have a compiled twin here. Anything else makes the
function `Unrecordable`. What Python itself reads from an input (`tolist`, `numpy`) is not seen: compare a tape with the
function on other inputs before relying on it.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longburn.kernels import native

_FAR = 2**62
_one_at_a_time = threading.Lock()


class Unrecordable(RuntimeError):  # noqa: N818 (it says what the function is)
    """An operator on changing data has no compiled twin."""


def is_recording() -> bool:
    """Whether this thread records a tape: values of inputs must not be looked at now."""
    return native.is_listening()


class Tape:
    """Recorded launches, the tensors they use, and what the recorded function returned.

    Args:
        function: what to record; it is run, with all its effects.
        inputs: the tensors whose contents will differ from run to run, those that it writes included.

    Raises:
        Unrecordable: names the operator. What the function did before it stays done.
    """

    def __init__(self, function: Callable[[], Tensor], inputs: Sequence[Tensor]) -> None:
        self._launches: list[native.Launch] = []
        recorder = _Recorder(inputs)
        with _listening(self._launches.append), recorder:
            self.result = function()
        self._kept = recorder.kept
        calls = [word for call in self._launches for word in _call(call)]
        self._calls = (ctypes.c_int64 * len(calls))(*calls)

    def __len__(self) -> int:
        """Launches."""
        return len(self._launches)

    def run(self) -> Tensor:
        """Make the launches again; `result` then holds what the function would return now."""
        native.launch("replay", ctypes.addressof(self._calls), len(self._launches))
        return self.result


def _call(launch: native.Launch) -> tuple[int, int]:
    function, arguments = launch
    return ctypes.cast(function, ctypes.c_void_p).value or 0, ctypes.addressof(arguments)


@contextmanager
def _listening(listener: Callable[[native.Launch], None]) -> Iterator[None]:
    with _one_at_a_time:
        native.listen(listener)
        try:
            yield
        finally:
            native.listen(None)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches PyTorch's operators; keeps every tensor, and knows which of them change from run to run."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[Tensor] = list(inputs)
        self._changing = {_memory(tensor) for tensor in inputs}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to say yes would load PyTorch's whole compiler, some 40 MiB."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [a for a in (*_flat(args), *_flat(tuple(kwargs.values()))) if isinstance(a, Tensor)]
        fresh = name in ("empty", "empty_like", "new_empty", "empty_strided")  # filled by launches, so it changes
        if not fresh and any(_memory(tensor) in self._changing for tensor in given):
            return self._on_changing(func, name, given, args, kwargs)
        out = func(*args, **kwargs)
        for tensor in (t for t in _flat((out,)) if isinstance(t, Tensor)):
            self._keep(tensor, changes=fresh)
        return out

    def _on_changing(
        self, func: Any, name: str, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        twin = None if func._schema.is_mutable else _TWINS.get(name)
        if twin is not None:
            out = twin(*args, **kwargs)
            if out is None:
                raise Unrecordable(f"{func} on {[(tuple(t.shape), t.dtype) for t in given]} has no compiled twin")
            self._keep(out, changes=True)
            return out
        if not func._schema.is_mutable:
            out = func(*args, **kwargs)
            tensors = [t for t in _flat((out,)) if isinstance(t, Tensor)]
            memories = {_memory(t) for t in given}
            if tensors and all(_memory(t) in memories for t in tensors):  # a view
                for tensor in tensors:
                    self._keep(tensor, changes=False)
                return out
        raise Unrecordable(f"{func} has no compiled twin")

    def _keep(self, tensor: Tensor, *, changes: bool) -> None:
        self.kept.append(tensor)
        if changes:
            self._changing.add(_memory(tensor))


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _flat(values: tuple[Any, ...]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(tuple(value))
        else:
            yield value


def _add(x: Tensor, y: Tensor, *, alpha: float = 1) -> Tensor | None:
    plain = isinstance(y, Tensor) and x.shape == y.shape and x.is_contiguous() and y.is_contiguous() and alpha == 1
    if not plain or native.why_not(x, y) is not None:
        return None
    out = torch.empty_like(x)
    native.launch("add", *map(native.address, (x, y, out)), x.numel(), native.TYPES[x.dtype])
    return out


def _embedding(weight: Tensor, ids: Tensor, *_: Any) -> Tensor | None:
    if not (weight.is_contiguous() and ids.is_contiguous() and ids.dtype == torch.int64):
        return None
    out = torch.empty(*ids.shape, weight.shape[1], dtype=weight.dtype)
    bytes_ = weight.shape[1] * weight.itemsize
    native.launch("embed", *map(native.address, (ids, weight, out)), ids.numel(), bytes_)
    return out


def _clamp(x: Tensor, low: int | None = None, high: int | None = None) -> Tensor | None:
    if x.dtype != torch.int64 or not x.is_contiguous():
        return None
    out = torch.empty_like(x)
    bounds = (-_FAR if low is None else low, _FAR if high is None else high)
    native.launch("clamp", *map(native.address, (x, out)), x.numel(), *bounds)
    return out


# PyTorch's operators that a tape can take over, as they come out of its dispatcher.
_TWINS: dict[str, Callable[..., Tensor | None]] = {
    "add": _add,
    "embedding": _embedding,
    "clamp": _clamp,
    "clamp_min": _clamp,
}
