"""Noise levels against ACE-Step's own schedulers (golden numbers), its published tables, and diffusers."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longburn.diffusion import (
    flow_schedule,
    heun_levels,
    nearest_level,
    shifted,
    turbo_schedule,
    v1_schedule,
    v1_start_level,
)
from longburn.diffusion.schedules import TURBO_LEVELS

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "ace_step" / "schedulers_guidance.safetensors")

# As the released turbo models print them.
TABLES = {
    1: [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
    2: [1, 0.9333333, 0.8571429, 0.7692308, 0.6666667, 0.5454545, 0.4, 0.2222222],
    3: [1, 0.9545455, 0.9, 0.8333333, 0.75, 0.6428571, 0.5, 0.3],
}


@pytest.mark.parametrize(("shift", "omega", "steps"), [(1, 0, 9), (3, 10, 12)])
def test_v1_levels_are_those_of_its_schedulers(shift: int, omega: int, steps: int) -> None:
    levels = v1_schedule(steps, shift=shift)
    for name, ours, timesteps in (
        ("euler", levels, levels[:-1]),
        ("heun", (*heun_levels(levels), 0.0), heun_levels(levels)),
    ):
        golden = f"{name}.shift{shift}.omega{omega}.steps{steps}"
        torch.testing.assert_close(torch.tensor(ours), GOLDEN[f"{golden}.sigmas"], atol=1e-7, rtol=2e-7)
        torch.testing.assert_close(1000 * torch.tensor(timesteps), GOLDEN[f"{golden}.timesteps"], atol=0, rtol=2e-7)


def test_v1_levels_are_those_of_a_table_that_is_interpolated_and_shifted_again() -> None:
    """The scheduler's own way: a table of 1000 shifted levels, of which only the ends are used."""
    for sigma_max, steps in ((1.0, 60), (0.5, 30), (0.37, 7)):
        table = torch.linspace(1, 1000 * sigma_max, 1000, dtype=torch.float64) / 1000
        table = 3 * table / (1 + 2 * table)
        levels = torch.linspace(table[-1].item(), table[0].item(), steps, dtype=torch.float64)
        levels = 3 * levels / (1 + 2 * levels)
        ours = v1_schedule(steps, sigma_max=sigma_max)
        assert ours[:-1] == pytest.approx(levels.tolist(), rel=1e-12)
        assert ours[-1] == 0
        assert v1_start_level(sigma_max) == pytest.approx(table[-1].item(), rel=1e-12)
        assert ours[0] == pytest.approx(shifted(v1_start_level(sigma_max), 3.0))


def test_chosen_steps_are_shifted_a_third_time() -> None:
    full = v1_schedule(60)
    chosen = [1, 5, 23, 60]
    expected = [3 * full[i - 1] / (1 + 2 * full[i - 1]) for i in chosen]
    assert v1_schedule(60, chosen=chosen) == pytest.approx([*expected, 0.0])


def test_one_v1_step() -> None:
    assert v1_schedule(1) == (1.0, 0.0)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_turbo_tables(shift: int) -> None:
    assert turbo_schedule(shift=shift) == pytest.approx([*TABLES[shift], 0], abs=5e-8)
    for near in (shift - 0.4, shift + 0.4):
        assert turbo_schedule(shift=near) == turbo_schedule(shift=shift)


def test_turbo_shift_halves_go_down() -> None:
    assert turbo_schedule(shift=2.5) == turbo_schedule(shift=2)
    assert turbo_schedule(shift=50) == turbo_schedule(shift=3)


def test_turbo_levels_are_the_union_of_the_tables() -> None:
    union = sorted({round(t, 7) for table in TABLES.values() for t in table}, reverse=True)
    assert len(TURBO_LEVELS) == len(union) == 20
    assert pytest.approx(union, abs=1e-7) == TURBO_LEVELS


def test_levels_of_ones_own_go_to_the_nearest_known_one() -> None:
    wanted = [0.99, 0.95, 0.7, 0.69, 0.35, 0.01, 0.0, 0.0]
    assert turbo_schedule(levels=wanted) == pytest.approx(
        [1, 0.9545455, 0.6666667, 0.6666667, 0.375, 0.125, 0], abs=1e-6
    )
    # As near to 0.875 as to the level below it: the higher one.
    middle = (TURBO_LEVELS[4] + TURBO_LEVELS[3]) / 2
    assert turbo_schedule(levels=[math.nextafter(middle, 0)])[0] == TURBO_LEVELS[4]
    assert turbo_schedule(levels=[0.4375])[0] in (0.4, 0.5)


@pytest.mark.parametrize(("steps", "shift"), [(8, 3.0), (50, 1.0), (13, 2.2), (1, 3.0)])
def test_flow_schedule_is_diffusers(steps: int, shift: float) -> None:
    from diffusers import AceStepPipeline

    theirs = AceStepPipeline._get_timestep_schedule(None, steps, shift, "cpu", torch.float64)
    assert flow_schedule(steps, shift=shift) == pytest.approx([*theirs.tolist(), 0.0], rel=1e-14)


def test_nearest_level_never_is_the_end() -> None:
    schedule = flow_schedule(4)  # 1, .75, .5, .25, 0
    assert [nearest_level(schedule, t) for t in (1.0, 0.8, 0.625, 0.3, 0.0)] == [0, 1, 1, 3, 3]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: flow_schedule(0), "steps must be at least 1, got 0"),
        (lambda: flow_schedule(8, shift=0), "shift must be finite and > 0"),
        (lambda: turbo_schedule(shift=math.nan), "shift must be finite"),
        (lambda: turbo_schedule(levels=[0.0]), "wants 1 to 20 levels above 0, got 0"),
        (lambda: turbo_schedule(levels=[0.5] * 21), "got 21"),
        (lambda: turbo_schedule(levels=[0.5, 0.9]), "must descend within"),
        (lambda: turbo_schedule(levels=[1.5, 0.9]), "must descend within"),
        (lambda: turbo_schedule(levels=[0.9, math.nan]), "must descend within"),
        (lambda: v1_schedule(10, sigma_max=0.0), "sigma_max must be in"),
        (lambda: v1_schedule(10, sigma_max=1.1), "sigma_max must be in"),
        (lambda: v1_schedule(10, chosen=[3, 3]), "must ascend within 1 .. 10"),
        (lambda: v1_schedule(10, chosen=[3, 11]), "must ascend within 1 .. 10"),
        (lambda: v1_schedule(10, chosen=[0, 3]), "must ascend within 1 .. 10"),
    ],
)
def test_bad_input_is_named(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        call()  # type: ignore[operator]
    assert "\n" not in str(error.value)
