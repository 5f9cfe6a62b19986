"""The residual stream between the blocks of a diffusion transformer."""

from typing import NamedTuple

from torch import Tensor

from longburn.kernels.adaptive_norm import AdaptiveNormResult, adaptive_norm


class Residual(NamedTuple):
    """The stream x `[B, T, M]`, and the update that it is still to get, times its gate `[B|1, G, M]`.

    The next norm adds it: so the stream is read and written once between two blocks.
    """

    x: Tensor
    update: Tensor | None = None
    gate: Tensor | None = None

    def layer_norm(
        self,
        eps: float,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> AdaptiveNormResult:
        """The updated stream normalised, shifted and scaled as of `adaptive_norm`; and the updated stream."""
        x, update, gate = self
        return adaptive_norm(
            x, eps=eps, centered=True, weight=weight, bias=bias, shift=shift, scale=scale, update=update, gate=gate
        )

    def rms_norm(
        self, eps: float, weight: Tensor, *, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> AdaptiveNormResult:
        """The same by the root mean square."""
        x, update, gate = self
        return adaptive_norm(
            x, eps=eps, centered=False, weight=weight, shift=shift, scale=scale, update=update, gate=gate
        )
