"""Writing keys and values into the slots that their positions name."""

from typing import NamedTuple

import torch
from torch import Tensor

from longburn.kernels import native
from longburn.kernels.registry import Impl, Operation


class AppendCall(NamedTuple):
    """The slot of position p is `p` if `p < sink_tokens`, else `sink_tokens + (p - sink_tokens) % ring`.

    Position -1 is written nowhere. Where a call holds more than `ring` positions, the last ones stay. Every slot must
    be there: the buffers have one more than can be named, which takes the writes that go nowhere.
    """

    k: Tensor  # [B, K, T, D]
    v: Tensor  # [B, K, T, D]
    positions: Tensor  # [B|1, T] int64; one row for all, or as many as `held` has
    k_cache: Tensor  # [B, K, slots + 1, D]
    v_cache: Tensor  # [B, K, slots + 1, D]
    held: Tensor  # [B|1, slots + 1] int64, the position in every slot
    sink_tokens: int
    ring: int | None  # None: the slot is the position


def _reference(call: AppendCall) -> None:
    held, sinks, ring = call.held, call.sink_tokens, call.ring
    nowhere = held.shape[1] - 1
    pos = call.positions.expand(held.shape[0], -1)
    kept, slot = pos >= 0, pos
    if ring is not None:
        slot = torch.where(pos < sinks, pos, sinks + (pos - sinks) % ring)
        if ring < pos.shape[1]:
            kept = kept & ((pos < sinks) | (pos > pos.amax(1, keepdim=True) - ring))
    slot = torch.where(kept, slot, nowhere)
    if held.shape[0] == 1:
        call.k_cache.index_copy_(2, slot[0], call.k)
        call.v_cache.index_copy_(2, slot[0], call.v)
    else:
        index = slot[:, None, :, None].expand(call.k.shape)
        call.k_cache.scatter_(2, index, call.k)
        call.v_cache.scatter_(2, index, call.v)
    held.scatter_(1, slot, torch.where(kept, pos, -1))


def _native(call: AppendCall) -> None:
    k, v, positions, k_cache, v_cache, held, sink_tokens, ring = call
    B, K, T, D = k.shape
    size = k.itemsize
    native.launch(
        "append",
        *map(native.address, (k, v, positions, k_cache, v_cache, held)),
        *(B, K, T, D * size),
        *(stride * size for stride in (*k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:2])),
        *(native.row_stride(positions), native.row_stride(held), sink_tokens, ring or 0),
    )


def _native_why_not(call: AppendCall) -> str | None:
    if not call.k.is_cpu:
        return f"runs on the CPU, got {call.k.device.type}"
    if call.k.stride(3) != 1 or call.v.stride(3) != 1 or call.positions.stride(1) != 1:
        return "keys, values or positions have gaps"
    return native.unavailable()


OPERATION: Operation[AppendCall, None] = Operation(
    "append", (Impl("native", _native, _native_why_not), Impl("reference", _reference, lambda call: None))
)


def append(call: AppendCall) -> None:
    """Write k, v and their positions into the caches of the call."""
    OPERATION(call)
