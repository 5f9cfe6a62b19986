"""Choosing one of several implementations of an operation.

An operation is an ordered tuple of `Impl`. `auto` takes the first that says nothing against the call; a named choice
raises with the reason and never falls back to another.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

Call = TypeVar("Call")
Result = TypeVar("Result")

_chosen: ContextVar[str] = ContextVar("longburn_impl", default="auto")


@dataclass(frozen=True)
class Impl(Generic[Call, Result]):
    """One implementation: `run` computes the call, `why_not` says why it cannot (None: it can)."""

    name: str
    run: Callable[[Call], Result]
    why_not: Callable[[Call], str | None]


class ImplError(ValueError):
    """A named implementation does not exist or cannot compute this call."""


def choose(operation: str, impls: Sequence[Impl[Call, Result]], call: Call) -> Impl[Call, Result]:
    """The implementation in force for `call`: the one named by `use_impl`, else the first that can.

    Raises:
        ImplError: the named one is unknown or refuses; the message holds every reason.
    """
    name = _chosen.get()
    if name == "auto":
        reasons = []
        for impl in impls:
            reason = impl.why_not(call)
            if reason is None:
                return impl
            reasons.append(f"{impl.name}: {reason}")
        raise ImplError(f"{operation}: no implementation can compute this call ({'; '.join(reasons)})")
    for impl in impls:
        if impl.name == name:
            reason = impl.why_not(call)
            if reason is not None:
                raise ImplError(f"{operation}: implementation {name!r} cannot compute this call: {reason}")
            return impl
    known = ", ".join(impl.name for impl in impls)
    raise ImplError(f"{operation}: no implementation is called {name!r}; there are auto, {known}")


@contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Within this block every operation uses the implementation called `name` (`"auto"` to choose freely).

    >>> with use_impl("reference"):
    ...     y = attend(q, k, v)
    """
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)
