"""Computing a call with one named implementation of its operation."""

from typing import Any

import pytest

from longburn import use_impl
from longburn.kernels.registry import Operation


def compute(operation: Operation[Any, Any], impl: str, call: Any) -> Any:
    """What that implementation makes of the call; the test is skipped where this machine has no compiler for it."""
    reason = next(candidate for candidate in operation.impls if candidate.name == impl).why_not(call)
    if reason is not None:
        assert impl == "native", f"{impl} refuses: {reason}"
        pytest.skip(f"native: {reason}")
    with use_impl(impl):
        return operation(call)
