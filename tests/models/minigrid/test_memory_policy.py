"""The policy: streams are whole passes, windows bound what can tell on an action, bad input is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from longburn.cache import AttnWindow
from longburn.interact import Agent, Head, ObservationEncoder, StreamingModel, rollout
from longburn.models.minigrid import MemoryEncoder, MemoryPolicy, PolicyConfig, memory_agent, memory_task, window
from longburn.models.minigrid.policy import FULL, SINK_STEPS, STEP
from longburn.sampling import SamplerConfig

SMALL = PolicyConfig(dim=24, heads=3, hidden=40, layers=2, cell=4)
T = 61


@pytest.fixture(scope="module")
def policy() -> MemoryPolicy:
    torch.manual_seed(0)
    made = MemoryPolicy(SMALL)
    for parameter in made.parameters():  # far from where training starts, so that every part shows
        torch.nn.init.normal_(parameter, std=0.4)
    return made.eval()


def episodes(batch: int, steps: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    views = torch.randint(4, (batch, steps, 7, 7, 3), generator=generator, dtype=torch.uint8)
    return views, *(torch.randint(n, (batch, steps), generator=generator) for n in (4, 7))


@torch.no_grad()
@pytest.mark.parametrize("way", [FULL, window(5, sinks=False), window(5, sinks=True), AttnWindow(7, sink_tokens=3)])
def test_a_stream_gives_what_a_whole_pass_gives(policy: MemoryPolicy, way: AttnWindow) -> None:
    views, directions, taken = episodes(2, T)
    policy.window = way
    whole = policy(views, directions, taken)
    cache = policy.init_cache(2)
    for at in range(T):
        x = policy.observe(views[:, at : at + 1], directions[:, at : at + 1])
        if at:
            x = torch.cat([policy.embed(taken[:, at - 1 : at]), x], 1)
        step = cache.positions(x.shape[1])
        logits = policy.logits(policy.features(x, step, cache)[:, -1])
        cache.advance(step)
        assert (logits - whole[:, at]).abs().max() < 1e-4 * whole.abs().max()
    if way.size is not None:
        held = cache.nbytes
        assert policy.init_cache(2).nbytes == held  # nothing has grown


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
def test_nothing_beyond_its_reach_tells_on_an_action(layers: int) -> None:
    torch.manual_seed(layers)
    policy = MemoryPolicy(replace(SMALL, layers=layers), window=window(5, sinks=False))
    assert policy.reach == layers * (5 * STEP - 1)
    views, directions, taken = episodes(1, T)
    before = policy(views, directions, taken)
    views[:, 0] = 3 - views[:, 0]  # another first step
    changed = (policy(views, directions, taken) - before).abs().amax((0, 2)) > 1e-6
    steps_back = policy.reach // STEP
    assert changed[: steps_back + 1].any()
    assert not changed[steps_back + 1 :].any()
    policy.window = window(5, sinks=True)  # now it tells for ever
    assert (policy(*episodes(1, T))[0, -1] - policy(views, directions, taken)[0, -1]).abs().max() > 1e-6


def test_it_is_what_the_loop_asks_for(policy: MemoryPolicy) -> None:
    assert isinstance(policy, StreamingModel)
    assert isinstance(policy, Head)
    assert isinstance(MemoryEncoder(policy), ObservationEncoder)
    assert isinstance(memory_agent(policy), Agent)


def test_the_loop_gives_the_actions_of_a_whole_pass(policy: MemoryPolicy) -> None:
    policy.window = window(5, sinks=True)
    turns = list(rollout(memory_agent(policy), memory_task(13), steps=40, seed=3, sampler=SamplerConfig(temperature=0)))
    ends = [at for at, turn in enumerate(turns) if turn.ended]
    turns = turns[: ends[0] + 1] if ends else turns
    views, directions = (
        torch.from_numpy(np.stack([np.asarray(turn.observations[name]) for turn in turns], 1)).long()
        for name in ("image", "direction")
    )
    taken = torch.tensor([[int(np.asarray(turn.actions).item()) for turn in turns]])
    with torch.no_grad():
        assert torch.equal(policy(views, directions, taken).argmax(-1), taken)


@pytest.mark.parametrize(
    ("observation", "complaint"),
    [
        ({"image": np.zeros((1, 7, 7, 3), np.uint8)}, "'image' and 'direction'"),
        (np.zeros((1, 7, 7, 3), np.uint8), "'image' and 'direction'"),
        ({"image": np.zeros((1, 5, 5, 3), np.uint8), "direction": [0]}, r"\(1, 7, 7, 3\)"),
        ({"image": np.zeros((2, 7, 7, 3), np.uint8), "direction": [0]}, r"wanted uint8 \(1, 7, 7, 3\)"),
        ({"image": np.zeros((1, 7, 7, 3)), "direction": [0]}, "float64"),
        ({"image": np.full((1, 7, 7, 3), 255, np.uint8), "direction": [0]}, "objects up to 255"),
        ({"image": np.full((1, 7, 7, 3), (11, 0, 0), np.uint8), "direction": [0]}, "objects up to 11"),
        ({"image": np.full((1, 7, 7, 3), (0, 6, 0), np.uint8), "direction": [0]}, "colours up to 6"),
        ({"image": np.full((1, 7, 7, 3), (0, 0, 4), np.uint8), "direction": [0]}, "states up to 4"),
        ({"image": np.zeros((1, 7, 7, 3), np.uint8), "direction": [4]}, r"directions \[4\]"),
        ({"image": np.zeros((1, 7, 7, 3), np.uint8), "direction": [-1]}, r"directions \[-1\]"),
    ],
)
def test_observations_of_another_environment_are_refused(
    policy: MemoryPolicy, observation: object, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        MemoryEncoder(policy).encode(observation)


def test_a_window_with_sinks_keeps_the_first_steps() -> None:
    assert window(5, sinks=True) == AttnWindow(5 * STEP, sink_tokens=SINK_STEPS * STEP, relative_sinks=True)
    with pytest.raises(ValueError, match="at least 1"):
        window(0, sinks=False)
