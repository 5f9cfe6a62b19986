"""One step from noise level t down to t_next, given the velocity that a model predicted (convention: `schedules`).

Pure functions over tensors of any shape; levels are Python floats, so nothing is read back from a device. They compute
in at least float32 and return x's type: keep x in float32 for accuracy beside a bf16 model, or in bf16 as ACE-Step's
own loops do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def omega_weight(omega: float) -> float:
    """ACE-Step v1's `omega_scale` as the factor that its steppers apply: 0.9 + 0.2 * sigmoid(omega / 10).

    0 gives 1 (no change), the released 10 gives 1.0462; it stays within 0.9 and 1.1.
    """
    # By tanh: exp(-omega / 10) overflows for large negative numbers.
    return 1.0 + 0.1 * math.tanh(omega / 20)


def euler(x: Tensor, velocity: Tensor, t: float, t_next: float, *, weight: float = 1.0) -> Tensor:
    """Follow the velocity in a straight line: `x + (t_next - t) * velocity`.

    Args:
        weight: stretches the step around its own mean (see `omega_weight`). That mean is taken over the whole tensor,
            as upstream does, so with a weight other than 1 the rows of a batch depend on each other.
    """
    return _moved(x, (t_next - t) * _wide(velocity), weight)


def heun(x: Tensor, velocity: Tensor, velocity_next: Tensor, t: float, t_next: float, *, weight: float = 1.0) -> Tensor:
    """Second half of Heun's step: from the same x again, along the mean of the two velocities.

    Args:
        x: where the step began.
        velocity: predicted at x and t.
        velocity_next: predicted at `euler(x, velocity, t, t_next)` and t_next.
        weight: as for `euler`, to be used for both halves.
    """
    return _moved(x, (t_next - t) * 0.5 * (_wide(velocity) + _wide(velocity_next)), weight)


def denoised(x: Tensor, velocity: Tensor, t: float) -> Tensor:
    """The data that a velocity points away from: `x - t * velocity`."""
    return (_wide(x) - t * _wide(velocity)).to(x.dtype)


def noised(x0: Tensor, noise: Tensor, t: float) -> Tensor:
    """Data at noise level t: `t * noise + (1 - t) * x0`."""
    return (t * _wide(noise) + (1 - t) * _wide(x0)).to(x0.dtype)


def renoise(x: Tensor, velocity: Tensor, t: float, t_next: float, noise: Tensor) -> Tensor:
    """Jump to the predicted data and add fresh noise of level t_next: PingPong in v1, the SDE in v1.5."""
    return noised(denoised(x, velocity, t), noise, t_next)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _moved(x: Tensor, dx: Tensor, weight: float) -> Tensor:
    if weight != 1:
        mean = dx.mean()
        dx = (dx - mean) * weight + mean
    return (_wide(x) + dx).to(x.dtype)
