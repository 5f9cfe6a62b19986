"""The rule for results in low precision: as good as PyTorch's own plain computation in the same type.

Errors are taken against fp64. `plain` is the formula written out in PyTorch with every step in the low precision.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MEAN = 1.1  # times the plain result's mean error
MAX = 2.0  # times its largest error


def assert_as_accurate(
    got: Sequence[Tensor], plain: Sequence[Tensor], wanted: Sequence[Tensor], what: str = ""
) -> None:
    """Whether results err on average at most 1.1 times, and at worst twice, as much as the plain ones.

    Each argument holds one tensor a draw of the inputs; errors of all draws count together, because the largest of a
    few hundred errors says little. NaN never passes.
    """
    ours, theirs = (
        torch.cat([(x.double() - y.double()).abs().flatten().cpu() for x, y in zip(side, _on_cpu(wanted), strict=True)])
        for side in (_on_cpu(got), _on_cpu(plain))
    )
    assert theirs.mean() > 0, f"{what}: the plain result has no error, so this compares nothing"
    mean, largest = float(ours.mean() / theirs.mean()), float(ours.max() / theirs.max())
    assert mean <= MEAN, f"{what}: mean error {mean:.3f} times that of plain {plain[0].dtype}"
    assert largest <= MAX, f"{what}: largest error {largest:.3f} times that of plain {plain[0].dtype}"


def _on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().cpu() for x in tensors]
