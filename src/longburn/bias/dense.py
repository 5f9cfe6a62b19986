"""A bias that is written out."""

import torch
from torch import Tensor

from longburn.bias.policy import BiasContext
from longburn.kernels.attend import BiasTerms


class DenseBias:
    """A bias given as a tensor `[B|1, H|1, T, P]`: a row for each query of the call, a column for each key *position*.

    Columns go by absolute position, `first, first + 1, ...`, and are looked up by the positions that come with the
    keys, so the order of a ring cannot misalign them. Gradients flow into it.

    Args:
        values: the bias.
        first: the position of column 0.

    Raises:
        ValueError: (when used) the rows are not the call's queries, or a key's position has no column.
    """

    def __init__(self, values: Tensor, *, first: int = 0) -> None:
        if values.dim() != 4:
            raise ValueError(f"DenseBias: values are {tuple(values.shape)}, wanted [B|1, H|1, T, positions]")
        self.values = values
        self.first = first

    def terms(self, context: BiasContext) -> BiasTerms:
        B, H, T, P = self.values.shape
        if context.q.shape[2] != T or B not in (1, context.q.shape[0]) or H not in (1, context.q.shape[1]):
            raise ValueError(
                f"DenseBias: values are {tuple(self.values.shape)}, but the call has batch {context.q.shape[0]}, heads "
                f"{context.q.shape[1]} and {context.q.shape[2]} queries: wanted [B|1, H|1, T, positions]"
            )
        column = context.k_pos - self.first
        outside = (context.k_pos >= 0) & ((column < 0) | (column >= P))
        message = f"DenseBias: a key stands at a position outside the columns {self.first} .. {self.first + P - 1}"
        if outside.device.type == "cpu":
            if bool(outside.any()):
                raise ValueError(
                    f"{message} (position {int(context.k_pos[outside][0])}); give a column for every key seen"
                )
        else:
            torch._assert_async(~outside.any(), message)
        column = column.clamp(0, P - 1)
        if column.shape[0] == 1:
            return BiasTerms(dense=self.values[..., column[0]])
        rows = column.shape[0]
        index = column[:, None, None, :].expand(rows, H, T, -1)
        return BiasTerms(dense=self.values.expand(rows, -1, -1, -1).gather(3, index))
