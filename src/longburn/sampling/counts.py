"""How often each token came before, kept on the device for the penalties."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenCounts:
    """Occurrences of every token, per row, apart for the prompt and the generated text.

    Two tensors because the penalties differ: repetition looks at both, frequency and presence at `generated` only.
    The tensors are updated in place and without a host read, so that a CUDA graph may contain the update.

    Args:
        prompt: `[B, V]` int32.
        generated: `[B, V]` int32.
    """

    prompt: Tensor
    generated: Tensor

    @classmethod
    def zeros(cls, batch: int, vocab_size: int, device: torch.device | str | None = None) -> TokenCounts:
        """Counts of `batch` rows that have seen nothing."""

        def empty() -> Tensor:
            return torch.zeros(batch, vocab_size, dtype=torch.int32, device=device)

        return cls(empty(), empty())

    def clear(self) -> None:
        """As `zeros`, in place."""
        self.prompt.zero_()
        self.generated.zero_()

    def add_prompt(self, tokens: Tensor) -> None:
        """Count prompt tokens, int64 `[B, T]` or `[B]`; -1 is no token."""
        _add(self.prompt, tokens)

    def add_generated(self, tokens: Tensor) -> None:
        """Count generated tokens, int64 `[B]` (one step) or `[B, T]`; -1 is no token."""
        _add(self.generated, tokens)


def _add(counts: Tensor, tokens: Tensor) -> None:
    if tokens.shape[0] != counts.shape[0] or tokens.ndim > 2:
        raise ValueError(
            f"TokenCounts: got tokens of shape {tuple(tokens.shape)} for counts of {counts.shape[0]} rows; "
            f"pass [B] or [B, T], with -1 where a row has no token"
        )
    tokens = tokens.reshape(counts.shape[0], -1)
    rows = torch.arange(counts.shape[0], device=counts.device)[:, None] * counts.shape[1]
    # Flat, because that has a deterministic algorithm on CUDA too.
    counts.view(-1).scatter_add_(0, (rows + tokens.clamp_min(0)).flatten(), (tokens >= 0).to(counts.dtype).flatten())
