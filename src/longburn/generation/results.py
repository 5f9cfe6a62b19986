"""What a device has drawn, on its way to the host."""

import torch
from torch import Tensor

from longburn.sampling import Sampled


class Results:
    """Two places on the host for what steps give: one is read while the next one is filled."""

    def __init__(self, like: Sampled) -> None:
        self._places = [_Place(like), _Place(like)]
        self._sent = self._taken = 0

    def send(self, sampled: Sampled) -> None:
        """Copy it to the host as soon as the device has it."""
        self._places[self._sent % 2].fill(sampled)
        self._sent += 1

    def read(self) -> Sampled:
        """What was sent first and not yet read, once it is there. It holds until two more were sent."""
        self._taken += 1
        return self._places[(self._taken - 1) % 2].value()


class _Place:
    """One step's result in page-locked memory, and the event of its arrival."""

    def __init__(self, like: Sampled) -> None:
        self._arrived = torch.cuda.Event() if like.tokens.is_cuda else None  # type: ignore[no-untyped-call]
        self._tensors = [
            None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            for tensor in _parts(like)
        ]

    def fill(self, sampled: Sampled) -> None:
        for place, tensor in zip(self._tensors, _parts(sampled), strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(sampled.tokens.device))

    def value(self) -> Sampled:
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens, *others = self._tensors
        assert tokens is not None
        return Sampled(tokens, *others)


def _parts(sampled: Sampled) -> tuple[Tensor | None, ...]:
    return sampled.tokens, sampled.logprobs, sampled.top_tokens, sampled.top_logprobs
