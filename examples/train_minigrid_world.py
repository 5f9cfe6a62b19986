"""Train a world model of a MiniGrid room: the next frame, given what is done in this one.

    python examples/train_minigrid_world.py prepare              episodes of an explorer (minutes on one CPU core)
    python examples/train_minigrid_world.py train --out results  one GPU; --device cpu --batch 6 --clip 5 without one
    python examples/train_minigrid_world.py export results       into the package

Without a command it rehearses all of it in seconds; the figures then say nothing.

A training clip is the first frame of an episode and a stretch of later ones, at the positions where they would stand in
a stream. So the model learns to use what it keeps of the beginning, however long ago that was.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from longburn.models.minigrid.cells import ACTIONS
from longburn.models.minigrid.measure import ENDED, Explored, drift, explore
from longburn.models.minigrid.rooms import CELLS, SYMBOLS
from longburn.models.minigrid.shipped import load_room
from longburn.models.minigrid.world import RoomConfig, RoomModel
from minigrid_training.fitting import Schedule, describe, fit, save
from minigrid_training.fitting import export as export_files

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "build" / "minigrid" / "world.npz"
PACKAGE_DATA = ROOT / "src" / "longburn" / "models" / "data" / "minigrid_world"
STEPS = 100  # of an episode
HARDEST = 4  # cells of a frame that count most: nearly all cells stay what they are, which is soon learnt
FARTHEST = 4096  # frames from the first one, in positions
CARD = """# A world model of a MiniGrid room

{parameters:,} parameters, trained by `examples/train_minigrid_world.py` in {minutes:.1f} minutes on one {device}. Given
a frame of `MiniGrid-DoorKey-8x8-v0` seen whole (64 symbols) and an action, it gives the next frame.

- Licence of the weights: Apache-2.0 (`LICENSE`).
- Data: {episodes:,} episodes of {steps} steps of a scripted explorer (`longburn.models.minigrid.rooms.Explorer`) in
  MiniGrid {minigrid} (seeds from {seed} on); nothing else was learnt from.
- Training log: `log.json`. Figures: `docs/benchmarks.md`.
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Episodes = Annotated[Path, typer.Option(help="Where `prepare` puts the episodes, and `train` finds them.")]


@app.command()
def prepare(
    data: Episodes = DATA,
    episodes: Annotated[int, typer.Option(min=1)] = 6000,
    seed: Annotated[int, typer.Option(min=0, help="Tests use seeds below 100000.")] = 1_000_000,
) -> None:
    """Let the explorer wander, and write down what was seen and done."""
    from importlib.metadata import version

    began = time.perf_counter()
    frames, actions = explore(episodes, STEPS, seed=seed, goals=0.3)
    data.parent.mkdir(parents=True, exist_ok=True)
    origin = {"episodes": episodes, "steps": STEPS, "seed": seed, "minigrid": version("minigrid")}
    np.savez_compressed(data, frames=frames, actions=actions, origin=json.dumps(origin))
    size = data.stat().st_size / 1e6
    print(f"{data}: {episodes:,} episodes, {size:.1f} MB, {time.perf_counter() - began:.0f} s")


class Clips:
    """Training clips, drawn on the host by a seed, cut out on the device.

    Args:
        frames, actions: episodes `[E, steps + 1, 64]` and `[E, steps]`.
        length: frames of a clip beside the first of its episode.
    """

    def __init__(self, frames: Tensor, actions: Tensor, length: int, seed: int) -> None:
        self.frames, self.actions, self.length = frames, actions, length
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frames `[B, 1 + length, 64]`, actions, token positions `[1, T]`, and the frames that follow.

        Clips of one batch are cut at the same time, so that one mask serves them all.
        """
        g, device = self.generator, self.frames.device
        row = torch.randint(len(self.frames), (batch, 1), generator=g).to(device)
        start = torch.randint(1, self.actions.shape[1] - self.length + 1, (1,), generator=g)
        late = torch.randint(FARTHEST, (1,), generator=g) * (torch.rand(1, generator=g) < 0.5)
        first, later = torch.zeros(1, dtype=torch.int64), start + torch.arange(self.length)
        at = torch.cat([first, later]).to(device)
        time_of = torch.cat([first, later + late]).to(device)
        positions = (time_of[:, None] * CELLS + torch.arange(CELLS, device=device)).view(1, -1)
        return self.frames[row, at], self.actions[row, at], positions, self.frames[row, at + 1]


def clip_loss(model: RoomModel, frames: Tensor, actions: Tensor, positions: Tensor, following: Tensor) -> Tensor:
    """Nats a cell: of all cells, of the HARDEST of each frame, and of the corner, which alone shows what is held.

    Nothing after an end.
    """
    logits = model(frames, actions.long().clamp_max(len(ACTIONS) - 1), positions=positions)
    wanted = following.long().flatten()
    nats = F.cross_entropy(logits.flatten(0, 2).float(), wanted, reduction="none").view_as(following)
    goes_on = (actions != ENDED).float()
    three = nats.mean(2) + nats.topk(HARDEST, 2).values.mean(2) + nats[:, :, 0]
    return (three * goes_on).sum() / goes_on.sum().clamp_min(1)


def corrupted(frames: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Frames with some of their symbols, but none of the first frame, replaced by any other: what the model may get
    wrong itself, and has to go on from."""
    hit = torch.rand(frames.shape, generator=generator, device=generator.device) < rate
    hit[:, 0] = False
    other = torch.randint(SYMBOLS, frames.shape, generator=generator, device=generator.device, dtype=frames.dtype)
    return torch.where(hit, other, frames)


def learn(
    config: RoomConfig,
    played: Explored,
    schedule: Schedule,
    batch: int,
    device: torch.device,
    seed: int,
    noise: float,
    length: int,
    start: Path | None = None,
) -> tuple[RoomModel, dict[str, Any]]:
    """A trained model, and the log of its training."""
    torch.manual_seed(seed)
    model = (RoomModel(config) if start is None else load_room(start)).to(device)
    frames, actions = (torch.from_numpy(x).to(device) for x in played)
    held = max(1, len(frames) // 50)  # the last ones are not learnt from
    clips = Clips(frames[:-held], actions[:-held], length, seed)
    generator = torch.Generator(device).manual_seed(seed)

    def loss_of(step: int) -> Tensor:
        clip = clips.draw(batch)
        return clip_loss(model, corrupted(clip[0], noise, generator), *clip[1:])

    log = fit(model, loss_of, schedule)
    log |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "noise": noise,
        "batch": batch,
        "clip": length,
    }
    if start is not None:
        before = json.loads((start / "log.json").read_text(encoding="utf-8"))
        log |= {"before": before, "seconds": round(log["seconds"] + before["seconds"], 1)}
    log["held_out"] = held_out(model, frames[-held:], actions[-held:])
    return model, log | describe(device)


def held_out(model: RoomModel, frames: Tensor, actions: Tensor) -> dict[str, Any]:
    """How it does over episodes that did not end."""
    whole = (actions != ENDED).all(1)
    if not whole.any():
        return {"episodes": 0}
    result = drift(model, frames[whole], actions[whole])
    marks = [n for n in (1, 10, 25, 50, 100) if n <= actions.shape[1]]
    return {
        "episodes": int(whole.sum()),
        "one_step_cells": round(float(result.told_cells.mean()), 6),
        "one_step_frames": round(float(result.told_frames.mean()), 6),
        "free_cells": {n: round(float(result.free_cells[n - 1]), 6) for n in marks},
        "free_frames": {n: round(float(result.free_frames[n - 1]), 6) for n in marks},
    }


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Where weights and log go.")],
    data: Episodes = DATA,
    steps: Annotated[int, typer.Option(min=1)] = 20_000,
    seconds: Annotated[float, typer.Option(min=1)] = 480.0,
    batch: Annotated[int, typer.Option(min=1, help="Clips in a step.")] = 48,
    clip: Annotated[int, typer.Option(min=1, help="Frames of a clip, beside the first of its episode.")] = 12,
    learning_rate: Annotated[float, typer.Option(min=0)] = 2e-3,
    noise: Annotated[float, typer.Option(min=0, max=1, help="Share of symbols replaced in what it reads.")] = 0.002,
    device: Annotated[str, typer.Option()] = "cuda",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    start: Annotated[Path | None, typer.Option(help="Go on from what an earlier `train` wrote here.")] = None,
) -> None:
    """Train, and write weights, sizes and log."""
    torch.set_float32_matmul_precision("high")
    held = np.load(data)
    schedule, played = Schedule(steps, seconds, learning_rate), Explored(held["frames"], held["actions"])
    model, log = learn(RoomConfig(), played, schedule, batch, torch.device(device), seed, noise, clip, start)
    save(model, model.config.to_dict(), log | {"data": json.loads(str(held["origin"]))}, out)
    print(json.dumps({key: value for key, value in log.items() if key != "training_loss"}))


@app.command()
def export(
    results: Annotated[Path, typer.Argument(help="The --out of `train`.")],
    target: Annotated[Path, typer.Option(help="The directory that is made.")] = PACKAGE_DATA,
) -> None:
    """Put the trained model into the package."""
    log = json.loads((results / "log.json").read_text(encoding="utf-8"))
    card = CARD.format(minutes=log["seconds"] / 60, parameters=log["parameters"], device=log["device"], **log["data"])
    print(f"{target}: {export_files(results, target, ROOT / 'LICENSE', card):,} bytes")


@app.callback(invoke_without_command=True, help=__doc__)
def main(context: typer.Context) -> None:
    """Rehearse when there is no command."""
    if context.invoked_subcommand is None:
        with tempfile.TemporaryDirectory() as scratch:
            data, out, target = (Path(scratch) / name for name in ("world.npz", "results", "shipped"))
            prepare(data, episodes=8)
            train(out, data, steps=3, batch=2, clip=5, device="cpu")
            export(out, target)


if __name__ == "__main__":
    app()
