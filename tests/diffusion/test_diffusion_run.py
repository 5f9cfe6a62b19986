"""Seeds, progress and cancellation of a run."""

import pytest
import torch

from longburn.diffusion import SamplingCancelledError, draw_noise, run_steps, seeded


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    batch = draw_noise((3, 5, 4), seeded([7, 8, 9]))
    for row, seed in enumerate((7, 8, 9)):
        assert torch.equal(batch[row : row + 1], draw_noise((1, 5, 4), seeded([seed])))
    assert torch.equal(batch[:1], torch.randn((1, 5, 4), generator=torch.Generator().manual_seed(7)))


def test_one_generator_draws_the_whole_batch() -> None:
    batch = draw_noise((3, 5, 4), seeded([7]))
    assert torch.equal(batch, torch.randn((3, 5, 4), generator=torch.Generator().manual_seed(7)))


def test_no_seed_is_a_fresh_one() -> None:
    assert not torch.equal(draw_noise((1, 64), seeded([None])), draw_noise((1, 64), seeded([None])))


@pytest.mark.parametrize("seeds", [[], [-1], [3, 2**64], [1.5], ["1"]])
def test_bad_seeds_are_named(seeds: list[int]) -> None:
    with pytest.raises(ValueError, match=r"seeded: wants at least one seed, each in \[0, 2\*\*64\)"):
        seeded(seeds)


def test_generators_must_fit_the_rows() -> None:
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        draw_noise((3, 4), seeded([1, 2]))


def test_progress_is_told_after_each_step() -> None:
    told: list[tuple[int, int]] = []
    seen = []
    for step in run_steps(range(3, 6), on_step=lambda done, total: told.append((done, total))):
        assert len(told) == len(seen)
        seen.append(step)
    assert seen == [3, 4, 5]
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_cancelling_ends_the_run_before_its_next_step() -> None:
    steps = run_steps(range(5), cancelled=iter([False, False, True]).__next__)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(SamplingCancelledError, match="after 2 of 5 steps"):
        next(steps)
