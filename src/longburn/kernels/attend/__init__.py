"""Attention: the call, and its implementations in the order in which `auto` tries them."""

from collections.abc import Callable

from longburn.kernels.attend import flex, native, reference, sdpa, triton
from longburn.kernels.attend.call import AttendCall, AttendResult, BiasTerms, Known, joined
from longburn.kernels.attend.merging import merge
from longburn.kernels.registry import Impl, Operation


def _in_one_piece(run: Callable[[AttendCall], AttendResult]) -> Callable[[AttendCall], AttendResult]:
    return lambda call: run(joined(call))


IMPLS: tuple[Impl[AttendCall, AttendResult], ...] = (
    Impl("native", _in_one_piece(native.attend_native), native.why_not),
    Impl("triton", triton.attend_triton, triton.why_not),
    Impl("flex", _in_one_piece(flex.attend_flex), flex.why_not),
    Impl("sdpa", _in_one_piece(sdpa.attend_sdpa), sdpa.why_not),
    Impl("reference", _in_one_piece(reference.attend_reference), reference.why_not),
)

run: Operation[AttendCall, AttendResult] = Operation("attend", IMPLS)

__all__ = ["IMPLS", "AttendCall", "AttendResult", "BiasTerms", "Impl", "Known", "merge", "run"]
