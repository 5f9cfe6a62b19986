"""What is played: a world that keys act on, or an agent in its environment. Either shows frames, step by step."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from longburn.interact import Agent, PlayableWorld, Turn, WorldStep
    from longburn.sampling import SamplerConfig


class Shown(NamedTuple):
    """What came of one step: frames uint8 `[n, height, width, 3]`, a line about it, and the model's seconds."""

    frames: "NDArray[np.uint8]"
    caption: str
    seconds: float


class Stage(Protocol):
    """Something to watch.

    Attributes:
        size: height and width of the frames.
        fps: frames a second.
        controls: what each key does; none, if keys do nothing.
        turns: a step waits for a key, instead of going on without one.
    """

    size: tuple[int, int]
    fps: float
    controls: Mapping[str, str]
    turns: bool

    def begin(self) -> Shown:
        """The first frames."""
        ...

    def step(self, keys: Sequence[str]) -> Shown:
        """What follows these keys."""
        ...


class WorldStage:
    """A world model under a person's keys. After an end the next step begins anew, with the next seed.

    Args:
        world: what is played.
        seed: of the first episode.
        options: of every reset.
        turns: see `Stage`.
    """

    def __init__(
        self, world: "PlayableWorld", *, seed: int, options: Mapping[str, Any] | None = None, turns: bool
    ) -> None:
        self.world, self.turns = world, turns
        self.size, self.fps, self.controls = world.frame_size, world.fps, world.controls
        self._seed, self._options = seed, options
        self._episode = self._steps = 0
        self._ended = False

    def begin(self) -> Shown:
        """The first frames of an episode."""
        began = time.perf_counter()
        step = self.world.reset(seed=self._seed + self._episode, options=self._options)
        self._steps, self._ended = 0, False
        return self._shown(step, time.perf_counter() - began)

    def step(self, keys: Sequence[str]) -> Shown:
        """What follows these keys; after an end, the first frames of the next episode."""
        if self._ended:
            self._episode += 1
            return self.begin()
        began = time.perf_counter()
        step = self.world.step(self.world.action_of(keys))
        seconds = time.perf_counter() - began
        self._steps, self._ended = self._steps + 1, step.terminated
        return self._shown(step, seconds)

    def _shown(self, step: "WorldStep", seconds: float) -> Shown:
        caption = f"seed {self._seed + self._episode}, step {self._steps}, {1000 * seconds:.0f} ms"
        if step.reward:
            caption += f", reward {step.reward:g}"
        return Shown(step.frames, caption + (": the end, any key begins anew" if step.terminated else ""), seconds)


class AgentStage:
    """An agent in its environment.

    Args:
        agent: plays.
        env: one gymnasium environment with `render_mode="rgb_array"`.
        fps: at which it is shown.
        seed: of the environment.
        sampler: of the agent.
    """

    controls: Mapping[str, str] = {}
    turns = False

    def __init__(self, agent: "Agent", env: Any, *, fps: float, seed: int, sampler: "SamplerConfig") -> None:
        from gymnasium.wrappers import RenderCollection

        self.fps = fps
        self._agent, self._seed, self._sampler = agent, seed, sampler
        self._env: Any = RenderCollection(env, pop_frames=True, reset_clean=False)
        self._env.reset(seed=seed)
        height, width, _ = self._frames()[0].shape
        self.size = height, width
        self._steps = self._episodes = self._solved = 0

    def begin(self) -> Shown:
        """The first frame."""
        from longburn.interact import rollout

        self._turns: Iterator[Turn] = rollout(self._agent, self._env, seed=self._seed, sampler=self._sampler)
        self._env.reset(seed=self._seed)  # the loop does it again, and comes to the same frame
        return Shown(self._frames()[:1], f"seed {self._seed}", 0.0)

    def step(self, keys: Sequence[str]) -> Shown:
        """The agent's next action."""
        turn = next(self._turns)
        self._steps += 1
        for episode in turn.ended:
            self._episodes += 1
            self._solved += episode.reward > 0
        caption = (
            f"step {self._steps}, {self._solved} of {self._episodes} episodes solved, {1000 * turn.seconds:.1f} ms"
        )
        frames = self._frames()
        return Shown(frames[1:] if self._steps == 1 else frames, caption, turn.seconds)

    def _frames(self) -> "NDArray[np.uint8]":
        import numpy as np

        return np.stack(self._env.render())
