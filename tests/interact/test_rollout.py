"""The loop: streamed is whole, rows are alone, seeds decide, and every autoreset mode is what it says."""

import statistics

import gymnasium
import numpy as np
import pytest
import torch
from acting import DIM, Ledger, tiny_agent
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from longburn.cache import AttnWindow
from longburn.interact import Agent, EmbeddingEncoder, LinearEncoder, action_codec, evaluate, rollout
from longburn.sampling import SamplerConfig

ACTIONS = {
    "discrete": spaces.Discrete(4, start=-1),
    "multi-discrete": spaces.MultiDiscrete([3, 2, 4]),
    "multi-binary": spaces.MultiBinary(3),
    "box": spaces.Box(-2.0, 1.0, (2,)),
}
MODES = list(AutoresetMode)


def vector(rows: int, mode: AutoresetMode, actions: spaces.Space | None = None) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: Ledger(actions)] * rows, autoreset_mode=mode)


def agent_for(env: gymnasium.Env | SyncVectorEnv, window: AttnWindow | None = None) -> Agent:
    actions = getattr(env, "single_action_space", env.action_space)
    return tiny_agent(spaces.Discrete(11), actions, window)


@torch.no_grad()
def from_scratch(agent: Agent, observations: list[int], tokens: list[torch.Tensor]) -> torch.Tensor:
    """Logits of every token of an episode's actions, by the model without a cache: `[actions * k, V]`."""
    pieces, wanted = [], []
    for observation, action in zip(observations, tokens, strict=True):
        pieces.append(agent.encoder.encode(np.array([observation])))
        wanted += range(sum(p.shape[1] for p in pieces) - 1, sum(p.shape[1] for p in pieces) - 1 + len(action))
        pieces.append(agent.model.embed(action[None]))
    return agent.head.head.logits(agent.model.whole(torch.cat(pieces, 1))[0, wanted])


@pytest.mark.parametrize("window", [None, AttnWindow(5, sink_tokens=2)], ids=["full", "window"])
@pytest.mark.parametrize("kind", ACTIONS)
def test_streamed_is_encoded_from_scratch(kind: str, window: AttnWindow | None) -> None:
    env = Ledger(ACTIONS[kind], cycle=9)
    agent = agent_for(env, window)
    turns = rollout(agent, env, steps=30, seed=3)
    rounds = [(int(turn.observations[0]), turn.tokens[0], bool(turn.ended)) for turn in turns]
    k = agent.codec.length
    start, compared = 0, 0
    for end, (_, _, over) in enumerate(rounds, 1):
        if over:
            episode = rounds[start:end]
            wanted = from_scratch(agent, [o for o, _, _ in episode], [t for _, t, _ in episode])
            streamed = torch.cat(agent.head.seen[start * k : end * k])
            assert (streamed - wanted).abs().max() <= 1e-11 * wanted.abs().max()
            start, compared = end, compared + 1
    assert compared >= 4


def story(env: gymnasium.Env | SyncVectorEnv, agent: Agent, steps: int, seed: int) -> list[list[tuple]]:
    """What each row saw, did and got, of the steps whose action was taken."""
    rows: list[list[tuple]] = [[] for _ in range(getattr(env, "num_envs", 1))]
    for turn in rollout(agent, env, steps=steps, seed=seed, sampler=SamplerConfig(seed=100 + seed)):
        for row in np.flatnonzero(turn.acted):
            seen = turn.observations[row], turn.tokens[row].tolist(), turn.rewards[row]
            rows[row].append((*seen, bool(turn.terminated[row]), bool(turn.truncated[row])))
    return rows


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("kind", ["discrete", "multi-discrete", "box"])
def test_rows_are_alone(mode: AutoresetMode, kind: str) -> None:
    """A row of three, in any mode, is what the environment alone would be, ends and all."""
    env = vector(3, mode, ACTIONS[kind])
    together = story(env, agent_for(env), 40, seed=5)
    for row, seen in enumerate(together):
        single = Ledger(ACTIONS[kind])
        alone = story(single, agent_for(single), 40, seed=5 + row)[0]
        assert len(seen) >= 25
        assert seen == alone[: len(seen)]
    assert together[0] != together[1]


def test_the_same_seed_plays_the_same_and_another_does_not() -> None:
    env = vector(2, AutoresetMode.NEXT_STEP)
    agent = agent_for(env)
    first = story(env, agent, 30, seed=1)
    assert story(env, agent, 30, seed=1) == first
    assert story(env, agent, 30, seed=2) != first


def test_next_step_against_a_hand_written_oracle() -> None:
    """Episodes of 2, 3 and 4 steps; the step after each is a reset, for which nothing is chosen."""
    env = vector(1, AutoresetMode.NEXT_STEP)
    agent = agent_for(env)
    agent.model.fed.clear()
    turns = list(rollout(agent, env, steps=13, seed=0))
    #          episode of 2 | reset | episode of 3 | reset | episode of 4   | reset | of 2
    assert [bool(t.acted[0]) for t in turns] == [
        *([True] * 2 + [False]),
        *([True] * 3 + [False]),
        *([True] * 4 + [False]),
        True,
    ]
    assert [bool(t.terminated[0]) for t in turns] == [i in (1, 10) for i in range(13)]
    assert [bool(t.truncated[0]) for t in turns] == [i == 5 for i in range(13)]
    # What the model read: one observation at an episode's start, then the last action and the observation.
    assert [shape[1] for shape in agent.model.fed] == [1, 2, 1, 2, 2, 1, 2, 2, 2, 1]
    actions = [entry for entry in env.envs[0].log if entry != "reset"]
    assert actions == [int(t.actions[0]) for t in turns if t.acted[0]]
    assert env.envs[0].log.count("reset") == 4
    ended = [episode for turn in turns for episode in turn.ended]
    assert [(e.number, e.steps, e.reward, e.terminated, e.truncated) for e in ended] == [
        (0, 2, 3.0, True, False),
        (1, 3, 6.0, False, True),
        (2, 4, 10.0, True, False),
    ]


@pytest.mark.parametrize("mode", [*MODES, None], ids=lambda mode: getattr(mode, "name", "single"))
def test_a_row_is_cleared_when_its_new_episode_begins_and_only_then(mode: AutoresetMode | None) -> None:
    env = Ledger() if mode is None else vector(2, mode)
    agent = agent_for(env)
    cleared: list[tuple[int, list[int]]] = []
    lengths: list[tuple[int, ...]] = []
    turn_number = 0
    make = agent.model.init_cache

    def watched(batch: int, *, max_length: int | None = None):
        cache = make(batch, max_length=max_length)
        reset, advance = cache.reset, cache.advance

        def note(rows):
            cleared.append((turn_number, list(rows)))
            reset(rows)

        def after(step):
            advance(step)
            lengths.append(cache.row_positions)

        cache.reset, cache.advance = note, after
        return cache

    agent.model.init_cache = watched
    for turn in rollout(agent, env, steps=8, seed=0):
        turn_number += 1
        del turn
    # Episodes of 2, 3, 4 steps in row 0, of 3, 4, 2 in row 1. In NEXT_STEP a reset takes a step of its own.
    if mode is None:
        assert cleared == [(0, [0]), (2, [0]), (5, [0])]
    elif mode is AutoresetMode.NEXT_STEP:
        assert cleared == [(0, [0, 1]), (3, [0]), (4, [1]), (7, [0])]
    else:
        assert cleared == [(0, [0, 1]), (2, [0]), (3, [1]), (5, [0]), (7, [1])]
    assert max(max(at) for at in lengths) == (5 if mode is None else 7)  # four observations and three actions


def test_memory_and_work_of_a_step_do_not_grow() -> None:
    env = Ledger(never=True)
    agent = agent_for(env, AttnWindow(16, sink_tokens=2))
    caches = []
    make = agent.model.init_cache
    agent.model.init_cache = lambda batch, *, max_length=None: caches.append(make(batch)) or caches[-1]
    old = rollout(agent, env, seed=0)
    for _ in range(1000):
        next(old)
    before = caches[0].nbytes
    ages: dict[str, list[float]] = {"old": [], "young": []}
    agent.model.fed.clear()
    for _ in range(10):  # by turns, so that whatever else the machine does slows both
        young = rollout(agent, Ledger(never=True), seed=0)
        for _ in range(20):
            next(young)
        for _ in range(20):
            ages["young"].append(next(young).seconds)
            ages["old"].append(next(old).seconds)
    assert caches[0].nbytes == before
    assert caches[0].position == 2 * 1200 - 1
    assert set(agent.model.fed[3:]) <= {(1, 2, DIM), (1, 1, DIM)}
    assert statistics.median(ages["old"]) < 1.3 * statistics.median(ages["young"])


def test_the_last_step_of_an_episode_is_told_where_the_loop_resets() -> None:
    env = Ledger()
    told = [turn.info for turn in rollout(agent_for(env), env, steps=3, seed=0)]
    plain = Ledger()
    plain.reset(seed=0)
    at_the_end = [plain.step(action)[0] for action in env.log[1:3]][-1]
    assert told == [{"done": 1}, {"final_obs": at_the_end, "final_info": {"done": 2}}, {"done": 1}]
    rows = vector(2, AutoresetMode.DISABLED)
    last = list(rollout(agent_for(rows), rows, steps=2, seed=0))[-1]
    assert last.info["final_info"]["done"].tolist() == [2, 2]
    plain.reset(seed=0)
    at_the_end = [plain.step(action)[0] for action in rows.envs[0].log[1:3]][-1]
    assert last.info["final_obs"].tolist() == [at_the_end, None]  # the other row's episode goes on


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_what_was_acted_upon_outlives_an_environment_that_writes_over_it(mode: AutoresetMode) -> None:
    def played(copy: bool) -> list[list[int]]:
        env = SyncVectorEnv([Ledger] * 2, autoreset_mode=mode, copy=copy)
        return [turn.observations.tolist() for turn in rollout(agent_for(env), env, steps=12, seed=0)]

    assert played(copy=False) == played(copy=True)


def test_evaluate_counts_every_row_alike() -> None:
    env = vector(2, AutoresetMode.SAME_STEP)
    played = evaluate(agent_for(env), env, episodes=5, seed=0)
    assert [(e.row, e.number) for e in played] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [e.steps for e in played] == [2, 3, 4, 3, 4, 2]
    uneven = SyncVectorEnv([lambda: Ledger(cycle=9)] * 2)  # while row 0 plays 10 steps, row 1 plays 2, 3 and 4
    assert [(e.row, e.steps) for e in evaluate(agent_for(uneven), uneven, episodes=2, seed=8)] == [(0, 10), (1, 2)]
    with pytest.raises(ValueError, match="0 episodes, wanted at least 1"):
        evaluate(agent_for(env), env, episodes=0)


def test_what_does_not_go_together_is_refused_before_a_reset() -> None:
    env = Ledger()
    agent = agent_for(env)
    other = Agent(agent.encoder, agent.model, agent.head, action_codec(spaces.Discrete(5)))
    with pytest.raises(ValueError, match=r"actions are Discrete\(4\), the codec's Discrete\(5\)"):
        rollout(other, env)
    blind = Agent(EmbeddingEncoder(spaces.Discrete(9), DIM), agent.model, agent.head, agent.codec)
    with pytest.raises(ValueError, match=r"observations are Discrete\(11\), the encoder's Discrete\(9\)"):
        rollout(blind, env)
    with pytest.raises(ValueError, match="dict: wanted a gymnasium"):
        rollout(agent, {})
    with pytest.raises(ValueError, match="-1 steps"):
        rollout(agent, env, steps=-1)
    with pytest.raises(ValueError, match="penalties are of text"):
        rollout(agent, env, sampler=SamplerConfig(presence_penalty=1.0))
    silent = vector(1, AutoresetMode.SAME_STEP)
    del silent.metadata["autoreset_mode"]
    with pytest.raises(ValueError, match=r"metadata\['autoreset_mode'\] None"):
        rollout(agent, silent)
    assert env.log == []


def test_what_a_part_gives_wrongly_is_told() -> None:
    env = Ledger()
    agent = agent_for(env)

    class Wide:
        def logits(self, hidden):
            return hidden

    class Empty:
        def logits(self, hidden):
            return torch.full((len(hidden), 4), torch.nan)

    class Flat:
        def encode(self, observations):
            return torch.zeros(1)

    def run(encoder=agent.encoder, head=agent.head) -> None:
        next(rollout(Agent(encoder, agent.model, head, agent.codec), env, seed=0))

    with pytest.raises(ValueError, match=r"the head gave \[1, 32\], wanted \[1, 4\]"):
        run(head=Wide())
    with pytest.raises(ValueError, match=r"row 0 has no action by its logits: all are NaN or -inf; its observation is"):
        run(head=Empty())
    with pytest.raises(ValueError, match=r"the encoder gave \[1\] for 1 rows"):
        run(encoder=Flat())


@pytest.mark.parametrize("mode", [None, *MODES], ids=lambda mode: getattr(mode, "name", "single"))
def test_an_action_without_end_is_not_sent(mode: AutoresetMode | None) -> None:
    class Far:
        def logits(self, hidden):
            return torch.full((len(hidden), 4), 800.0)

    unbounded = spaces.Box(-np.inf, np.inf, (2,))
    env = Ledger(unbounded) if mode is None else vector(2, mode, unbounded)
    agent = agent_for(env)
    with pytest.raises(ValueError, match="row 0 has no action by its logits: its means or deviations are not finite"):
        next(rollout(Agent(agent.encoder, agent.model, Far(), agent.codec), env, seed=0))
    logs = [env.log] if mode is None else [row.log for row in env.envs]
    assert logs == [["reset"]] * len(logs)


def test_an_observation_of_nan_is_told() -> None:
    class Broken(Ledger):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(-1, 1, (2,))

        def _observation(self):
            return np.array([0.5, np.nan], np.float32)

    agent = agent_for(Ledger())
    torch.manual_seed(0)
    reads = Agent(LinearEncoder(Broken().observation_space, DIM).double(), agent.model, agent.head, agent.codec)
    with pytest.raises(ValueError, match=r"its observation is \[0.5 nan\]"):
        next(rollout(reads, Broken(), seed=0))
