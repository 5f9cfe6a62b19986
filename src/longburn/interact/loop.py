"""The loop: an agent plays B environments at once, and every row of its caches is one environment's episode."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longburn.interact.environments import Flags, Rows, Tick, rows_of
from longburn.interact.protocols import Agent, Sampler
from longburn.interact.samplers import seeds_by_row
from longburn.sampling import SamplerConfig

if TYPE_CHECKING:
    from gymnasium import Env
    from gymnasium.vector import VectorEnv


@dataclass(frozen=True)
class Episode:
    """An episode that has ended.

    Args:
        row: where it was played.
        number: of the row's episodes, from 0.
        steps: actions taken.
        reward: their sum.
        terminated, truncated: how it ended.
    """

    row: int
    number: int
    steps: int
    reward: float
    terminated: bool
    truncated: bool


@dataclass(frozen=True)
class Turn:
    """One step of all rows.

    Args:
        observations: what was acted upon, in the form of a vector environment.
        tokens: of the actions, `[B, k]`.
        actions: as the environment got them.
        acted: rows whose action was taken; of the others only a reset was seen.
        rewards, terminated, truncated: what came of it.
        info: as the environment gives it. Where this loop resets an ended row itself (one environment, or autoreset
            DISABLED), the last step's is under "final_info" and the observation that it ended with under "final_obs":
            of one environment as that gave it, of several an array of objects, None in rows that go on.
        ended: the episodes that ended with it.
        seconds: the agent's time, from observations to actions.
    """

    observations: Any
    tokens: Tensor
    actions: Any
    acted: Flags
    rewards: NDArray[np.float64]
    terminated: Flags
    truncated: Flags
    info: dict[str, Any]
    ended: tuple[Episode, ...]
    seconds: float


def rollout(
    agent: Agent,
    env: "Env[Any, Any] | VectorEnv[Any, Any, Any]",
    *,
    steps: int | None = None,
    seed: int | None = None,
    sampler: SamplerConfig | Sampler | None = None,
    max_length: int | None = None,
) -> Iterator[Turn]:
    """Let an agent act, step after step.

    A step costs the model its new tokens: the last action's and the observation's. A row's cache is cleared when the
    first observation of a new episode comes, and then only. In an environment that resets in the step after an end
    (autoreset NEXT_STEP) that step's action is ignored, so the row's model does not choose one.

    Args:
        agent: its codec must be of the environment's action space, and its encoder, if it has a `space`, of the
            observation space.
        env: a gymnasium environment or vector environment, in any autoreset mode.
        steps: of every row; None goes on until the caller stops.
        seed: of the environment (row b gets seed + b); None leaves its randomness as it is.
        sampler: settings (row b draws with their seed + b), or a sampler of its own. Default: draw from the model's
            distribution, with `seed` if there is one.
        max_length: most positions of an episode, for models whose caches would grow; None for no end.

    Raises:
        ValueError: before anything is reset, spaces and settings that do not go together; at the first step, an
            encoder or head that gives another shape than the model and the codec take.
        ImportError: gymnasium is not installed.
    """
    rows = rows_of(env)
    if agent.codec.space != rows.action_space:
        raise ValueError(
            f"rollout: the environment's actions are {rows.action_space}, the codec's {agent.codec.space}; "
            "make the codec for this environment"
        )
    read = getattr(agent.encoder, "space", rows.observation_space)
    if read != rows.observation_space:
        raise ValueError(
            f"rollout: the environment's observations are {rows.observation_space}, the encoder's {read}; "
            "make the encoder for this environment"
        )
    if steps is not None and steps < 0:
        raise ValueError(f"rollout: {steps} steps, wanted at least 0, or None")
    if sampler is None:
        sampler = SamplerConfig(seed=seed)
    return _turns(rows, _Player(agent, rows.batch, sampler, max_length), steps, seed)


def evaluate(
    agent: Agent,
    env: "Env[Any, Any] | VectorEnv[Any, Any, Any]",
    *,
    episodes: int,
    seed: int | None = None,
    sampler: SamplerConfig | Sampler | None = None,
    max_length: int | None = None,
) -> list[Episode]:
    """Play whole episodes: the first `episodes / B` of every row, rounded up.

    So long episodes count as much as short ones, which come to an end more often in rows that run at once.

    Args:
        episodes: in all, at least 1.
        agent, env, seed, sampler, max_length: as of `rollout`.
    """
    if episodes < 1:
        raise ValueError(f"evaluate: {episodes} episodes, wanted at least 1")
    batch = rows_of(env).batch
    share = -(-episodes // batch)
    played: list[Episode] = []
    for turn in rollout(agent, env, seed=seed, sampler=sampler, max_length=max_length):
        played += [episode for episode in turn.ended if episode.number < share]
        if len(played) == share * batch:
            break
    return sorted(played, key=lambda episode: (episode.row, episode.number))


def _turns(rows: Rows, player: "_Player", steps: int | None, seed: int | None) -> Iterator[Turn]:
    tick = rows.reset(seed)
    tallies = [_Tally(row) for row in range(rows.batch)]
    done = 0
    while steps is None or done < steps:
        began = time.perf_counter()
        tokens = player.act(tick)
        actions = player.agent.codec.action(tokens)
        seconds = time.perf_counter() - began
        seen, tick = tick.observations, rows.step(actions)
        ended = tuple(episode for tally in tallies if (episode := tally.count(tick)) is not None)
        results = tick.acted, tick.rewards, tick.terminated, tick.truncated, tick.info
        yield Turn(seen, tokens, actions, *results, ended, seconds)
        done += 1


class _Player:
    """The agent with its caches, for so many rows."""

    def __init__(self, agent: Agent, batch: int, sampler: SamplerConfig | Sampler, max_length: int | None) -> None:
        self.agent = agent
        self._cache = agent.model.init_cache(batch, max_length=max_length)
        device = self._cache.device
        if isinstance(sampler, SamplerConfig):
            sampler = agent.codec.sampler(seeds_by_row(sampler, batch), device)
        self._sampler = sampler
        self._draws = torch.zeros(batch, dtype=torch.int64)
        self._unread: Tensor | None = None  # the last token of every row's last action, [B, 1]
        self._heard = torch.zeros(batch, dtype=torch.bool)  # rows that have such a token
        self._idle = agent.codec.idle(batch)

    @torch.no_grad()
    def act(self, tick: Tick) -> Tensor:
        """The tokens `[B, k]` of the rows' next actions, on the host; of rows that wait, those of some action."""
        begins, here = torch.from_numpy(tick.begins), torch.from_numpy(~tick.waits)
        if tick.begins.any():
            self._cache.reset(begins.nonzero()[:, 0].tolist())
            self._heard &= ~begins
        if not bool(here.any()):
            return self._idle
        tokens = self._choose(self._read(tick.observations, here), here)
        wrong = ~tokens.isfinite() if tokens.is_floating_point() else tokens < 0
        wrong = wrong.reshape(len(here), -1).any(1) & here
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            why = "its means or deviations are not finite" if tokens.is_floating_point() else "all are NaN or -inf"
            raise ValueError(
                f"rollout: row {row} has no action by its logits: {why}; "
                f"its observation is {_told(tick.observations, row)}"
            )
        return torch.where(here.view(-1, *[1] * (tokens.dim() - 1)), tokens, self._idle)

    def _read(self, observations: Any, here: Tensor) -> Tensor:
        """Features `[B, M]` after the observations of the rows that are here."""
        model = self.agent.model
        x = self.agent.encoder.encode(observations)
        if x.dim() == 2:
            x = model.embed(x)
        if len(x) != len(here) or x.dim() != 3:
            raise ValueError(
                f"rollout: the encoder gave {list(x.shape)} for {len(here)} rows, wanted [B, n, D], or ids [B, n]"
            )
        present = here[:, None].expand(-1, x.shape[1])
        if self._unread is not None and bool((heard := self._heard & here).any()):
            x = torch.cat([model.embed(self._unread).to(x.dtype), x], 1)
            present = torch.cat([heard[:, None], present], 1)
        return self._features(x, present)

    def _features(self, x: Tensor, present: Tensor) -> Tensor:
        step = self._cache.positions(torch.where(present, 0, -1))
        features = self.agent.model.features(x, step, self._cache)
        self._cache.advance(step)
        return features[:, -1]

    def _choose(self, hidden: Tensor, here: Tensor) -> Tensor:
        """Tokens `[B, k]` on the host, one after the other; all but the last are read at once."""
        agent, tokens = self.agent, list[Tensor]()
        for index in range(agent.codec.length):
            logits = agent.head.logits(hidden)
            if logits.shape != (len(here), agent.codec.width):
                raise ValueError(
                    f"rollout: the head gave {list(logits.shape)}, wanted [{len(here)}, {agent.codec.width}]: "
                    "a row each, and the width of the codec"
                )
            token = self._sampler(agent.codec.restrict(logits, index), self._draws.to(logits.device))
            self._draws = self._draws + here
            tokens.append(token)
            self._unread = _readable(token)[:, None]
            if index + 1 < agent.codec.length:
                hidden = self._features(agent.model.embed(self._unread), here[:, None])
        self._heard = self._heard | here
        return torch.stack(tokens, 1).cpu()


def _told(observations: Any, row: int) -> str:
    """One row's observation in one line."""
    if isinstance(observations, dict):
        return ", ".join(f"{key}: {_told(part, row)}" for key, part in observations.items())
    if isinstance(observations, tuple):
        return ", ".join(_told(part, row) for part in observations)
    return " ".join(str(observations[row]).split())[:80]


def _readable(token: Tensor) -> Tensor:
    """A token that can be embedded, also where there was nothing to choose from."""
    return token.nan_to_num() if token.is_floating_point() else token.clamp_min(0)


class _Tally:
    """Counts one row's episodes."""

    def __init__(self, row: int) -> None:
        self._row, self._number, self._steps, self._reward = row, 0, 0, 0.0

    def count(self, tick: Tick) -> Episode | None:
        """The episode that ended with this step, if one did."""
        row = self._row
        if not tick.acted[row]:
            return None
        self._steps += 1
        self._reward += float(tick.rewards[row])
        terminated, truncated = bool(tick.terminated[row]), bool(tick.truncated[row])
        if not (terminated or truncated):
            return None
        episode = Episode(row, self._number, self._steps, self._reward, terminated, truncated)
        self._number, self._steps, self._reward = self._number + 1, 0, 0.0
        return episode
