"""The two MiniGrid trainings, at a size of seconds: what they learn from, and that they learn."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

import train_minigrid_agent as agent  # noqa: E402
import train_minigrid_world as world  # noqa: E402
from longburn.models.minigrid import MemoryPolicy, PolicyConfig, RoomConfig, RoomModel, load_policy, load_room  # noqa: E402
from longburn.models.minigrid.measure import ENDED, Explored, explore  # noqa: E402
from longburn.weights import CheckpointError  # noqa: E402
from minigrid_training.fitting import LIMIT, Schedule, export, fit, save  # noqa: E402

CPU = torch.device("cpu")


def test_episodes_of_the_expert_end_in_its_success_and_are_padded() -> None:
    made = agent.gather(6, seed=7)
    assert made.lengths.sum() == len(made.actions) == len(made.views)
    differ = (made.actions != made.taken).mean()
    assert 0 < differ < 2 * agent.NOISE
    rows = np.array([1, 4, 5])
    views, directions, taken, actions, keys = made.padded(rows, 40)
    for at, row in enumerate(rows):
        start, length = made.lengths[:row].sum(), min(40, made.lengths[row])
        part = slice(start, start + length)
        assert np.array_equal(views[at, :length].numpy(), made.views[part])
        assert np.array_equal(actions[at, :length].numpy(), made.actions[part])
        assert np.array_equal(taken[at, :length].numpy(), made.taken[part])
        assert np.array_equal(directions[at, :length].numpy(), made.directions[part])
        assert (actions[at, length:] == -100).all()
        assert keys[at] == made.keys[row]
        west = made.views[part][made.directions[part] == 2][:15, :, :, 0]  # only the first room lies there
        assert (west == (5 if keys[at] else 6)).any() or made.directions[start] == 0
    again = agent.gather(6, seed=7)
    assert np.array_equal(again.taken, made.taken)


def test_a_policy_learns_to_imitate(capsys: pytest.CaptureFixture[str]) -> None:
    made = agent.gather(20, seed=0)
    policy, log = agent.learn(PolicyConfig(dim=32, heads=2, hidden=32), made, Schedule(25, 60.0), 4, CPU, seed=0)
    losses = [loss for _, loss in log["training_loss"]]
    assert losses[-1] < 0.75 * losses[0]
    assert set(log["held_out_loss"]) == {"full", "32", "32 + 24", "10", "10 + 24"}
    assert isinstance(policy, MemoryPolicy)


def test_clips_are_the_first_frame_and_a_stretch_of_later_ones() -> None:
    frames, actions = map(torch.from_numpy, explore(4, 40, seed=3, goals=0.0))
    clips = world.Clips(frames, actions, 12, seed=0)
    far = []
    for _ in range(8):
        shown, done, positions, following = clips.draw(5)
        place = positions.view(13, -1)
        assert torch.equal(place[0], torch.arange(64))
        assert (place.diff(dim=1) == 1).all()
        assert (place[1:, 0].diff() == 64).all()
        far.append(int(place[1, 0]) // 64)
        for row in range(5):
            (episode,) = (e for e in range(4) if torch.equal(frames[e, 0], shown[row, 0]))
            starts = [
                s
                for s in range(1, 29)
                if torch.equal(frames[episode, s : s + 12], shown[row, 1:])
                and torch.equal(actions[episode, s : s + 12], done[row, 1:])
                and torch.equal(frames[episode, s + 1 : s + 13], following[row, 1:])
            ]
            assert starts
            assert far[-1] in starts or far[-1] > 28
            assert torch.equal(following[row, 0], frames[episode, 1])
    assert min(far) >= 1
    assert max(far) > 100


def test_nothing_after_an_end_is_learnt_from() -> None:
    torch.manual_seed(0)
    model = RoomModel(RoomConfig(dim=24, heads=2, hidden=24, layers=1, window=2))
    frames, actions = map(torch.from_numpy, explore(2, 20, seed=3, goals=0.0))
    clip = world.Clips(frames, actions, 12, seed=0).draw(2)
    ended = clip[1].clone()
    ended[:, 5:] = ENDED
    other = clip[3].clone()
    other[:, 5:] = 0
    losses = [world.clip_loss(model, clip[0], ended, clip[2], following) for following in (clip[3], other)]
    assert losses[0] == losses[1]
    assert losses[0] != world.clip_loss(model, *clip)


def test_a_world_model_learns() -> None:
    config = RoomConfig(dim=32, heads=2, hidden=32, layers=1, window=2)
    played = Explored(*explore(12, 30, seed=0, goals=0.3))
    _, log = world.learn(config, played, Schedule(20, 60.0, 5e-3), 2, CPU, seed=0, noise=0.01, length=4)
    losses = [loss for _, loss in log["training_loss"]]
    assert losses[-1] < 0.7 * losses[0]


def test_the_first_frame_is_never_corrupted() -> None:
    frames = torch.zeros(3, 4, 64, dtype=torch.uint8)
    spoilt = world.corrupted(frames, 0.5, torch.Generator().manual_seed(0))
    assert (spoilt[:, 0] == 0).all()
    assert 0.3 < (spoilt[:, 1:] != 0).float().mean() < 0.6


def test_what_is_saved_loads_and_what_is_too_large_is_not_shipped(tmp_path: Path) -> None:
    policy = MemoryPolicy(PolicyConfig(dim=24, heads=3, hidden=40))
    save(policy, policy.config.to_dict(), {"seconds": 1}, tmp_path / "results")
    size = export(tmp_path / "results", tmp_path / "shipped", ROOT / "LICENSE", "# A card\n")
    assert size < LIMIT
    loaded = load_policy(tmp_path / "shipped")
    for name, weight in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float())
    assert {f.name for f in (tmp_path / "shipped").iterdir()} == {
        "model.safetensors", "config.json", "log.json", "LICENSE", "README.md"
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="wanted whole numbers of at least 1 for"):
        load_room(tmp_path / "shipped")  # a policy is no world model
    (tmp_path / "shipped" / "config.json").write_text(json.dumps({**policy.config.to_dict(), "dim": 48}))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_policy(tmp_path / "shipped")
    (tmp_path / "results" / "log.json").write_text(" " * LIMIT)
    with pytest.raises(ValueError, match="train a smaller model"):
        export(tmp_path / "results", tmp_path / "more", ROOT / "LICENSE", "")
    assert not (tmp_path / "more").exists()
    with pytest.raises(CheckpointError, match="nowhere"):
        load_policy(tmp_path / "nowhere")


def test_a_loss_that_is_none_ends_a_training() -> None:
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        fit(layer, lambda step: layer.weight.sum() * torch.nan, Schedule(3, 10.0), say=lambda line: None)
