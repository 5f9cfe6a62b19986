"""Choosing one of several implementations of an operation.

An operation is an ordered tuple of `Impl`. `auto` takes the first that says nothing against the call; a named choice
raises with the reason and never falls back to another.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

Call = TypeVar("Call")
Result = TypeVar("Result")

AUTO = "auto"
_chosen = AUTO  # of the whole process: a plain global, because the compiler can trace (and guard on) nothing subtler
_offered: dict[str, list[str]] = {}  # implementation name -> operations that have it
_asked: str | None = None  # the operation that `explain` waits for


class ImplError(ValueError):
    """A named implementation does not exist or cannot compute this call."""


@dataclass(frozen=True)
class Impl(Generic[Call, Result]):
    """One implementation: `run` computes the call, `why_not` says why it cannot (None: it can)."""

    name: str
    run: Callable[[Call], Result]
    why_not: Callable[[Call], str | None]


class Explanation(NamedTuple):
    """What each implementation of an operation says to one call, in the order in which `auto` tries them.

    `reasons` has None for those that can compute it; `taken` is the one that would, None if none may.
    """

    operation: str
    reasons: dict[str, str | None]
    taken: str | None


class _Answer(BaseException):
    """Carries the explanation out of the computation that was asked about; no `except Exception` holds it up."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


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
        if _asked is not None and _asked == self.name:
            raise _Answer(self.explain(call))
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

    def explain(self, call: Call) -> Explanation:
        """What each implementation says to the call; nothing is computed."""
        reasons = {impl.name: impl.why_not(call) for impl in self.impls}
        may = [_chosen] if self.name in _offered.get(_chosen, ()) else list(reasons)
        return Explanation(self.name, reasons, next((name for name in may if reasons[name] is None), None))


def explain(operation: str, compute: Callable[[], object]) -> Explanation:
    """Which implementation takes the first call of `operation` that `compute` makes, and why the others cannot.

    That call is not computed, and nothing after it; what comes before it is.

    >>> explain("attend", lambda: attend(q, k, v)).taken
    'reference'

    Raises:
        ImplError: `compute` ended without such a call.
    """
    global _asked
    before, _asked = _asked, operation
    try:
        compute()
    except _Answer as answer:
        return answer.explanation
    finally:
        _asked = before
    raise ImplError(f"explain: no operation {operation!r} was called; there are {', '.join(sorted(_operations()))}")


def _operations() -> set[str]:
    return {name for names in _offered.values() for name in names}


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
