"""What a policy remembers under each window, ten thousand steps in one stream, and how long a world model stays right.

The policy and the world model are those that travel with the package; episodes have seeds that no training used.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import torch
import typer
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from longburn.cache import AttnWindow, CacheManager, Step
from longburn.interact import Agent, rollout
from longburn.models import data
from longburn.models.minigrid import MemoryPolicy, load_policy, load_room, memory_agent, memory_task
from longburn.models.minigrid.measure import ENDED, Drift, drift, explore
from longburn.models.minigrid.policy import FULL, SINK_STEPS, STEP, window
from longburn.models.minigrid.tasks import sees_first_object
from longburn.sampling import SamplerConfig
from machine import Parts, describe_machine, machine_line, write_json
from memory import MIB, memory_bytes
from sheets import Sheet, console

NAME = "minigrid"
SAMPLER = SamplerConfig(min_p=0.05)  # the policy's own distribution without its tail: detours stay random
LONG = 10_000  # steps that the gate of the long stream stays closed
LONG_ROWS = 20
MARKS = (1, 10, 25, 50, 75, 100)  # steps of the world model that are shown

Advance = Callable[[], None]


@dataclass(frozen=True)
class Task:
    """A task, and the window that is tested on it, in steps."""

    title: str
    make: Callable[[], Any]
    steps: int
    rows: int = 50  # played at once


TASKS = {
    "plain": Task("MiniGrid-MemoryS13-v0, as it is", partial(memory_task, 13), 5),
    "gate": Task("size 17, gate opens at step 64 to 160", partial(memory_task, 17, gate=(64, 160)), 16),
    "long gate": Task("size 17, gate opens at step 500 to 1000", partial(memory_task, 17, gate=(500, 1000)), 16, 125),
}


def windows(steps: int) -> dict[str, AttnWindow]:
    """The three ways of keeping a past."""
    return {
        "full history": FULL,
        f"window of {steps} steps": window(steps, sinks=False),
        f"window of {steps} steps + first {SINK_STEPS}": window(steps, sinks=True),
    }


class Sight(gymnasium.Wrapper):  # type: ignore[type-arg]
    """Notes at which step the first object was in view first, and last."""

    def reset(self, **settings: Any) -> Any:
        result = super().reset(**settings)
        self.first = self.last = 0 if sees_first_object(self.env) else None
        return result

    def step(self, action: Any) -> Any:
        result = super().step(action)
        if sees_first_object(self.env):
            self.last = self.env.unwrapped.step_count  # type: ignore[attr-defined]
            self.first = self.last if self.first is None else self.first
        return result


def play(policy: MemoryPolicy, make: Callable[[], Any], episodes: int, rows: int, seed: int, advance: Advance) -> Any:
    """Whole episodes, `episodes / rows` of every row; what became of each."""
    env = SyncVectorEnv([lambda: Sight(make())] * rows, autoreset_mode=AutoresetMode.NEXT_STEP)
    share, played = math.ceil(episodes / rows), []
    for turn in rollout(memory_agent(policy), env, seed=seed, sampler=replace(SAMPLER, seed=seed)):
        for ended in turn.ended:
            if ended.number < share:
                sight: Any = env.envs[ended.row]
                # The last step ends the episode, the one before turns to an end: there the agent has decided.
                since = None if sight.last is None else ended.steps - 2 - sight.last
                played.append((ended.reward > 0, ended.terminated, ended.steps, sight.first, since))
                advance()
        if len(played) == share * rows:
            return played


def success(played: Sequence[Any]) -> dict[str, Any]:
    """Share of episodes that found the right object, with a 95 % interval (Wilson), and what they were like."""
    n, won = len(played), sum(p[0] for p in played)
    share, z = won / n, 1.959964
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    steps, since = sorted(p[2] for p in played), sorted(p[4] for p in played if p[4] is not None)
    return {
        "episodes": n,
        "success": round(share, 4),
        "interval": [round(low, 4), round(high, 4)],
        "wrong_object": sum(p[1] and not p[0] for p in played),
        "out_of_time": sum(not p[1] for p in played),
        "steps": {"least": steps[0], "median": steps[n // 2], "most": steps[-1]},
        "latest_first_sight": max((p[3] for p in played if p[3] is not None), default=None),
        "steps_since_sight": {"least": since[0], "median": since[len(since) // 2], "most": since[-1]},
    }


def measured(task: Task, way: AttnWindow, episodes: int, seed: int, advance: Advance) -> dict[str, Any]:
    """The shipped policy on this task, under this window."""
    policy = load_policy(window=way)
    played = play(policy, task.make, episodes, min(task.rows, episodes), seed, advance)
    return success(played) | {"reach_tokens": policy.reach}


def weights() -> dict[str, str]:
    """The first digits of the sha256 of what is shipped."""
    folder = Path(data.__path__[0])
    files = {name: folder / name / "model.safetensors" for name in ("minigrid_agent", "minigrid_world")}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}


class Watched:
    """A policy whose caches can be looked at from outside."""

    def __init__(self, policy: MemoryPolicy) -> None:
        self.policy = policy
        self.cache: CacheManager | None = None

    def init_cache(self, batch: int, *, max_length: int | None = None) -> CacheManager:
        self.cache = self.policy.init_cache(batch, max_length=max_length)
        return self.cache

    def embed(self, tokens: Tensor) -> Tensor:
        return self.policy.embed(tokens)

    def features(self, x: Tensor, step: Step, cache: CacheManager) -> Tensor:
        return self.policy.features(x, step, cache)


def long_stream(policy: MemoryPolicy, seed: int, advance: Advance) -> dict[str, Any]:
    """One episode whose gate stays closed for LONG steps: time, cache and memory along the way, and how it ends."""
    env = Sight(memory_task(17, gate=LONG))
    watched = Watched(policy)
    parts = memory_agent(policy)
    agent = Agent(parts.encoder, watched, parts.head, parts.codec)
    seconds: list[float] = []
    sizes: list[int] = []
    resident: list[float] = []
    last: int | None = None
    for turn in rollout(agent, env, seed=seed, sampler=replace(SAMPLER, seed=seed)):
        seconds.append(turn.seconds)
        assert watched.cache is not None
        if len(seconds) % 1000 == 0:
            sizes.append(watched.cache.nbytes)
            resident.append(round(memory_bytes()[0] / MIB, 1))
        advance()
        if turn.ended:
            break
        last = env.last  # of this episode: with its end, the next one has begun
    buckets = [sorted(seconds[at : at + 1000]) for at in range(0, LONG, 1000)]
    return {
        "steps": len(seconds),
        "won": turn.ended[0].reward > 0,
        "last_sight": last,
        "milliseconds": [round(1000 * bucket[len(bucket) // 2], 4) for bucket in buckets],
        "milliseconds_p99": [round(1000 * bucket[int(0.99 * len(bucket))], 4) for bucket in buckets],
        "cache_bytes": sizes,
        "resident_mib": resident,
    }


def world(episodes: int, seed: int) -> dict[str, Any]:
    """Accuracy of the world model, one step from the truth and on its own frames, and what copying would reach."""
    played = explore(episodes + episodes // 8, 100, seed=seed, goals=0.0)
    whole = (played.actions != ENDED).all(1)
    frames, actions = (torch.from_numpy(part[whole][:episodes]) for part in played)
    before, after = frames[:, :-1], frames[:, 1:]
    began = time.perf_counter()
    kept = drift(load_room(), frames, actions)
    seconds = time.perf_counter() - began
    changed = (before != after).any(2)
    return {
        "episodes": len(frames),
        "steps": actions.shape[1],
        "seconds": round(seconds, 1),
        "copying": {
            "cells": round(float((before == after).double().mean()), 6),
            "frames": round(1 - float(changed.double().mean()), 6),
        },
        "kept first frame": _drift(kept),
        "window alone": _drift(drift(load_room(sinks=0), frames, actions)),
    }


def _drift(found: Drift) -> dict[str, Any]:
    return {
        "one_step_cells": round(float(found.told_cells.mean()), 6),
        "one_step_frames": round(float(found.told_frames.mean()), 6),
        "free_cells": {str(n): round(float(found.free_cells[n - 1]), 6) for n in MARKS},
        "free_frames": {str(n): round(float(found.free_frames[n - 1]), 6) for n in MARKS},
    }


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """The policy's table and the world model's."""
    rows = []
    for task in result["tasks"].values():
        for name, found in task["windows"].items():
            low, high = found["interval"]
            steps, since = found["steps"], found["steps_since_sight"]
            rows.append(
                [
                    *(task["title"], name, f"{found['episodes']}", f"{found['success']:.1%}"),
                    *(f"{low:.1%} to {high:.1%}", f"{steps['least']} / {steps['median']} / {steps['most']}"),
                    f"{since['least']} / {since['median']} / {since['most']}",
                ]
            )
    header = ["task", "what is kept", "episodes", "success", "95 % interval", "steps: least / median / most"]
    policy = Sheet("The policy finds the object that it saw", [*header, "since it was seen"], rows, labels=2)
    held = result["world"]
    rows = []
    for name in ("kept first frame", "window alone"):
        found = held[name]
        rows.append(
            [f"one step from the truth, {name}", f"{found['one_step_cells']:.3%}", f"{found['one_step_frames']:.2%}"]
        )
        rows += [
            [
                f"{n} step{'s' * (n > 1)} on its own frames, {name}",
                f"{found['free_cells'][str(n)]:.3%}",
                f"{found['free_frames'][str(n)]:.2%}",
            ]
            for n in MARKS
        ]
    copied = held["copying"]
    rows.append(["nothing changes (copying)", f"{copied['cells']:.3%}", f"{copied['frames']:.2%}"])
    title = f"The world model, {held['episodes']} episodes of {held['steps']} steps"
    return [policy, Sheet(title, ["frames", "cells right", "whole frames right"], rows)]


def finding(result: Mapping[str, Any]) -> str:
    """The long stream in words."""
    long, many = result["stream"], result["streams"]
    times, sizes, resident = long["milliseconds"], [n / 1024 for n in long["cache_bytes"]], long["resident_mib"]
    return (
        f"One episode of {long['steps']:,} steps ({STEP * long['steps']:,} tokens), window {result['stream_window']} "
        f"steps and the first {SINK_STEPS}: {times[0]:.2f} ms a step in the first thousand, {times[-1]:.2f} in "
        f"the last; a cache of {sizes[0]:.0f} KiB after the first and {sizes[-1]:.0f} KiB after the last, and a "
        f"process of {resident[0]:.0f} and {resident[-1]:.0f} MiB. The object was last seen at step "
        f"{long['last_sight']}. Of {many['episodes']} such episodes, "
        f"{round(many['success'] * many['episodes'])} ended at the right object."
    )


def main(
    episodes: Annotated[int, typer.Option(min=1, help="Of every task and window.")] = 500,
    long_episodes: Annotated[int, typer.Option(min=1, help="Of LONG steps each, at once.")] = LONG_ROWS,
    world_episodes: Annotated[int, typer.Option(min=1)] = 200,
    seed: Annotated[int, typer.Option(min=0, max=99_999)] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not take up a run that was cut short.")] = False,
    save: Annotated[bool, typer.Option(help="Write docs/assets/minigrid.json.")] = True,
) -> None:
    """A policy that needs its memory, and a world model that is to stay right."""
    torch.set_num_threads(threads)
    out = console()
    sizes = {"episodes": episodes, "long": long_episodes, "world": world_episodes, "seed": seed}
    parts = Parts(NAME, {**sizes, "threads": threads, "weights": weights(), "longburn": version("longburn")})
    if fresh:
        parts.clear()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def part(key: str, total: int | None, measure: Callable[[Advance], Any]) -> Any:
            if key not in parts:
                bar = progress.add_task(key, total=total)
                parts[key] = measure(partial(progress.advance, bar))
            return parts[key]

        result: dict[str, Any] = {"machine": describe_machine(), "seed": seed, "weights": weights(), "tasks": {}}
        for key, task in TASKS.items():
            found = {
                name: part(f"{key}: {name}", episodes, partial(measured, task, way, episodes, seed))
                for name, way in windows(task.steps).items()
            }
            result["tasks"][key] = {"title": task.title, "window": task.steps, "windows": found}
        steps = result["stream_window"] = TASKS["gate"].steps
        kept = window(steps, sinks=True)
        result["stream"] = part("one long stream", LONG, partial(long_stream, load_policy(window=kept), seed))
        far = Task("long", partial(memory_task, 17, gate=LONG), steps, rows=long_episodes)
        many = partial(measured, far, kept, long_episodes, seed + 1)
        result["streams"] = part("long streams at once", long_episodes, many)
        result["world"] = part("world model", None, lambda advance: world(world_episodes, seed))
    for sheet in sheets(result):
        out.print(sheet.rich())
    out.print(finding(result))
    out.print(machine_line(result["machine"]))
    if save:
        out.print(f"wrote {write_json(NAME, result)}")
    parts.clear()


if __name__ == "__main__":
    typer.run(main)
