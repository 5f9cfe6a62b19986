"""The models that travel with the package do what their figures say, on episodes of seeds that no training used."""

import json
from pathlib import Path

import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from longburn.cache import AttnWindow
from longburn.interact import WorldModelEnv, evaluate
from longburn.models import data
from longburn.models.minigrid import RoomWorld, load_policy, load_room, memory_agent, memory_task, window
from longburn.models.minigrid.cells import Cells
from longburn.models.minigrid.measure import ENDED, drift, explore
from longburn.models.minigrid.policy import FULL
from longburn.models.minigrid.rooms import to_cells
from longburn.sampling import SamplerConfig
from longburn.weights import CheckpointError

FOLDERS = [Path(data.__path__[0]) / name for name in ("minigrid_agent", "minigrid_world")]
EPISODES = 48


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_files_are_complete_and_small(folder: Path) -> None:
    files = {file.name: file for file in folder.iterdir()}
    assert set(files) == {"model.safetensors", "config.json", "log.json", "LICENSE", "README.md"}
    assert sum(file.stat().st_size for file in files.values()) <= 3_000_000
    log = json.loads(files["log.json"].read_text(encoding="utf-8"))
    assert log["data"]["seed"] >= 100_000  # tests use smaller ones


@pytest.mark.parametrize("wrong", [{"heads": 0}, {"layers": -1}, {"dim": 64.0}, {"depth": 2}, [64], 7])
def test_sizes_of_no_model_are_refused(tmp_path: Path, wrong: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(wrong), encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"config\.json: .*, wanted whole numbers of at least 1 for cell, dim, heads"
    ):
        load_policy(tmp_path)


def found(way: AttnWindow, gate: tuple[int, int] | None) -> float:
    """Share of episodes that end at the right object."""
    size = 13 if gate is None else 17
    env = SyncVectorEnv([lambda: memory_task(size, gate=gate)] * EPISODES, autoreset_mode=AutoresetMode.DISABLED)
    agent = memory_agent(load_policy(window=way))
    played = evaluate(agent, env, episodes=EPISODES, seed=20_000, sampler=SamplerConfig(min_p=0.05, seed=1))
    return sum(episode.reward > 0 for episode in played) / EPISODES


# By chance, 48 episodes give more than 36 or less than 12 right ones once in 5000 times.


@pytest.mark.parametrize("gate", [None, (64, 96)], ids=["plain", "gate"])
def test_the_policy_remembers_as_far_as_its_window_and_what_it_keeps(gate: tuple[int, int] | None) -> None:
    steps = 5 if gate is None else 16
    assert found(FULL, gate) >= 0.9
    assert found(window(steps, sinks=True), gate) >= 0.9
    assert 0.25 <= found(window(steps, sinks=False), gate) <= 0.75


@torch.no_grad()
def test_the_world_model_is_right_about_what_happens() -> None:
    played = explore(24, 40, seed=30_000, goals=0.0)
    whole = (played.actions != ENDED).all(1)
    frames, actions = (torch.from_numpy(part[whole]) for part in played)
    result = drift(load_room(), frames, actions)
    unchanged = (frames[:, 1:] == frames[:, :-1]).all(2).double().mean()
    assert result.told_frames.mean() > 0.95 > unchanged
    assert result.told_cells.mean() > 0.998
    still = (frames[:, -1] == frames[:, 0]).double().mean()
    assert result.free_cells[-1] > 0.965 > still  # after 40 steps of its own
    assert result.free_frames[9] > 0.7


def test_the_shipped_world_can_be_played_to_its_end() -> None:
    """By plans made in MiniGrid, key, door, goal: in most of them the model says that it was reached, and when."""
    played = explore(60, 100, seed=40_000, goals=1.0)
    plans = [[int(action) for action in row if action != ENDED] for row in played.actions]
    chosen = [row for row, plan in enumerate(plans) if len(plan) < 60][:10]
    env = WorldModelEnv(RoomWorld(load_room(), tile=4))
    won = [wins(env, plans[row], to_cells(played.frames[row, 0])) for row in chosen]
    assert len(won) == 10
    assert sum(won) >= 5


def wins(env: WorldModelEnv, plan: list[int], start: Cells) -> bool:
    """Whether the goal is reached with the plan's last action, and not before."""
    env.reset(seed=0, options={"image": start})
    for step, action in enumerate(plan, 1):
        _, reward, terminated, _, _ = env.step(action)
        if terminated:
            assert reward == pytest.approx(1 - 0.9 * step / 640)
            return step == len(plan)
    return False
