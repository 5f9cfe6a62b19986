"""Matrix-Game 2: a world that is made while one walks through it.

    python examples/matrix_game_2.py                        # the small room: a scripted walk, and its figures
    python examples/matrix_game_2.py --play                 # with the keys of the terminal
    python examples/matrix_game_2.py --agent --window 5     # the shipped policy, with kept first steps and without
    python examples/matrix_game_2.py --checkpoint ./Matrix-Game-2.0 --image start.png --keys "w*8,left*4" -o walk.mp4

Attention streams over a sliding window in which the first frames are kept (sink tokens). A world model is an
environment of gymnasium's API, and an agent plays any such environment by one loop.
"""

import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

from longburn.cli.display import progress
from longburn.cli.main import execute
from longburn.cli.play import check_output
from longburn.cli.play_options import PlayOptions
from longburn.cli.play_terminal import ends_orderly
from longburn.cli.play_video import VideoWriter
from longburn.cli.usage import wrong_usage
from longburn.interact import PlayableWorld, WorldModelEnv, evaluate
from longburn.models.matrix_game_2 import RolloutSettings
from longburn.models.matrix_game_2.release import load_world
from longburn.models.matrix_game_2.world import controls_of
from longburn.models.minigrid import RoomWorld, load_policy, load_room, memory_agent, memory_task, window
from longburn.sampling import SamplerConfig

WALK = "up*2,right,up*3,space,left,up*2"  # of the small room


def walk_of(mode: str) -> str:
    """A short walk in a world of Matrix-Game 2, by keys that this mode has."""
    first, *_, last = controls_of(mode)
    return f"{first}*4,{last}*2"


def walk(world: PlayableWorld, keys: list[str], seed: int, path: Path | None) -> None:
    """Press keys in a world, one a step, and write what is seen as it comes; say what it took."""
    env = WorldModelEnv(world)
    seconds: list[float] = []
    with ExitStack() as stack:
        video = None if path is None else stack.enter_context(VideoWriter(path, world.frame_size, world.fps))
        show = stack.enter_context(progress("steps"))
        _, info = env.reset(seed=seed)
        count = seen(info, video)
        for done, key in enumerate(keys, 1):
            _, reward, ended, _, info = env.step(world.action_of([key] if key else []))
            count += seen(info, video)
            seconds.append(info["latency"].seconds)
            show(done, len(keys))
            if ended:
                print(f"seed {seed}: the end after {done} steps, reward {reward:.2f}")
                break
    print(f"seed {seed}: {len(seconds)} steps, {count} frames; {1000 * statistics.median(seconds):.1f} ms a step")
    if path is not None:
        print(f"{path}: {count} frames at {world.fps:g} a second")


def seen(info: dict[str, Any], video: VideoWriter | None) -> int:
    """Write the frames of one step, uint8 `[height, width, 3]` each; how many they are."""
    if video is not None:
        video.add(np.stack(info["frames"]))
    return len(info["frames"])


def compare(size: int, episodes: int, seed: int, place: torch.device) -> None:
    """The shipped policy at MiniGrid's memory task: what its window holds decides what it can remember."""
    for name, seen in (("kept first steps", window(size, sinks=True)), ("window alone", window(size, sinks=False))):
        agent = memory_agent(load_policy(window=seen, device=place))
        env = memory_task(17, gate=60)
        played = evaluate(agent, env, episodes=episodes, seed=seed, sampler=SamplerConfig(temperature=0))
        solved = sum(episode.reward > 0 for episode in played)
        print(f"{name}, {size} steps in view: {solved} of {episodes} episodes solved")


@ends_orderly()
def main(
    checkpoint: Annotated[Path | None, typer.Option(help="A Matrix-Game 2 release; none: the small room.")] = None,
    image: Annotated[Path | None, typer.Option(help="The picture that the video begins with.")] = None,
    mode: Annotated[
        Literal["universal", "gta_drive", "templerun"] | None, typer.Option(help="Of the release. Default: universal.")
    ] = None,
    keys: Annotated[str | None, typer.Option(help='One a step, such as "w*8,left,-". Default: a short walk.')] = None,
    interactive: Annotated[bool, typer.Option("--play", help="With the keys of the terminal: longburn play.")] = False,
    agent: Annotated[bool, typer.Option("--agent", help="Let the shipped policy play its task.")] = False,
    episodes: Annotated[int | None, typer.Option(min=1, help="Of the agent, for each window. Default: 20.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="One walk a seed. Default: 0.")] = None,
    window_size: Annotated[int | None, typer.Option("--window", min=1, help="Frames that are seen.")] = None,
    sink_frames: Annotated[int | None, typer.Option(min=0, help="First frames that stay visible for ever.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Matrix-Game 2's steps, such as 1000,666,333.")] = None,
    device: Annotated[str, typer.Option(help="auto: a GPU for Matrix-Game 2 where there is one.")] = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="GIF or MP4, one a seed.")] = None,
) -> None:
    """Walk through a world by keys, or let an agent play."""
    seeds = seed or [0]
    if agent:
        idle = {"checkpoint": checkpoint, "image": image, "mode": mode, "keys": keys, "play": interactive or None}
        idle |= {"sink-frames": sink_frames, "sampler": sampler, "output": output}
        for name, given in idle.items():
            if given is not None:
                raise typer.BadParameter(f"--{name} does nothing with --agent: leave one out")
    elif episodes is not None:
        raise typer.BadParameter("--episodes is for --agent: give both, or neither")
    if len(seeds) > 1 and (agent or interactive):
        raise typer.BadParameter(f"--seed: {len(seeds)} came, --{'agent' if agent else 'play'} takes one")
    for name, given in (("image", image), ("mode", mode), ("sampler", sampler)):
        if checkpoint is None and given is not None:
            raise typer.BadParameter(f"--{name} is of Matrix-Game 2: give --checkpoint, its directory")
    if checkpoint is not None and image is None:
        raise typer.BadParameter("--checkpoint: wanted --image too, the picture that the video begins with")
    if output is not None:
        check_output(output)
    walked = WALK if checkpoint is None else walk_of(mode or "universal")
    asked = PlayOptions(keys=walked if keys is None else keys, sampler=sampler, device=device, model=checkpoint)
    with wrong_usage():
        place = asked.place()
    if agent:
        return compare(window_size or 5, episodes or 20, seeds[0], place)
    if interactive:
        options = {"--model": checkpoint, "--image": image, "--window": window_size, "--sink-frames": sink_frames}
        options |= {"--mode": mode, "--sampler": sampler, "--output": output, "--seed": seeds[0]}
        options |= {"--keys": keys, "--device": device}
        chosen = [str(part) for option in options.items() if option[1] is not None for part in option]
        raise typer.Exit(execute(["play", *chosen]))
    world: PlayableWorld
    if checkpoint is None:
        sizes = {"window": window_size, "sinks": sink_frames}
        world = RoomWorld(load_room(device=place, **{name: size for name, size in sizes.items() if size is not None}))
        pressed = asked.script(world.controls)
    else:
        pressed = asked.script(controls_of(mode or "universal"))  # before gigabytes are read
        with wrong_usage():
            settings = RolloutSettings(window=window_size, sink_frames=sink_frames, steps=asked.sampler_steps())
            world = load_world(checkpoint, mode=mode or "universal", image=image, settings=settings, device=place)
    for number in seeds:
        path = output.with_stem(f"{output.stem}-{number}") if output is not None and len(seeds) > 1 else output
        walk(world, pressed or [], number, path)
    return None


if __name__ == "__main__":
    typer.run(main)
