"""Merging attention over disjoint sets of keys by their log-sum-exps; exact, in any order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longburn.kernels import native
from longburn.kernels.attend.call import AttendResult
from longburn.kernels.registry import Impl, Operation

MAX_PARTS = 4

Parts = Sequence[AttendResult]


def _reference(parts: Parts) -> AttendResult:
    out = torch.stack([out for out, _ in parts])
    lse = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(lse, 0)
    weight = torch.exp(lse - total.clamp_min(torch.finfo(lse.dtype).min))
    return (out * weight.unsqueeze(-1)).sum(0).to(out.dtype), total


def _native(parts: Parts) -> AttendResult:
    B, H, T, D = parts[0][0].shape
    out, lse = torch.empty(B, T, H, D, dtype=parts[0][0].dtype), torch.empty(B, H, T)
    words = [word for part in parts for word in _words(*part)]
    words += [0] * (8 * (MAX_PARTS - len(parts)))
    native.launch("merge", *words, out.data_ptr(), lse.data_ptr(), len(parts), B, H, T, D, native.TYPES[out.dtype])
    return out.transpose(1, 2), lse


def _words(out: Tensor, lse: Tensor) -> tuple[int, ...]:
    """`attended` of rows.c."""
    return (out.data_ptr(), lse.data_ptr(), *out.stride()[:3], *lse.stride())


def _native_why_not(parts: Parts) -> str | None:
    if len(parts) > MAX_PARTS:
        return f"merges up to {MAX_PARTS} parts, got {len(parts)}"
    if not all(out.is_cpu and lse.dtype == torch.float32 for out, lse in parts):
        return "runs on the CPU, with log-sum-exps in fp32"
    if torch.is_grad_enabled() and any(out.requires_grad or lse.requires_grad for out, lse in parts):
        return "has no gradients"
    if any(out.dim() != 4 or out.stride(3) != 1 or out.shape != parts[0][0].shape for out, _ in parts):
        return "a part has gaps within a head, or another shape"
    return native.why_not(*(out for out, _ in parts))


OPERATION: Operation[Parts, AttendResult] = Operation(
    "merge", (Impl("native", _native, _native_why_not), Impl("reference", _reference, lambda call: None))
)


def merge(parts: Parts) -> AttendResult:
    """Merge results `(out [B, H, T, D], lse [B, H, T])` over disjoint sets of keys.

    A part that saw nothing has log-sum-exp `-inf` and output 0.
    """
    return parts[0] if len(parts) == 1 else OPERATION(parts)
