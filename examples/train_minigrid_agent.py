"""Train a policy on MiniGrid's memory task by imitation of somebody who sees the whole map.

    python examples/train_minigrid_agent.py prepare              episodes of the expert (minutes on one CPU core)
    python examples/train_minigrid_agent.py train --out results  one GPU; --device cpu --batch 8 for two CPU cores
    python examples/train_minigrid_agent.py export results       into the package

Without a command it rehearses all of it in seconds; the figures then say nothing.

The same weights are trained under several windows in turn: the whole past, a window, a window and the kept first steps.
So none of these is new to them in a test, and what a window without the first steps gets wrong it could not have known.
Actions alone teach too little: one of a hundred depends on the memory, and on what is in view besides. So in training
the features are asked at every step what stood in the first room; the shipped policy has nothing of this question.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from longburn.cache import AttnWindow
from longburn.models.minigrid.cells import FORWARD, NORTH, SOUTH, VIEW
from longburn.models.minigrid.policy import FULL, MemoryPolicy, PolicyConfig, window
from longburn.models.minigrid.tasks import Expert, first_object, hallway_end, memory_task
from minigrid_training.fitting import Schedule, describe, fit, save
from minigrid_training.fitting import export as export_files

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "build" / "minigrid" / "agent.npz"
PACKAGE_DATA = ROOT / "src" / "longburn" / "models" / "data" / "minigrid_agent"
LENGTHS = (
    32,
    192,
)  # steps of an episode that are learnt from: of those that are no longer than the first, and of others
ENDING, WEIGHT = 4, 8.0  # the last steps of an episode, where memory tells, and how much more they count
NOISE = 0.05  # share of steps at which the expert stumbles, so that the policy learns to go on from there
WINDOWS = (FULL, window(16, sinks=False), window(16, sinks=True), window(5, sinks=False), window(5, sinks=True))
CARD = """# A policy for MiniGrid's memory task

{parameters:,} parameters, two tokens a step, trained by `examples/train_minigrid_agent.py` in {minutes:.1f} minutes on
one {device} by imitation of a scripted expert (`longburn.models.minigrid.tasks.Expert`).

- Licence of the weights: Apache-2.0 (`LICENSE`).
- Data: {episodes:,} episodes of the expert in MiniGrid {minigrid} (seeds from {seed} on); nothing else was learnt from.
- Training log: `log.json`. Figures: `docs/benchmarks.md`.
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Episodes = Annotated[Path, typer.Option(help="Where `prepare` puts the episodes, and `train` finds them.")]


@dataclass(frozen=True)
class Dataset:
    """Episodes end to end: views `[N, 7, 7, 3]`; directions, the expert's actions, those taken `[N]`; of every
    episode its length and whether the object of the first room is a key (else a ball)."""

    views: NDArray[np.uint8]
    directions: NDArray[np.uint8]
    actions: NDArray[np.uint8]
    taken: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    keys: NDArray[np.bool_]

    def padded(self, rows: NDArray[np.int64], length: int) -> tuple[Tensor, ...]:
        """These episodes, cut or filled up to `length`: views `[E, length, 7, 7, 3]`; directions, actions taken, the
        expert's `[E, length]` (-100 after the end); keys `[E]`."""
        starts = np.cumsum(self.lengths) - self.lengths
        views = np.zeros((len(rows), length, VIEW, VIEW, 3), dtype=np.uint8)
        directions, taken = np.zeros((2, len(rows), length), dtype=np.uint8)
        actions = np.full((len(rows), length), -100, dtype=np.int64)
        for at, row in enumerate(rows):
            kept = min(int(self.lengths[row]), length)
            part = slice(starts[row], starts[row] + kept)
            views[at, :kept], directions[at, :kept] = self.views[part], self.directions[part]
            taken[at, :kept], actions[at, :kept] = self.taken[part], self.actions[part]
        return tuple(map(torch.from_numpy, (views, directions, taken, actions, self.keys[rows])))


def tasks(rng: np.random.Generator) -> Iterator[Any]:
    """Environments to learn from, one after the other."""
    while True:
        kind = rng.random()
        if kind < 0.3:
            yield memory_task(13)
        elif kind < 0.45:
            yield memory_task(17, random_length=True)
        elif kind < 0.6:
            yield memory_task(13, gate=int(rng.integers(16, 161)))
        else:
            yield memory_task(17, gate=int(rng.integers(16, 161)))


def gather(episodes: int, seed: int) -> Dataset:
    """What the expert sees and does."""
    rng = np.random.default_rng(seed)
    views, directions, actions, taken, lengths, keys = [], [], [], [], [], []
    for number, env in zip(range(episodes), tasks(rng), strict=False):
        seen, _ = env.reset(seed=seed + number)
        expert, ended, before = Expert(env, rng), False, len(actions)
        while not ended:
            action = expert.action()
            views.append(seen["image"])
            directions.append(seen["direction"])
            actions.append(action)
            taken.append(stumble(env.unwrapped, action, rng))
            seen, _, terminated, truncated, _ = env.step(taken[-1])
            ended = terminated or truncated
        lengths.append(len(actions) - before)
        keys.append(env.unwrapped.grid.get(*first_object(env)).type == "key")
    columns = (np.array(column, np.uint8) for column in (directions, actions, taken))
    return Dataset(np.stack(views), *columns, np.array(lengths), np.array(keys))


def stumble(env: Any, action: int, rng: np.random.Generator) -> int:
    """The action, or now and then another that does not end the episode."""
    if rng.random() >= NOISE:
        return action
    at_the_ends = env.agent_pos[0] == hallway_end(env) + 1 and env.agent_dir in (NORTH, SOUTH)
    return int(rng.integers(FORWARD if at_the_ends else FORWARD + 1))


@app.command()
def prepare(
    data: Episodes = DATA,
    episodes: Annotated[int, typer.Option(min=1)] = 6000,
    seed: Annotated[int, typer.Option(min=0, help="Tests use seeds below 100000.")] = 1_000_000,
) -> None:
    """Let the expert play, and write down what it saw and did."""
    from importlib.metadata import version

    began = time.perf_counter()
    made = gather(episodes, seed)
    data.parent.mkdir(parents=True, exist_ok=True)
    origin = json.dumps({"episodes": episodes, "seed": seed, "minigrid": version("minigrid")})
    np.savez_compressed(data, origin=origin, **vars(made))
    size, seconds = data.stat().st_size / 1e6, time.perf_counter() - began
    print(f"{data}: {episodes:,} episodes, {len(made.actions):,} steps, {size:.1f} MB, {seconds:.0f} s")


def learn(
    config: PolicyConfig, dataset: Dataset, schedule: Schedule, batch: int, device: torch.device, seed: int
) -> tuple[MemoryPolicy, dict[str, Any]]:
    """A trained policy, and the log of its training."""
    torch.manual_seed(seed)
    policy, question = MemoryPolicy(config).to(device), nn.Linear(config.dim, 2, device=device)
    short = dataset.lengths <= LENGTHS[0]
    kinds = [
        [x.to(device) for x in dataset.padded(np.flatnonzero(rows), length)]
        for rows, length in zip((short, ~short), LENGTHS, strict=True)
        if rows.any()
    ]
    held = [max(1, len(episodes[0]) // 20) for episodes in kinds]  # the last ones are not learnt from
    generator = torch.Generator().manual_seed(seed)

    def loss_of(step: int) -> Tensor:
        policy.window = WINDOWS[step % len(WINDOWS)]
        episodes, tests = kinds[step % len(kinds)], held[step % len(kinds)]
        count = batch * LENGTHS[-1] // episodes[0].shape[1]  # as many steps of an episode in either kind
        rows = torch.randint(max(1, len(episodes[0]) - tests), (count,), generator=generator).to(device)
        return sum(losses(policy, question, *(x[rows] for x in episodes)), torch.zeros((), device=device))

    log = fit(nn.ModuleList([policy, question]), loss_of, schedule)
    tested = {}
    for way in WINDOWS:
        policy.window = way
        with torch.no_grad():
            pair = losses(policy, question, *(x[-held[-1] :] for x in kinds[-1]))
        tested[_named(way)] = dict(zip(("imitation", "memory"), (round(float(loss), 5) for loss in pair), strict=True))
    log |= {"parameters": sum(p.numel() for p in policy.parameters()), "seed": seed, "held_out_loss": tested}
    return policy, log | describe(device)


def losses(
    policy: MemoryPolicy,
    question: nn.Module,
    views: Tensor,
    directions: Tensor,
    taken: Tensor,
    actions: Tensor,
    keys: Tensor,
) -> tuple[Tensor, Tensor]:
    """Nats an action of the expert, and an answer to what stood in the first room, under the policy's window."""
    hidden = policy.hidden(views, directions, taken)
    there = actions >= 0
    left = there.flip(1).cumsum(1).flip(1)  # steps to the end, this one counted
    weights = there * torch.where(left <= ENDING, WEIGHT, 1.0)
    answers = keys.long()[:, None].expand_as(actions)
    pairs = (policy.logits(hidden), actions), (question(hidden), answers.where(there, -100))
    nats = [
        F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(actions)
        for logits, wanted in pairs
    ]
    imitation, memory = ((each * weights).sum() / weights.sum() for each in nats)
    return imitation, memory


def _named(way: AttnWindow) -> str:
    return "full" if way.size is None else f"{way.size}" + (f" + {way.sink_tokens}" if way.sink_tokens else "")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Where weights and log go.")],
    data: Episodes = DATA,
    steps: Annotated[int, typer.Option(min=1)] = 6000,
    seconds: Annotated[float, typer.Option(min=1)] = 480.0,
    batch: Annotated[int, typer.Option(min=1, help="Long episodes in a step, or as many steps of short ones.")] = 64,
    learning_rate: Annotated[float, typer.Option(min=0)] = 2e-3,
    device: Annotated[str, typer.Option()] = "cuda",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train, and write weights, sizes and log."""
    torch.set_float32_matmul_precision("high")
    held = np.load(data)
    dataset = Dataset(**{field.name: held[field.name] for field in fields(Dataset)})
    schedule = Schedule(steps, seconds, learning_rate)
    policy, log = learn(PolicyConfig(), dataset, schedule, batch, torch.device(device), seed)
    save(policy, policy.config.to_dict(), log | {"data": json.loads(str(held["origin"]))}, out)
    print(json.dumps({key: value for key, value in log.items() if key != "training_loss"}))


@app.command()
def export(
    results: Annotated[Path, typer.Argument(help="The --out of `train`.")],
    target: Annotated[Path, typer.Option(help="The directory that is made.")] = PACKAGE_DATA,
) -> None:
    """Put the trained policy into the package."""
    log = json.loads((results / "log.json").read_text(encoding="utf-8"))
    card = CARD.format(
        minutes=log["seconds"] / 60, **{"parameters": log["parameters"], "device": log["device"]}, **log["data"]
    )
    print(f"{target}: {export_files(results, target, ROOT / 'LICENSE', card):,} bytes")


@app.callback(invoke_without_command=True, help=__doc__)
def main(context: typer.Context) -> None:
    """Rehearse when there is no command."""
    if context.invoked_subcommand is None:
        with tempfile.TemporaryDirectory() as scratch:
            data, out, target = (Path(scratch) / name for name in ("agent.npz", "results", "shipped"))
            prepare(data, episodes=20)
            train(out, data, steps=5, batch=1, device="cpu")
            export(out, target)


if __name__ == "__main__":
    app()
