"""Attention: the call, and its implementations in the order in which `auto` tries them."""

from longburn.kernels.attend import flex, reference, sdpa
from longburn.kernels.attend.call import AttendCall, AttendResult, BiasTerms, Known, merge
from longburn.kernels.registry import Impl, choose

IMPLS: tuple[Impl[AttendCall, AttendResult], ...] = (
    Impl("flex", flex.attend_flex, flex.why_not),
    Impl("sdpa", sdpa.attend_sdpa, sdpa.why_not),
    Impl("reference", reference.attend_reference, reference.why_not),
)


def run(call: AttendCall) -> AttendResult:
    """Compute the call with the implementation in force."""
    return choose("attend", IMPLS, call).run(call)


__all__ = ["IMPLS", "AttendCall", "AttendResult", "BiasTerms", "Impl", "Known", "merge", "run"]
