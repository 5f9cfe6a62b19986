"""Computing a call with one named implementation of its operation."""

from typing import Any

import pytest

from longburn import use_impl
from longburn.kernels import native
from longburn.kernels.registry import Operation


def compute(operation: Operation[Any, Any], impl: str, call: Any) -> Any:
    """What that implementation makes of the call; the test is skipped where this machine has no compiler for it."""
    with use_impl(impl):
        reason = next(candidate for candidate in operation.impls if candidate.name == impl).why_not(call)
        if reason is None:
            return operation(call)
    # A kernel that refuses what it should take must not look like a machine without a compiler.
    assert impl == "native" and reason == native.unavailable(), f"{impl} refuses: {reason}"  # noqa: PT018
    pytest.skip(f"native: {reason}")
