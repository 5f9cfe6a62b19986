"""`longburn play`: a world model under one's keys, or an agent at work, in the terminal and as a video."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import typer

from longburn.cli.display import note, progress
from longburn.cli.options import takes
from longburn.cli.play_options import PlayOptions
from longburn.cli.play_stage import Shown, Stage
from longburn.cli.play_terminal import Keyboard, Screen, ends_orderly, keyboard, pause, screen
from longburn.cli.play_video import VideoWriter
from longburn.cli.usage import wrong_usage

QUIT, PAUSE = ("q", "escape"), "p"
INTERRUPTED = 130


class Player(Protocol):
    """Where keys come from."""

    def rest(self, until: float) -> bool:
        """Wait until this moment of `time.perf_counter`; False at once if the play is over."""
        ...

    def keys(self) -> Sequence[str] | None:
        """The keys for the next step; None if the play is over."""
        ...


class Typist:
    """Somebody at the keyboard.

    Args:
        board: the keyboard.
        controls: the keys that mean something.
        turns: wait for such a key before a step, and take one a step.
    """

    def __init__(self, board: Keyboard, controls: Sequence[str], *, turns: bool) -> None:
        self._board, self._controls, self._turns = board, frozenset(controls), turns
        self._pressed: list[str] = []
        self._over = self._paused = False

    def rest(self, until: float) -> bool:
        while not self._over and time.perf_counter() < until:
            self._take(pause(self._board, until))
        return not self._over

    def keys(self) -> Sequence[str] | None:
        self._take(self._board.wait(0))
        while not self._over and (self._paused or (self._turns and not self._pressed)):
            self._take(self._board.wait(None))
        if self._over:
            return None
        count = 1 if self._turns else len(self._pressed)
        now, self._pressed = self._pressed[:count], self._pressed[count:]
        return now

    def _take(self, keys: Sequence[str]) -> None:
        for key in keys:
            if key in QUIT:
                self._over = True
            elif key == PAUSE:
                self._paused = not self._paused
            elif key in self._controls:
                self._pressed.append(key)
        self._over = self._over or self._board.closed


class Script:
    """Keys that are known beforehand, one a step; without any, nobody touches the keys and it goes on."""

    def __init__(self, keys: Sequence[str] | None) -> None:
        self._left: Iterator[str] | None = None if keys is None else iter(keys)

    def rest(self, until: float) -> bool:
        pause(None, until)
        return True

    def keys(self) -> Sequence[str] | None:
        if self._left is None:
            return []
        key = next(self._left, None)
        return None if key is None else [key] if key else []


@dataclass
class Figures:
    """What was done: steps, frames (of which the first ones came before any step), and the model's seconds of every
    step."""

    steps: int = 0
    frames: int = 0
    first_frames: int = 0
    latencies: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.latencies:
            return f"{self.frames} frames"
        at = sorted(self.latencies)
        median, p99 = statistics.median(at), at[min(len(at) - 1, round(0.99 * len(at)))]
        rate = (self.frames - self.first_frames) / sum(at) if sum(at) else 0.0
        return (
            f"{self.steps} steps, {self.frames} frames; a step took {1000 * median:.1f} ms in the median, "
            f"{1000 * p99:.1f} ms at the 99th percentile: {rate:.1f} frames/s"
        )


@takes(PlayOptions)
@ends_orderly()
def play(
    options: PlayOptions,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A video to write: .gif or .mp4.")] = None,
    scale: Annotated[
        int | None,
        typer.Option(min=1, help="With --output: pixels of the video on a side of a frame's pixel. Default: 1."),
    ] = None,
    draw: Annotated[
        bool | None,
        typer.Option(
            "--draw/--no-draw",
            help="Show it in the terminal. Default: where there is one, unless a video is written without a player.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Play a world model with the keys of the terminal, or let an agent play; write it as GIF or MP4."""
    options.check()
    typed = not options.agent and options.keys is None
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if typed and not terminal:
        raise typer.BadParameter(
            "stdin and stdout are not a terminal, so there are no keys to play with: give --keys or --agent"
        )
    draws = (terminal and (typed or output is None)) if draw is None else draw
    if draws and not sys.stdout.isatty():
        raise typer.BadParameter("--draw: stdout is not a terminal")
    check_idle(options, by_hand=typed and draws, draws=draws, writes=output is not None, scale=scale)
    if output is not None:
        check_output(output, options.fps, scale or 1)
    endless = options.keys is None and options.steps is None
    if endless and not (draws and terminal) and (output is not None or not draws):
        raise typer.BadParameter("it would go on for ever, with nobody to end it: give --steps")
    stage = options.load()
    script = options.script(stage.controls)
    figures, video = Figures(), None
    if output is not None:
        with wrong_usage():
            video = VideoWriter(output, stage.size, options.fps or stage.fps, scale=scale or 1)
    try:
        with ExitStack() as stack:
            if video is not None:
                stack.enter_context(video)
            player: Player = Script(script)
            if draws and terminal and script is None:
                player = Typist(stack.enter_context(keyboard()), tuple(stage.controls), turns=options.waits(stage))
            shows = stack.enter_context(screen()) if draws else None
            total = options.steps if script is None else min(len(script), options.steps or len(script))
            tell = stack.enter_context(progress(str(output or "playing"))) if shows is None else None
            perform(stage, player, figures, options, video=video, shows=shows, tell=tell, total=total)
    except KeyboardInterrupt:
        note("interrupted" + ("" if output is None else f": {output} was not written"))
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        facts = {"steps": figures.steps, "frames": figures.frames, "seconds": figures.latencies}
        typer.echo(json.dumps(facts | {"output": None if output is None else str(output), "seed": options.seed}))
    note(f"{f'{output}: ' if output is not None else ''}{figures}")


def perform(
    stage: Stage,
    player: Player,
    figures: Figures,
    options: PlayOptions,
    *,
    video: VideoWriter | None,
    shows: Screen | None,
    tell: Callable[[int, int], None] | None,
    total: int | None,
) -> None:
    """Step until somebody has enough. Frames that are drawn keep to their times; a late one does not delay the rest."""
    interval = 1 / (options.fps or stage.fps)
    help_line = "  ".join(f"{key} {meaning}" for key, meaning in stage.controls.items())
    help_line += ("  " if help_line else "") + "p pause  q quit"
    due = time.perf_counter()

    def present(shown: Shown) -> bool:
        nonlocal due
        figures.frames += len(shown.frames)
        if video is not None:
            video.add(shown.frames)
        if shows is None:
            return True
        due = max(due, time.perf_counter() - len(shown.frames) * interval)
        for frame in shown.frames:
            shows.draw(frame, shown.caption, help_line)
            due += interval
            if not player.rest(due):
                return False
        return True

    going = present(stage.begin())
    figures.first_frames = figures.frames
    while going and (total is None or figures.steps < total) and (keys := player.keys()) is not None:
        shown = stage.step(keys)
        figures.steps += 1
        figures.latencies.append(shown.seconds)
        if tell is not None and total is not None:
            tell(figures.steps, total)
        going = present(shown)


def check_idle(options: PlayOptions, *, by_hand: bool, draws: bool, writes: bool, scale: int | None) -> None:
    """Raises BadParameter for options that would do nothing.

    Args:
        options: of the command.
        by_hand: somebody is at the keyboard.
        draws: frames are shown in the terminal.
        writes: frames go to a video.
        scale: of the video; None if it was not given.
    """
    if scale is not None and not writes:
        raise typer.BadParameter(f"--scale {scale} is of a video, and none is written: give --output, or leave it out")
    if options.fps is not None and not (draws or writes):
        raise typer.BadParameter(f"--fps {options.fps:g}: nothing is drawn or written: give --draw or --output")
    if options.turns is not None and not by_hand:
        given, instead = "turns" if options.turns else "realtime", "no-draw" if options.keys is None else "keys"
        raise typer.BadParameter(f"--{given} is for your own keys, and --{instead} plays without: leave one out")


def check_output(output: Path, fps: float | None = None, scale: int = 1) -> None:
    """What can be told of a video before the size of its frames is known.

    Raises:
        typer.BadParameter: it cannot be written.
        ImportError: a package is missing.
    """
    try:
        VideoWriter(output, (1, 1), fps or 1.0, scale=scale)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(f"--output: {error}") from error
