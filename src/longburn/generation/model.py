"""What a model must be for the harness to drive it, and what every such model does with its tokens."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from longburn.cache import CacheManager, Step
from longburn.kernels.native.tape import is_recording


@runtime_checkable
class AutoregressiveModel(Protocol):
    """A model of the next token over caches."""

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        ...

    def init_cache(self, batch: int, *, max_length: int | None = None) -> CacheManager:
        """Empty caches for `batch` rows of at most `max_length` positions (None: no end)."""
        ...

    def forward_logits(
        self, tokens: Tensor, cache: CacheManager, *, all_positions: bool = False, commit: bool = True
    ) -> Tensor:
        """Logits after each row's last token of `[B, T]` (-1: no token), `[B, V]`, or after every token, `[B, T, V]`.

        Takes the cache's next positions and, when done, commits them once; `commit=False` leaves the clock where it
        was.
        """
        ...


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Refuse what is not `[B, T]` int64 token ids (or -1); ids are looked at on the CPU only.

    Raises:
        ValueError: says which id, and where.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.shape[1] == 0:
        raise ValueError(f"tokens: got {tokens.dtype} of shape {tuple(tokens.shape)}, wanted int64 [B, T] with T >= 1")
    if tokens.device.type == "cpu" and not is_recording():
        low, high = (int(x) for x in tokens.aminmax())
        if low < -1 or high >= vocab_size:
            wrong = low if low < -1 else high
            row, column = (tokens == wrong).nonzero()[0].tolist()
            raise ValueError(
                f"tokens: id {wrong} at row {row}, column {column} is outside the vocabulary of {vocab_size} ids"
            )


def last_of_rows(x: Tensor, step: Step) -> Tensor:
    """The features of each row's last token, `[B, T, M]` to `[B, M]`; a row without a token gives some column."""
    runs = step.runs
    if runs is None or all(run.offset + run.size in (0, step.length) for run in runs):
        return x[:, -1]
    columns = [max(run.offset + run.size - 1, 0) for run in runs]
    rows = torch.arange(x.shape[0], device=x.device)
    return x[rows, torch.tensor(columns, device=x.device).expand(x.shape[0])]
