"""A world model as an environment, by gymnasium's own check and by hand."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from acting import DIM, TinyModel
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from worlds import DotWorld

from longburn.interact import Agent, LinearEncoder, LinearHead, PlayableWorld, WorldModelEnv, action_codec, rollout
from longburn.interact.env import Latency


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", [None, "rgb_array", "rgb_array_list"])
def test_gymnasium_finds_nothing_wrong(mode: str | None) -> None:
    def make(**more) -> WorldModelEnv:
        return WorldModelEnv(DotWorld(), horizon=20, **more)

    spec = gymnasium.envs.registration.EnvSpec("Dot-v0", entry_point=make, disable_env_checker=True)
    env = make(render_mode=mode)
    env.spec = spec
    check_env(env)
    assert isinstance(env.world, PlayableWorld)


def test_a_step_by_hand() -> None:
    world = DotWorld(n=3)
    env = WorldModelEnv(world, horizon=4, render_mode="rgb_array")
    assert env.metadata["render_fps"] == 8.0
    observation, info = env.reset(seed=7, options={"at": (2, 4)})
    assert observation.tolist() == [2, 4]
    assert [frame.shape for frame in info["frames"]] == [(16, 24, 3)]
    assert world.asked[0][1] == {"at": (2, 4)}
    observation, reward, terminated, truncated, info = env.step(3)
    assert (observation.tolist(), reward, terminated, truncated) == ([2, 5], 0.0, False, False)
    assert [frame.shape for frame in info["frames"]] == [(16, 24, 3)] * 3
    assert info["at"] == (2, 5)
    assert 0 < info["latency"].seconds < 1
    np.testing.assert_array_equal(env.render(), info["frames"][-1])
    *_, reward, terminated, truncated, _ = env.step(1)
    assert (reward, terminated, truncated) == (1.0, True, False)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)


def test_the_horizon_truncates() -> None:
    env = WorldModelEnv(DotWorld(), horizon=3)
    env.reset(seed=0)
    assert [env.step(4)[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(4)
    env.reset(options={"at": (3, 4)})
    assert [env.step(action)[2:4] for action in (4, 4, 3)] == [(False, False), (False, False), (True, False)]


def test_seeds_reach_the_world_and_go_on() -> None:
    world = DotWorld()
    env = WorldModelEnv(world)
    for seed in (5, None, None, 5, None):
        env.reset(seed=seed)
    seeds = [seed for seed, _ in world.asked]
    assert seeds[3:] == seeds[:2]
    assert len(set(seeds)) == 3


def test_rendered_frames_are_all_since_the_last_time() -> None:
    env = WorldModelEnv(DotWorld(n=2), render_mode="rgb_array_list")
    env.reset(seed=0)
    env.step(0)
    env.step(0)
    assert len(env.render()) == 5
    env.step(0)
    assert len(env.render()) == 3  # the newest frame of the last time, and two


def test_bad_actions_options_and_frames_are_refused() -> None:
    world = DotWorld()
    env = WorldModelEnv(world)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    asked = list(world.asked)
    with pytest.raises(ValueError, match=r"the action 5 is not in Discrete\(5\)"):
        env.step(5)
    with pytest.raises(ValueError, match=r"the action int64 \[2\] \[0, 1\] is not in"):
        env.step(np.array([0, 1]))
    with pytest.raises(ValueError, match="option 'colour'"):
        env.reset(options={"colour": 1})
    assert world.asked == asked
    world._frame = lambda: np.zeros((16, 23, 3), np.uint8)
    with pytest.raises(ValueError, match=r"frames uint8 \[1, 16, 23, 3\], wanted uint8 \[n, 16, 24, 3\]"):
        env.reset(seed=0)
    with pytest.raises(ValueError, match="horizon 0"):
        WorldModelEnv(world, horizon=0)
    with pytest.raises(ValueError, match="render_mode 'human', wanted 'rgb_array', 'rgb_array_list' or None"):
        WorldModelEnv(world, render_mode="human")


def test_an_action_of_another_type_is_told_by_its_type() -> None:
    world = DotWorld()
    world.action_space = spaces.Dict(keys=spaces.MultiBinary(1), mouse=spaces.Box(-1, 1, (2,)))
    env = WorldModelEnv(world)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"'mouse': float64 \[2\] \[0.0, 0.0\]\} is not in Dict\(.*float32"):
        env.step({"keys": np.zeros(1, np.int8), "mouse": np.zeros(2)})


@pytest.mark.parametrize("seed", [None, 9])
def test_a_refused_reset_leaves_the_random_numbers_as_they_were(seed: int | None) -> None:
    asked = []
    for refused in (False, True):
        env = WorldModelEnv(DotWorld())
        env.reset(seed=1)
        if refused:
            with pytest.raises(ValueError, match="option 'colour'"):
                env.reset(seed=seed, options={"colour": 1})
            assert env.np_random_seed == 1
            env.step(4)  # the episode goes on
        env.reset()
        asked.append(env.world.asked[-1])
    assert asked[0] == asked[1]


class Growing(DotWorld):
    """One frame at the start, then 9, then 12 a step; an episode takes `steps` of them."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def reset(self, *, seed, options=None):
        self.taken = 0
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.taken += 1
        self.n = 9 if self.taken == 1 else 12
        return replace(super().step(4), terminated=self.taken == self.steps)


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
def test_rows_may_have_different_numbers_of_frames(mode: AutoresetMode) -> None:
    env = SyncVectorEnv([lambda n=n: WorldModelEnv(Growing(n)) for n in (3, 5)], autoreset_mode=mode)
    _, info = env.reset(seed=0)
    counts = [[len(frames) for frames in info["frames"]]]
    for _ in range(5):
        _, _, terminated, _, info = env.step(np.array([4, 4]))
        counts.append([len(frames) for frames in info["frames"]])
        if mode is AutoresetMode.DISABLED and terminated.any():
            env.reset(options={"reset_mask": terminated})
    after = {
        AutoresetMode.NEXT_STEP: [[12, 12], [1, 12], [9, 12]],
        AutoresetMode.SAME_STEP: [[1, 12], [9, 12], [12, 1]],
        AutoresetMode.DISABLED: [[12, 12], [9, 12], [12, 12]],
    }[mode]
    assert counts == [[1, 1], [9, 9], [12, 12], *after]
    assert info["frames"][1][0].shape == (16, 24, 3)


def test_a_measured_time_is_not_compared() -> None:
    assert Latency(0.1) == Latency(0.2)


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
def test_an_agent_plays_worlds(mode: AutoresetMode) -> None:
    """One loop in both directions: a model acts in what another one imagines."""
    torch.manual_seed(0)
    env = SyncVectorEnv([lambda: WorldModelEnv(DotWorld(), horizon=5)] * 2, autoreset_mode=mode)
    codec = action_codec(env.single_action_space)
    agent = Agent(
        LinearEncoder(env.single_observation_space, DIM), TinyModel(codec.width), LinearHead(DIM, codec.width), codec
    )
    ended = [episode for turn in rollout(agent, env, steps=30, seed=0) for episode in turn.ended]
    assert len(ended) >= 8
    assert {episode.steps for episode in ended} <= {1, 2, 3, 4, 5}
    assert any(episode.truncated for episode in ended)
