"""The memory task with and without its gate, and the expert that plays it."""

import numpy as np
import pytest

from longburn.models.minigrid import Expert, memory_task
from longburn.models.minigrid.cells import FORWARD, WAIT
from longburn.models.minigrid.policy import SINK_STEPS
from longburn.models.minigrid.tasks import hallway_end, sees_first_object


def test_without_a_gate_it_is_minigrids_own() -> None:
    import gymnasium
    import minigrid  # noqa: F401 (registers its environments)

    ours, theirs = memory_task(13), gymnasium.make("MiniGrid-MemoryS13-v0")
    assert ours.max_steps == theirs.unwrapped.max_steps
    for seed in range(5):
        seen, expected = ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0]
        assert np.array_equal(seen["image"], expected["image"])
        for action in (0, 2, 2, 1, 2):
            seen, expected = ours.step(action)[0], theirs.step(action)[0]
            assert np.array_equal(seen["image"], expected["image"])


@pytest.mark.parametrize(
    "settings", [{}, {"size": 17, "random_length": True}, {"size": 17, "gate": 40}, {"gate": (20, 60)}]
)
def test_the_expert_always_finds_it_and_has_seen_it_among_the_first_steps(settings: dict[str, object]) -> None:
    for seed in range(25):
        env = memory_task(**settings)  # type: ignore[arg-type]
        env.reset(seed=seed)
        expert = Expert(env, np.random.default_rng(seed))
        seen, step, ended, reward = [], 0, False, 0.0
        while not ended:
            if sees_first_object(env):
                seen.append(step)
            _, reward, terminated, truncated, _ = env.step(expert.action())
            ended, step = terminated or truncated, step + 1
        assert reward > 0
        assert seen[0] < SINK_STEPS
        if settings.get("size", 13) == 13 and "gate" not in settings:
            assert step - 2 - seen[-1] >= 10  # the reach of a window of 5 steps in two layers is 9


def test_a_gate_keeps_everybody_in_until_it_is_time() -> None:
    env = memory_task(17, gate=30)
    seen, _ = env.reset(seed=1)
    inner = env.unwrapped
    inner.agent_pos, end = np.array((hallway_end(inner) - 1, inner.height // 2)), hallway_end(inner)
    for step in range(1, 30):
        seen, *_ = env.step(FORWARD if step % 2 else WAIT)
        assert inner.agent_pos[0] == end - 1
        assert seen["image"][3, 5].tolist() == [4, 5, 2]  # a locked door ahead
    seen, *_ = env.step(FORWARD)
    assert inner.agent_pos[0] == end


def test_gates_are_drawn_by_the_environments_own_seed() -> None:
    env = memory_task(17, gate=(10, 1000))
    drawn = []
    for seed in (0, 1, 0):
        env.reset(seed=seed)
        drawn.append(env.opens)
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize("gate", [0, (5, 4), (0, 3), (5,), 2.5, (1, 2.5), "5"])
def test_gates_that_open_before_they_close_are_refused(gate: object) -> None:
    with pytest.raises(ValueError, match=r"memory_task: gate .*, wanted the step at which it opens"):
        memory_task(13, gate=gate)  # type: ignore[arg-type]


def test_a_gate_may_be_a_number_of_numpy() -> None:
    env = memory_task(13, gate=np.int64(5))
    env.reset(seed=0)
    assert env.opens == 5


@pytest.mark.parametrize("size", [5, 12])
def test_sizes_that_make_no_map_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"memory_task: size {size}, wanted an odd number of cells, at least 7"):
        memory_task(size)
