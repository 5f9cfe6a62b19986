"""ALiBi (Press et al., arXiv 2108.12409): a penalty proportional to the distance."""

import torch
from torch import Tensor

from longburn.bias.policy import BiasContext
from longburn.kernels.attend import BiasTerms


def alibi_slopes(heads: int) -> Tensor:
    """The paper's slopes for any number of heads, `[heads]` fp64.

    For a power of two n: `2^(-8/n), 2^(-16/n), ..., 2^-8`. Otherwise those of the next lower power of two, followed by
    every other slope of the next higher one, as in the authors' code.
    """
    if heads < 1:
        raise ValueError(f"alibi_slopes: {heads} heads, wanted at least 1")
    lower = 1 << (heads.bit_length() - 1)

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    return torch.tensor(geometric(lower) + geometric(2 * lower)[0::2][: heads - lower], dtype=torch.float64)


class Alibi:
    """The bias `-slope[h] * |p - j|` of query position p and key position j.

    Args:
        heads: query heads H; the slopes are the paper's.
        slopes: `[H]`, instead of the paper's. Gradients flow to them; this is no module, so a parameter among your own
            is what an optimiser sees.
    """

    def __init__(self, heads: int, *, slopes: Tensor | None = None) -> None:
        if slopes is not None and slopes.shape != (heads,):
            raise ValueError(f"Alibi: slopes are {tuple(slopes.shape)}, wanted ({heads},), one a head")
        self.heads = heads
        self.slopes = alibi_slopes(heads).float() if slopes is None else slopes

    def terms(self, context: BiasContext) -> BiasTerms:
        return BiasTerms(slope=self.slopes.to(context.q.device))
