"""The room as symbols and pictures, and its world model: streams are whole passes, frames see frames."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from longburn.interact import PlayableWorld, WorldModelEnv
from longburn.models.minigrid import RoomConfig, RoomModel, RoomWorld
from longburn.models.minigrid.cells import FORWARD, TOGGLE, WAIT
from longburn.models.minigrid.measure import ENDED, drift, explore
from longburn.models.minigrid.rooms import AT_GOAL, CELLS, SYMBOLS, WITH_KEY, draw, frame_of, room, to_cells, to_frame
from longburn.sampling import SamplerConfig

SMALL = RoomConfig(dim=24, heads=2, hidden=40, layers=2, window=2, sinks=1)


def model(config: RoomConfig = SMALL) -> RoomModel:
    torch.manual_seed(0)
    made = RoomModel(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def clip(frames: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shown = torch.randint(SYMBOLS, (2, frames, CELLS), generator=generator, dtype=torch.uint8)
    return shown, torch.randint(7, (2, frames), generator=generator)


# --- the network ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 1])
def test_frames_in_a_stream_give_what_a_whole_pass_gives(sinks: int) -> None:
    made = model(replace(SMALL, sinks=sinks))
    frames, actions = clip(9)
    whole = made(frames, actions)
    cache = made.init_cache(2)
    size = cache.nbytes
    for at in range(9):
        logits = made(frames[:, at : at + 1], actions[:, at : at + 1], cache=cache)[:, 0]
        assert (logits - whole[:, at]).abs().max() < 1e-4 * whole.abs().max()
    assert cache.nbytes == size


@torch.no_grad()
def test_a_frame_sees_itself_the_window_and_the_first_frame() -> None:
    made = model(replace(SMALL, layers=1))  # what one layer sees
    frames, actions = clip(7)
    before = made(frames, actions)
    tells = torch.zeros(7, 7, dtype=torch.bool)  # of every frame, on every frame
    for changed in range(7):
        other = frames.clone()
        other[:, changed, CELLS - 1] = (other[:, changed, CELLS - 1] + 1) % SYMBOLS  # its last cell
        tells[changed] = (made(other, actions) - before).abs().amax((0, 2, 3)) > 1e-6
    expected = torch.tensor([[t >= f and (t - f < 3 or f == 0) for t in range(7)] for f in range(7)])
    expected &= torch.tensor([[t - f < 2 or f == 0 or t - f == 2 for t in range(7)] for f in range(7)])
    assert torch.equal(tells, expected)
    other = frames.clone()
    other[:, 3, -1] = (other[:, 3, -1] + 1) % SYMBOLS
    assert (made(other, actions)[:, 3, 0] != before[:, 3, 0]).any()  # its first cell sees its last


def test_shapes_that_disagree_are_refused() -> None:
    frames, actions = clip(3)
    with pytest.raises(ValueError, match="RoomModel: frames"):
        model()(frames[:, :, :63], actions)
    with pytest.raises(ValueError, match="RoomModel: frames"):
        model()(frames, actions[:, :2])
    with pytest.raises(ValueError, match="window of 0 frames"):
        RoomModel(replace(SMALL, window=0))


# --- rooms ---------------------------------------------------------------------------------------------------------


def test_symbols_say_all_that_the_environment_shows() -> None:
    from minigrid.wrappers import FullyObsWrapper

    played = explore(6, 60, seed=50, goals=0.5)
    for row, episode in enumerate(played.frames):
        env = FullyObsWrapper(room())
        seen, _ = env.reset(seed=50 + row)
        for frame, action in zip(episode, [*played.actions[row].tolist(), None], strict=True):
            assert np.array_equal(to_cells(frame), seen["image"])
            assert (frame[0] == WITH_KEY) == (env.unwrapped.carrying is not None and frame[0] != AT_GOAL)
            if action in (None, ENDED):
                break
            seen, _, terminated, *_ = env.step(action)
        assert (episode[-1, 0] == AT_GOAL) == (action == ENDED or terminated)


def test_pictures_are_minigrids_own() -> None:
    env = room(highlight=False, render_mode="rgb_array", tile_size=8)
    for seed in range(4):
        env.reset(seed=seed)
        assert np.array_equal(draw(frame_of(env), 8), env.render())


def test_cells_of_other_rooms_are_refused() -> None:
    env = room()
    env.reset(seed=0)
    cells = to_cells(frame_of(env))
    assert np.array_equal(to_frame(cells), frame_of(env))
    ball, hole = cells.copy(), cells.copy()
    ball[3, 4], hole[0, 0] = (6, 4, 0), (1, 0, 0)
    nobody, two = cells.copy(), cells.copy()
    nobody[nobody[..., 0] == 10] = (1, 0, 0)
    two[tuple(np.argwhere(cells[..., 0] == 1)[0])] = (10, 0, 3)
    for wrong, complaint in (
        (ball, "column 3, row 4 stands in no room"),
        (cells[:7], "wanted uint8"),
        (cells.astype(int), "int64"),
        (hole, "no wall"),
        (nobody, "0 agents in the room, wanted one"),
        (two, "2 agents in the room, wanted one"),
    ):
        with pytest.raises(ValueError, match=complaint):
            to_frame(wrong)


# --- the world -----------------------------------------------------------------------------------------------------


def test_the_world_is_a_stream_of_the_models_own_frames() -> None:
    made = model()
    made.head.bias.data[WITH_KEY] += 50  # what belongs in the corner, wanted everywhere
    world = RoomWorld(made, tile=8)
    assert isinstance(world, PlayableWorld)
    first = world.reset(seed=11)
    env = room()
    env.reset(seed=11)
    assert np.array_equal(first.observation["image"], to_cells(frame_of(env)))
    assert first.frames.shape == (1, 64, 64, 3)
    frame, cache = torch.from_numpy(frame_of(env)), made.init_cache(1)
    corner = torch.arange(SYMBOLS) >= 11
    with torch.no_grad():
        for action in (FORWARD, TOGGLE, 0, 1, WAIT):
            logits = made(frame[None, None], torch.tensor([[action]]), cache=cache)[0, 0]
            frame = logits.masked_fill(corner, -torch.inf).argmax(-1)
            frame[0] = logits[0].masked_fill(~corner, -torch.inf).argmax()
            if frame[0] == AT_GOAL:
                break
            step = world.step(action)
            assert np.array_equal(step.observation["image"], to_cells(frame.numpy()))
            assert world.observation_space.contains(step.observation)


def test_a_seed_repeats_what_is_drawn_and_another_does_not() -> None:
    world = RoomWorld(model(), tile=4, sampler=SamplerConfig(temperature=1.0))

    def played(seed: int) -> list[np.ndarray]:
        world.reset(seed=seed, options={"image": to_cells(start)})
        shown = []
        for _ in range(3):
            step = world.step(WAIT)
            shown.append(step.frames)
            if step.terminated:
                break
        return shown

    env = room()
    env.reset(seed=0)
    start = frame_of(env)
    once, again, other = played(5), played(5), played(6)
    assert all(map(np.array_equal, once, again))
    assert not all(map(np.array_equal, once, other))


def test_every_cell_and_every_step_draws_for_itself() -> None:
    made = model()
    torch.nn.init.zeros_(made.head.weight)
    torch.nn.init.zeros_(made.head.bias)
    made.head.bias.data[AT_GOAL] = -50
    world = RoomWorld(made, tile=4, sampler=SamplerConfig(temperature=1.0))
    world.reset(seed=0)
    drawn = np.stack([world.step(WAIT).observation["image"][..., 0].reshape(-1)[1:] for _ in range(8)])
    assert len(np.unique(drawn, axis=0)) == 8
    assert len(np.unique(drawn, axis=1)) > 3


def test_what_does_not_fit_leaves_the_world_as_it_was() -> None:
    world = RoomWorld(model(), tile=4)
    with pytest.raises(ValueError, match="call reset first"):
        world.step(0)
    before = world.reset(seed=1).observation
    for options, complaint in (
        ({"picture": 1}, "there is only 'image'"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "stands in no room"),
    ):
        with pytest.raises(ValueError, match=complaint):
            world.reset(seed=2, options=options)
    with pytest.raises(ValueError, match="seed -1"):
        world.reset(seed=-1)
    with pytest.raises(ValueError, match="action 7"):
        world.step(7)
    one = world.step(FORWARD)
    world.reset(seed=1)
    assert np.array_equal(world.step(FORWARD).observation["image"], one.observation["image"])
    assert before["image"].shape == (8, 8, 3)
    with pytest.raises(ValueError, match="tiles of 0 pixels"):
        RoomWorld(model(), tile=0)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"repetition_penalty": 1.3}, "RoomWorld: repetition, frequency and presence penalties"),
        ({"banned_tokens": (99,)}, r"banned_tokens has ids \[99\]"),
        ({"banned_tokens": (11, 12, 13)}, r"all symbols of the corner, 11 \.\. 13, are banned"),
        ({"banned_tokens": tuple(range(11))}, r"all symbols of a cell, 0 \.\. 10, are banned"),
    ],
)
def test_a_sampler_that_cannot_choose_symbols_is_refused_at_once(settings: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RoomWorld(model(), sampler=SamplerConfig(**settings))
    world = RoomWorld(model(), tile=4)
    world.reset(seed=1)
    wanted = world.step(FORWARD).observation["image"]
    world.reset(seed=1)
    fit, world.sampler = world.sampler, SamplerConfig(**settings)
    with pytest.raises(ValueError, match=complaint):
        world.reset(seed=2)
    world.sampler = fit
    assert np.array_equal(world.step(FORWARD).observation["image"], wanted)  # the room of before


def test_a_model_of_nan_is_told_and_leaves_no_room() -> None:
    broken = model()
    world = RoomWorld(broken, tile=4)
    world.reset(seed=1)
    torch.nn.init.constant_(broken.head.bias, torch.nan)
    with pytest.raises(ValueError, match="column 0, row 0 has nothing to choose from: the model gave it NaN"):
        world.step(FORWARD)
    with pytest.raises(ValueError, match="no room yet; call reset first"):
        world.step(FORWARD)


def test_it_plays_as_an_environment() -> None:
    env = WorldModelEnv(RoomWorld(model(), tile=4), horizon=3, render_mode="rgb_array")
    env.reset(seed=0)
    for _ in range(3):
        *_, terminated, truncated, info = env.step(WAIT)
        assert [frame.shape for frame in info["frames"]] == [(32, 32, 3)]
        if terminated or truncated:
            break
    assert env.world.action_of(["x", "up", "left"]) == 0  # type: ignore[attr-defined]
    assert env.world.action_of([]) == WAIT  # type: ignore[attr-defined]


def test_drift_is_counted_step_by_step() -> None:
    """Against a loop over single episodes."""
    made = model()
    played = explore(3, 6, seed=0, goals=0.0)
    frames, actions = map(torch.from_numpy, played)
    found = drift(made, frames, actions)
    with torch.no_grad():
        own, right = frames[:, 0], torch.zeros(6, dtype=torch.float64)
        history = [own]
        for step in range(6):
            shown = torch.stack(history, 1)
            logits = made(shown, actions[:, : step + 1])[:, -1]
            history.append(logits.argmax(-1))
            right[step] = (history[-1] == frames[:, step + 1]).double().mean()
        told = made(frames[:, :-1], actions).argmax(-1) == frames[:, 1:]
    assert torch.allclose(found.free_cells, right)
    assert torch.allclose(found.told_cells, told.double().mean((0, 2)))
    assert torch.allclose(found.told_frames, told.all(2).double().mean(0))
