"""What is not taken into a cache."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from longburn.cache.buffers import Buffers
from longburn.cache.extent import Extent
from longburn.cache.step import Run, Step


def check_new(buffers: Buffers, k: Tensor, v: Tensor, extra: Tensor | None, step: Step) -> None:
    """Keys, values and numbers of new tokens suit the cache.

    Raises:
        ValueError: shapes, types or devices disagree, or gradients would be lost.
    """
    (B, K, D), dtype, device = buffers.shape, buffers.dtype, buffers.device
    wanted = (B, K, step.length, D)
    for name, given in (("k", k), ("v", v)):
        if tuple(given.shape) != wanted:
            raise ValueError(
                f"RollingKVCache.update: {name} is {tuple(given.shape)}, wanted {wanted} "
                f"(batch {wanted[0]}, kv_heads {wanted[1]}, positions {wanted[2]}, head_dim {wanted[3]})"
            )
        if given.dtype != dtype or given.device != device:
            raise ValueError(
                f"RollingKVCache.update: {name} is {given.dtype} on {given.device}, "
                f"the cache {dtype} on {device}; build it with the model's dtype and device"
            )
    tensors = (k, v) if extra is None else (k, v, extra)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "RollingKVCache.update: gradients do not flow through a cache; use torch.no_grad(), or train without one"
        )
    if step.positions.shape[0] not in (1, B):
        raise ValueError(f"RollingKVCache.update: positions have {step.positions.shape[0]} rows, wanted 1 or {B}")
    numbers = buffers.numbers
    kept = "none" if numbers is None else f"{(*numbers.shape[:2], step.length)} of {numbers.dtype}"
    came = "none" if extra is None else f"{tuple(extra.shape)} of {extra.dtype}"
    if came != kept:
        raise ValueError(
            f"RollingKVCache.update: extra numbers are {came}, wanted {kept}; "
            "build the cache with CacheManager.for_layers, which asks the layer's bias"
        )


def check_consecutive(buffers: Buffers, extent: Extent, step: Step) -> bool:
    """Whether the host knows that every row goes on from a token that it holds; False where it knows nothing.

    Raises:
        ValueError: it knows that a row does not, or no numbers are kept.
    """
    if buffers.numbers is None:
        raise ValueError(
            "RollingKVCache.previous: the cache keeps no numbers for a bias; "
            "build it with CacheManager.for_layers, which asks the layer's bias"
        )
    if extent.runs(step, buffers.shape[0]) is not None:
        return True
    if not extent.lost and (step.runs is not None or step.bound is not None):
        raise ValueError(
            "RollingKVCache.previous: positions skip tokens, but the bias's numbers of a token go on from those of the "
            "token right before; give every row consecutive positions from where it stands"
        )
    return False


def check_restart(runs: Sequence[Run], earliest: Iterable[int], window: int | None, slack: int) -> None:
    """No row goes back farther than to the `earliest` position whose window is still there.

    Raises:
        ValueError: one does.
    """
    for row, (run, limit) in enumerate(zip(runs, earliest, strict=True)):
        if run.size and run.start < limit:
            raise ValueError(
                f"RollingKVCache.update: row {row} goes back to position {run.start}, but its window is whole only "
                f"from {limit} on (window {window}, slack {slack}); "
                "build the cache with more slack, or reset the row"
            )
