"""A place in a stream to come back to, also after its windows have rolled on."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from longburn.cache.extent import Extent
from longburn.cache.manager import CacheManager
from longburn.cache.rolling import RollingKVCache


class CacheMark:
    """The caches as they are now; `restore` brings them back to it, any number of times.

    A layer that keeps all its keys is only cut back, which costs nothing. A ring is copied: what later tokens overwrite
    is in the copy. For every windowed layer that is `RollingKVCache.nbytes`, whatever the length of the stream.

    Args:
        cache: the caches of a stream. From here on it may go on and be rewound as far as here, but no farther.

    Attributes:
        positions: the next position of every row.
    """

    def __init__(self, cache: CacheManager) -> None:
        self.cache = cache
        self.positions = cache.row_positions
        self._next = list(cache._next)
        self._rings = [_Ring.of(layer) for layer in cache]
        self._last = [None if ring else self._last_keys(layer) for layer, ring in zip(cache, self._rings, strict=True)]

    @property
    def position(self) -> int:
        """The next position of the row that is farthest."""
        return max(self.positions)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(tensor.nbytes for ring in self._rings if ring for tensor in ring.tensors)

    def restore(self) -> None:
        """Takes back every token since the mark. The buffers stay where they are.

        Raises:
            ValueError: the stream has gone back beyond the mark in the meantime, so that there is nothing to come back
                to. Nothing is changed then.
        """
        for layer, last in zip(self.cache, self._last, strict=True):
            if last is not None and not torch.equal(last, self._last_keys(layer)):
                raise ValueError(
                    f"CacheMark.restore: the tokens before position {self.position} are no longer those of the mark: "
                    "the cache was reset, or rewound farther than the mark; make a new mark after that"
                )
        for layer, ring in zip(self.cache, self._rings, strict=True):
            if ring is None:
                layer.truncate(self._next)
            else:
                ring.restore(layer)
        self.cache._next = list(self._next)

    def _last_keys(self, layer: RollingKVCache) -> Tensor:
        """Each row's last key and its position: they are others as soon as any token before them is."""
        k, pos = layer.memory[0], layer.memory[-1]
        rows = torch.arange(layer.batch, device=k.device)
        slots = torch.tensor(self.positions, device=k.device) - 1  # -1 is the spare slot
        if k.shape[2] <= int(slots.max()):
            return k.new_empty(0)
        # By their bytes: PyTorch looks up fp8 by no index.
        keys = k.view(torch.uint8)[rows, :, slots].flatten(1).double()
        found = torch.cat([pos.expand(layer.batch, -1)[rows, slots][:, None], keys], 1)
        return torch.where((slots < 0)[:, None], 0, found)


class _Ring(NamedTuple):
    """A copy of a ring."""

    tensors: tuple[Tensor, ...]
    extent: Extent

    @classmethod
    def of(cls, layer: RollingKVCache) -> "_Ring | None":
        if layer.ring is None:
            return None
        return cls(tuple(tensor.clone() for tensor in layer.memory), copy.deepcopy(layer._extent))

    def restore(self, layer: RollingKVCache) -> None:
        for tensor, copied in zip(layer.memory, self.tensors, strict=True):
            tensor.copy_(copied)  # rows of positions may have come to run apart since
        layer._extent = copy.deepcopy(self.extent)
        layer._extent.widen(layer.memory[-1].shape[0])
