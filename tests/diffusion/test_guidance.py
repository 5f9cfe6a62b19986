"""Guidance against ACE-Step's own functions (golden numbers), diffusers' APG, and formulas written out."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longburn.diffusion import (
    AdaptiveProjected,
    StepInterval,
    angle_based,
    classifier_free,
    double_condition,
    zero_star,
)

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "ace_step" / "schedulers_guidance.safetensors")


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(size=shape).astype(np.float32))


def v1(seed: int) -> Tensor:
    return drawn(seed, 2, 8, 16, 20)


def close(got: Tensor, name: str) -> None:
    torch.testing.assert_close(got, GOLDEN[name], atol=1e-5, rtol=0)


def test_golden_plain_and_double() -> None:
    close(classifier_free(v1(3), v1(4), 7.0), "cfg")
    close(double_condition(v1(3), v1(4), v1(5), text_scale=5.0, lyric_scale=3.0), "cfg_double")


def test_golden_apg_and_its_momentum() -> None:
    guide = AdaptiveProjected((-2, -1))
    close(guide(v1(3), v1(4), 15.0), "apg.1")
    close(guide(v1(6), v1(7), 15.0), "apg.2")
    torch.testing.assert_close(guide.average, (v1(6) - v1(7)) - 0.75 * (v1(3) - v1(4)))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_golden_zero_star(step: int) -> None:
    close(zero_star(v1(3), v1(4), 7.0, step=step), f"cfg_zero_star.step{step}")


def test_zero_star_counts_up_to_and_with_zero_steps() -> None:
    cond, uncond = drawn(1, 2, 5, 3), drawn(2, 2, 5, 3)
    assert [bool(zero_star(cond, uncond, 2.0, step=i).any()) for i in range(4)] == [False, False, True, True]
    assert zero_star(cond, uncond, 2.0, step=0, zero_steps=0).any() == torch.tensor(False)
    assert zero_star(cond, uncond, 2.0, step=1, zero_steps=0).any()
    assert zero_star(cond, uncond, 2.0, step=0, zero_init=False).any()


@pytest.mark.parametrize(("dims", "limit", "parallel"), [((1,), 2.5, 0.0), ((1,), 0.0, 0.3), ((-2, -1), 0.7, 1.0)])
def test_apg_is_diffusers(dims: tuple[int, ...], limit: float, parallel: float) -> None:
    """Over a run of three steps. diffusers counts the scale from `cond`, so it is given one less."""
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    ours, theirs = AdaptiveProjected(dims, limit=limit, parallel=parallel), MomentumBuffer(-0.75)
    for step in range(3):
        cond, uncond = drawn(2 * step, 3, 29, 8), drawn(2 * step + 1, 3, 29, 8)
        expected = normalized_guidance(
            cond, uncond, 6.0, theirs, parallel, limit, use_original_formulation=True, norm_dim=dims
        )
        torch.testing.assert_close(ours(cond, uncond, 7.0), expected, atol=1e-5, rtol=0)


def test_apg_leaves_only_what_is_across_and_no_longer_than_the_limit() -> None:
    cond, uncond = 10 * drawn(1, 3, 40, 8), 10 * drawn(2, 3, 40, 8)
    added = AdaptiveProjected((1,))(cond, uncond, 2.0) - cond
    assert (added * cond).sum(1).abs().max() < 1e-3
    assert added.norm(dim=1).max() <= 2.5 + 1e-4
    assert added.norm(dim=1).min() > 1


def test_apg_of_equal_velocities_is_their_own() -> None:
    cond = drawn(1, 2, 7, 3)
    assert torch.equal(AdaptiveProjected((1,))(cond, cond, 7.0), cond)


def adg_frame(x: np.ndarray, cond: np.ndarray, uncond: np.ndarray, t: float, scale: float) -> np.ndarray:
    """One frame in float64: data predictions as vectors, turned in their plane."""
    weight = max(scale - 1, 0) + 1e-3
    text, null = x - t * cond, x - t * uncond
    cosine = text @ null / math.sqrt((text @ text) * (null @ null))
    angle = math.acos(min(max(cosine, -1 + 1e-6), 1 - 1e-6))
    turned = min(weight * angle, 3.14 / 6)
    across = (text - null) - ((text - null) @ null) / (null @ null + 1e-8) * null
    gain = math.sin(turned) / math.sin(angle) if math.sin(angle) > 1e-3 else weight
    return (x - (math.cos(turned) * text + gain * across)) / t


@pytest.mark.parametrize(("t", "scale"), [(0.9, 7.0), (0.3, 1.5), (0.02, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("apart", [1.0, 0.05, 1e-4])
def test_adg_is_the_formula_frame_by_frame(t: float, scale: float, apart: float) -> None:
    x, cond = drawn(1, 2, 9, 8), drawn(2, 2, 9, 8)
    uncond = cond + apart * drawn(3, 2, 9, 8)
    got = angle_based(x, cond, uncond, t, scale)
    frames = zip(x.double().view(-1, 8), cond.double().view(-1, 8), uncond.double().view(-1, 8), strict=True)
    expected = np.stack([adg_frame(a.numpy(), b.numpy(), c.numpy(), t, scale) for a, b, c in frames])
    # Angles of nearly equal vectors in float32 predictions are known to about 1e-4.
    difference = (got.double().view(-1, 8).numpy() - expected) * t
    assert np.abs(difference).max() < 2e-5


def test_adg_needs_noise() -> None:
    x = drawn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="noise level t must be above 0, got 0"):
        angle_based(x, x, x, 0.0, 7.0)


def test_the_guided_half() -> None:
    assert StepInterval().steps(60) == range(15, 45)
    assert StepInterval(width=1.0).steps(60) == range(60)
    assert StepInterval(width=0.0).steps(60) == range(30, 30)
    assert StepInterval(width=0.5).steps(9) == range(2, 6)  # ends are cut off separately
    scales = [StepInterval().scale_at(i, 60) for i in range(60)]
    assert scales == [None] * 15 + [15.0] * 30 + [None] * 15


def test_decay_is_linear_from_scale_to_lowest() -> None:
    interval = StepInterval(width=1.0, scale=15.0, decay=1.0, lowest=3.0)
    assert [interval.scale_at(i, 5) for i in range(5)] == pytest.approx([15, 12, 9, 6, 3])
    half = StepInterval(width=1.0, scale=15.0, decay=0.5, lowest=3.0)
    assert half.scale_at(4, 5) == pytest.approx(9)
    assert StepInterval(width=1.0, decay=1.0).scale_at(0, 1) == 15.0


@pytest.mark.parametrize(("name", "value"), [("width", 1.5), ("width", math.nan), ("decay", -0.1)])
def test_bad_intervals_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"StepInterval: {name} must be in \[0, 1\]"):
        StepInterval(**{name: value})


def test_apg_needs_dims() -> None:
    with pytest.raises(ValueError, match="dims must name at least one"):
        AdaptiveProjected(())
