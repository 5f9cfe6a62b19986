"""Writing keys and values into the slots that their positions name, and the rotation before it."""

from typing import NamedTuple

import torch
from torch import Tensor

from longburn.kernels import native, triton
from longburn.kernels.norm import HeadNorms, rms_norm
from longburn.kernels.registry import Impl, Operation
from longburn.kernels.rotate import check_angles, rotate

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_LEAST = 2.0**-100  # magnitudes below count as this one where a scale is found, so that no scale is 0


class AppendCall(NamedTuple):
    """The slot of position p is `p` if `p < sink_tokens`, else `sink_tokens + (p - sink_tokens) % ring`.

    Position -1 is written nowhere. Where a call holds more than `ring` positions, the last ones stay. Every slot must
    be there: the buffers have one more than can be named, which takes the writes that go nowhere.

    With `angles`, keys are rotated on their way into the cache, and `q` is rotated and handed back; with `sink_angles`
    it is rotated by those as well. With `norms` both are normalised before. With `scales` the caches are fp8: what is
    written is divided by its largest magnitude over 448, one for every token and head, and `scales` keep the divisors.
    With `before` the first `sink_tokens` slots lie there, in the type of k; the caches and scales begin with the slot
    after them.
    """

    k: Tensor  # [B, K, T, D]
    v: Tensor  # [B, K, T, D]
    positions: Tensor  # [B|1, T] int64; one row for all, or as many as `held` has
    k_cache: Tensor  # [B, K, slots + 1, D]
    v_cache: Tensor  # [B, K, slots + 1, D]
    held: Tensor  # [B|1, slots + 1] int64, the position in every slot
    sink_tokens: int
    ring: int | None  # None: the slot is the position
    q: Tensor | None = None  # [B, H, T, D]
    angles: tuple[Tensor, Tensor] | None = None  # cos and sin [B|1, 1, T, R], as in `rotate`
    sink_angles: tuple[Tensor, Tensor] | None = None
    interleaved: bool = False
    norms: HeadNorms | None = None
    scales: tuple[Tensor, Tensor] | None = None  # of k and v, fp32 [B, K, slots + 1]
    before: tuple[Tensor, Tensor] | None = None  # k and v [B, K, sink_tokens + 1, D]


class Rotated(NamedTuple):
    """What `append` hands back: q `[B, H, T, D]` after its rotation, and by the second angles; None if not given."""

    q: Tensor | None
    q_sink: Tensor | None


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[..., D]` as fp8 (e4m3) and the fp32 scale `[...]` by which it is multiplied to get x back."""
    wide = x.float()
    scale = wide.abs().amax(-1).clamp_min(FP8_LEAST) * (1 / FP8_MAX)  # times: to divide by a number differs by device
    return (wide / scale.unsqueeze(-1)).to(FP8), scale


def rotated(
    k: Tensor,
    q: Tensor | None,
    angles: tuple[Tensor, Tensor] | None,
    sink_angles: tuple[Tensor, Tensor] | None,
    interleaved: bool,
    norms: HeadNorms | None,
) -> tuple[Tensor, Rotated]:
    """k, and what is handed back, after the norms and rotations of an `AppendCall` with these."""

    def turned(x: Tensor, by: tuple[Tensor, Tensor], weight: Tensor | None) -> Tensor:
        return rotate(x, *by, interleaved=interleaved, weight=weight, eps=0.0 if norms is None else norms.eps)

    q_weight, k_weight, _ = norms or (None, None, 0.0)
    q_sink = None if q is None or sink_angles is None else turned(q, sink_angles, q_weight)
    if angles is not None:
        return turned(k, angles, k_weight), Rotated(None if q is None else turned(q, angles, q_weight), q_sink)
    if norms is not None:
        k = rms_norm(k, norms.k, norms.eps, round_last=True)
        q = None if q is None else rms_norm(q, norms.q, norms.eps, round_last=True)
    return k, Rotated(q, q_sink)


def slots_of(positions: Tensor, sink_tokens: int, ring: int | None, nowhere: int) -> Tensor:
    """The slots `[B, T]` of positions `[B, T]`, by the rule of `AppendCall`; `nowhere` for what is not written."""
    kept, slot = positions >= 0, positions
    if ring is not None:
        slot = torch.where(positions < sink_tokens, positions, sink_tokens + (positions - sink_tokens) % ring)
        if ring < positions.shape[1]:
            kept = kept & ((positions < sink_tokens) | (positions > positions.amax(1, keepdim=True) - ring))
    return torch.where(kept, slot, nowhere)


def _reference(call: AppendCall) -> Rotated:
    held, sinks = call.held, call.sink_tokens
    k, result = _rotated(call)
    nowhere = held.shape[1] - 1
    pos = call.positions.expand(held.shape[0], -1)
    slot = slots_of(pos, sinks, call.ring, nowhere)
    held.scatter_(1, slot, torch.where(slot == nowhere, -1, pos))
    if call.before is not None:
        for cache, x in zip(call.before, (k, call.v), strict=True):
            put(cache, slot.clamp(max=sinks), x)
        slot = torch.where(slot < sinks, nowhere, slot) - sinks
    for i, (cache, x) in enumerate(((call.k_cache, k), (call.v_cache, call.v))):
        if call.scales is not None:
            x, scale = quantised(x)
            put(call.scales[i], slot, scale)
        put(cache, slot, x)
    return result


def put(cache: Tensor, slot: Tensor, x: Tensor) -> None:
    """x `[B, K, T, ...]` into the slots `[B|1, T]` of a cache `[B, K, slots, ...]`."""
    if cache.dtype == FP8:  # PyTorch copies numbers of this type, but not to indices
        cache, x = cache.view(torch.uint8), x.view(torch.uint8)
    if slot.shape[0] == 1:
        cache.index_copy_(2, slot[0], x)
    else:
        index = slot.view(slot.shape[0], 1, -1, *(1,) * (x.ndim - 3))
        cache.scatter_(2, index.expand(x.shape), x)


def _rotated(call: AppendCall) -> tuple[Tensor, Rotated]:
    return rotated(call.k, call.q, call.angles, call.sink_angles, call.interleaved, call.norms)


def _native(call: AppendCall) -> Rotated:
    k, result = _rotated(call)
    v, positions, k_cache, v_cache, held = call.v, call.positions, call.k_cache, call.v_cache, call.held
    B, K, T, D = k.shape
    size = k.itemsize
    native.launch(
        "append",
        *map(native.address, (k, v, positions, k_cache, v_cache, held)),
        *(B, K, T, D * size),
        *(stride * size for stride in (*k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:2])),
        *(native.row_stride(positions), native.row_stride(held), call.sink_tokens, call.ring or 0),
    )
    return result


def _native_why_not(call: AppendCall) -> str | None:
    if not call.k.is_cpu:
        return f"runs on the CPU, got {call.k.device.type}"
    if call.scales is not None or call.before is not None:
        return "writes caches of one piece in the type of k"
    if call.k.stride(3) != 1 or call.v.stride(3) != 1 or call.positions.stride(1) != 1:
        return "keys, values or positions have gaps"
    return native.unavailable()


@triton.on_its_device
def _triton(call: AppendCall) -> Rotated:
    from longburn.kernels.triton.append import append

    return Rotated(*append(call, FP8_LEAST, FP8_MAX))


def _triton_why_not(call: AppendCall) -> str | None:
    k, D = call.k, call.k.shape[3]
    angles = [x for pair in (call.angles, call.sink_angles) for x in pair or ()]
    pairs = [pair for pair in ((call.k_cache, call.v_cache), call.scales, call.before) if pair is not None]
    if reason := triton.why_not(call.q, k, call.v, *angles, *(call.norms or ())[:2]):
        return reason
    if call.norms is not None and (call.angles is None or not all(x.is_contiguous() for x in call.norms[:2])):
        return "norms come before a rotation, with weights without gaps"
    if k.dtype not in triton.TYPES or not all(x is None or x.dtype == k.dtype for x in (call.q, call.v)):
        return f"takes fp32, bf16 or fp16, one type for all, got {k.dtype}"
    if call.k_cache.dtype != (k.dtype if call.scales is None else FP8):
        return f"writes caches in the type of k, or fp8 with scales, got {call.k_cache.dtype}"
    if not all(x.dtype == torch.float32 and x.is_contiguous() and x.shape == angles[0].shape for x in angles):
        return "takes fp32 angles without gaps"
    if any(x is not None and x.stride(3) != 1 for x in (call.q, k, call.v)) or call.positions.stride(1) != 1:
        return "queries, keys, values or positions have gaps"
    whole = all(a.stride() == b.stride() and a.stride(2) == (D if a.ndim == 4 else 1) for a, b in pairs)
    return None if whole else "slots of a cache have gaps"


OPERATION: Operation[AppendCall, Rotated] = Operation(
    "append",
    (
        Impl("native", _native, _native_why_not),
        Impl("triton", _triton, _triton_why_not),
        Impl("reference", _reference, lambda call: None),
    ),
)


def append(call: AppendCall) -> Rotated:
    """Write k, v and their positions into the caches of the call; what is wanted of q comes back rotated.

    Raises:
        ValueError: angles or norms of another shape; nothing is written then.
    """
    if call.norms is not None and not call.norms.q.shape == call.norms.k.shape == call.k.shape[3:]:
        q, k, _ = call.norms
        raise ValueError(f"append: norms of {tuple(q.shape)} and {tuple(k.shape)}, wanted ({call.k.shape[3]},) each")
    for pair in (call.angles, call.sink_angles):
        if pair is not None:
            check_angles("append", call.k, *pair)
    return OPERATION(call)
