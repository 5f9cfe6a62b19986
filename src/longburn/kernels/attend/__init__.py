"""Attention: the call, and its implementations in the order in which `auto` tries them."""

from longburn.kernels.attend import flex, native, reference, sdpa
from longburn.kernels.attend.call import AttendCall, AttendResult, BiasTerms, Known
from longburn.kernels.attend.merging import merge
from longburn.kernels.registry import Impl, Operation

IMPLS: tuple[Impl[AttendCall, AttendResult], ...] = (
    Impl("native", native.attend_native, native.why_not),
    Impl("flex", flex.attend_flex, flex.why_not),
    Impl("sdpa", sdpa.attend_sdpa, sdpa.why_not),
    Impl("reference", reference.attend_reference, reference.why_not),
)

run: Operation[AttendCall, AttendResult] = Operation("attend", IMPLS)

__all__ = ["IMPLS", "AttendCall", "AttendResult", "BiasTerms", "Impl", "Known", "merge", "run"]
