"""Steps against ACE-Step's schedulers (golden runs), and against flows whose paths are known."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longburn.diffusion import (
    denoised,
    euler,
    flow_schedule,
    heun,
    noised,
    omega_weight,
    renoise,
    v1_schedule,
)

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "ace_step" / "schedulers_guidance.safetensors")
Velocity = Callable[[Tensor, float], Tensor]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(size=shape).astype(np.float32))


def run_heun(x: Tensor, velocity: Velocity, levels: tuple[float, ...], weight: float = 1.0) -> Tensor:
    for t, t_next in pairwise(levels):
        v = velocity(x, t)
        ahead = euler(x, v, t, t_next, weight=weight)
        x = ahead if t_next == 0 else heun(x, v, velocity(ahead, t_next), t, t_next, weight=weight)
    return x


@pytest.mark.parametrize(("shift", "omega", "steps"), [(1, 0, 9), (3, 10, 12)])
def test_golden_runs(shift: int, omega: int, steps: int) -> None:
    mix = drawn(1, 16, 16) / 4
    calls = 0

    def velocity(x: Tensor, t: float) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(torch.einsum("ij,bcjf->bcif", mix, x)) + 0.5 * x * t

    start, levels, weight = drawn(2, 2, 8, 16, 20), v1_schedule(steps, shift=shift), omega_weight(omega)
    name = f"shift{shift}.omega{omega}.steps{steps}.final"
    x = start
    for t, t_next in pairwise(levels):
        x = euler(x, velocity(x, t), t, t_next, weight=weight)
    torch.testing.assert_close(x, GOLDEN[f"euler.{name}"], atol=1e-5, rtol=0)
    calls = 0
    torch.testing.assert_close(run_heun(start, velocity, levels, weight), GOLDEN[f"heun.{name}"], atol=1e-5, rtol=0)
    assert calls == 2 * steps - 1


@pytest.mark.parametrize("omega", [-10_000.0, -7.0, 0.0, 10.0, 300.0])
def test_omega_weight_is_the_logistic_function(omega: float) -> None:
    assert omega_weight(omega) == pytest.approx(0.9 + 0.2 / (1 + math.exp(min(-omega / 10, 700))), abs=1e-15)


def test_a_weight_stretches_around_the_mean_of_the_whole_tensor() -> None:
    x, v = drawn(3, 2, 5), drawn(4, 2, 5)
    step = euler(x, v, 0.9, 0.5, weight=1.1) - x
    plain = -0.4 * v
    assert step.mean().item() == pytest.approx(plain.mean().item(), abs=1e-6)
    torch.testing.assert_close(step, (plain - plain.mean()) * 1.1 + plain.mean(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("levels", [flow_schedule(1), flow_schedule(7, shift=3.0), v1_schedule(5)])
def test_a_straight_flow_is_followed_exactly(levels: tuple[float, ...]) -> None:
    """With v = noise - x0 everywhere, every stepper ends at x0, whatever the steps."""
    noise, x0 = drawn(5, 3, 4, 6).double(), drawn(6, 3, 4, 6).double()

    def velocity(x: Tensor, t: float) -> Tensor:
        torch.testing.assert_close(x, noised(x0, noise, t), atol=1e-12, rtol=0)
        return noise - x0

    x = noise
    for t, t_next in pairwise(levels):
        x = euler(x, velocity(x, t), t, t_next)
    torch.testing.assert_close(x, x0, atol=1e-13, rtol=0)
    torch.testing.assert_close(run_heun(noise, velocity, levels), x0, atol=1e-13, rtol=0)
    x = noise
    for t, t_next in pairwise(levels):
        torch.testing.assert_close(denoised(x, velocity(x, t), t), x0, atol=1e-13, rtol=0)
        x = renoise(x, velocity(x, t), t, t_next, noise)
    torch.testing.assert_close(x, x0, atol=1e-13, rtol=0)


def test_orders_of_euler_and_heun() -> None:
    """dx/dt = cos(3t) x has x(0) = x(1) exp(-sin(3) / 3): halving the steps divides the error by 2, and by 4."""
    start = torch.ones(1, dtype=torch.float64)
    truth = math.exp(-math.sin(3) / 3)

    def velocity(x: Tensor, t: float) -> Tensor:
        return math.cos(3 * t) * x

    def errors(method: str) -> list[float]:
        result = []
        for steps in (40, 80, 160):
            levels, x = flow_schedule(steps, shift=2.0), start
            for t, t_next in pairwise(levels):
                v = velocity(x, t)
                ahead = euler(x, v, t, t_next)
                x = ahead if method == "euler" else heun(x, v, velocity(ahead, t_next), t, t_next)
            result.append(abs(x.item() - truth))
        return result

    for method, factor in (("euler", 2), ("heun", 4)):
        coarse, middle, fine = errors(method)
        assert coarse / middle == pytest.approx(factor, rel=0.1)
        assert middle / fine == pytest.approx(factor, rel=0.05)


def test_renoising_gives_data_and_noise_by_their_shares() -> None:
    x0, first, fresh = drawn(7, 2, 3), drawn(8, 2, 3), drawn(9, 2, 3)
    x = noised(x0, first, 0.7)
    torch.testing.assert_close(renoise(x, first - x0, 0.7, 0.2, fresh), 0.2 * fresh + 0.8 * x0, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_types_stay_and_small_steps_are_not_lost(dtype: torch.dtype) -> None:
    """x keeps its type beside a bf16 velocity, and is added to in at least float32."""
    x = torch.full((4,), 1.0, dtype=dtype)
    v = torch.full((4,), 1.0, dtype=torch.bfloat16)
    assert euler(x, v, 0.5, 0.4).dtype == heun(x, v, v, 0.5, 0.4).dtype == denoised(x, v, 0.5).dtype == dtype
    assert renoise(x, v, 0.5, 0.4, v).dtype == dtype
    if dtype != torch.bfloat16:
        assert euler(x, v, 0.5, 0.5 - 1e-5)[0].item() == pytest.approx(1 - 1e-5, abs=1e-7)
