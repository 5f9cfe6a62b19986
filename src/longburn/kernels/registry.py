"""Choosing one of several implementations of an operation.

An operation is an ordered tuple of `Impl`. `auto` takes the first that says nothing against the call; a named choice
raises with the reason and never falls back to another.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

Call = TypeVar("Call")
Result = TypeVar("Result")

AUTO = "auto"
_chosen = AUTO  # of the whole process: a plain global, because the compiler can trace (and guard on) nothing subtler
_offered: dict[str, list[str]] = {}  # implementation name -> operations that have it


class ImplError(ValueError):
    """A named implementation does not exist or cannot compute this call."""


@dataclass(frozen=True)
class Impl(Generic[Call, Result]):
    """One implementation: `run` computes the call, `why_not` says why it cannot (None: it can)."""

    name: str
    run: Callable[[Call], Result]
    why_not: Callable[[Call], str | None]


class Operation(Generic[Call, Result]):
    """An operation and its implementations, in the order in which `auto` tries them."""

    def __init__(self, name: str, impls: tuple[Impl[Call, Result], ...]) -> None:
        self.name, self.impls = name, impls
        for impl in impls:
            _offered.setdefault(impl.name, []).append(name)

    def __call__(self, call: Call) -> Result:
        """Compute the call with the implementation in force: the one named by `use_impl`, else the first that can.

        Raises:
            ImplError: the named one refuses, or all do; the message holds every reason.
        """
        name = _chosen
        if name == AUTO:  # every layer of every step comes through here
            for impl in self.impls:
                if impl.why_not(call) is None:
                    return impl.run(call)
        named = name != AUTO and self.name in _offered[name]
        reasons = []
        for impl in self.impls:
            if named and impl.name != name:
                continue
            reason = impl.why_not(call)
            if reason is None:
                return impl.run(call)
            reasons.append(f"{impl.name}: {reason}")
        what = f"implementation {name!r}" if named else "no implementation"
        raise ImplError(f"{self.name}: {what} {'cannot' if named else 'can'} compute this call ({'; '.join(reasons)})")


def chosen() -> str:
    """The name that `use_impl` has put in force, or `"auto"`."""
    return _chosen


@contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Within this block every operation that has an implementation called `name` uses it; `"auto"` chooses freely.

    It holds for the whole process, other threads included.

    >>> with use_impl("reference"):
    ...     y = attend(q, k, v)

    Raises:
        ImplError: no operation has one of this name.
    """
    if name != AUTO and name not in _offered:
        raise ImplError(
            f"use_impl: no implementation is called {name!r}; there are {', '.join([AUTO, *sorted(_offered)])}"
        )
    global _chosen
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before
