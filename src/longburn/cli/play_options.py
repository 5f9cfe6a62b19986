"""The options of `longburn play`, and what they mean to the library."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longburn.cli.display import progress
from longburn.cli.options import MACHINE, MODEL, SAMPLING, Debug, torch_device
from longburn.cli.play_stage import AgentStage, Stage, WorldStage
from longburn.cli.stream import interruptible
from longburn.cli.usage import wrong_usage

if TYPE_CHECKING:
    import torch

    from longburn.interact import PlayableWorld
    from longburn.sampling import SamplerConfig

WORLD, RUN = "World", "Run"
AGENT_FPS = 8.0
AGENT_WINDOW = 16  # steps; without a window it would remember everything
MOST_KEYS = 1_000_000  # of a script, which is a list in memory


@dataclass(frozen=True)
class PlayOptions:
    """What is played, by whom, and how long."""

    model: Annotated[
        Path | None,
        typer.Option(
            help="Directory of a Matrix-Game 2 checkpoint. Default: the small room that travels with the package.",
            rich_help_panel=MODEL,
        ),
    ] = None
    image: Annotated[
        Path | None, typer.Option(help="With --model: the picture that the video begins with.", rich_help_panel=MODEL)
    ] = None
    agent: Annotated[
        bool,
        typer.Option("--agent", help="Let the shipped policy play MiniGrid's memory task.", rich_help_panel=WORLD),
    ] = False
    keys: Annotated[
        str | None,
        typer.Option(
            help='Keys to press instead of yours, one a step: "up,up,left"; "up*8" is eight, "-" waits.',
            rich_help_panel=WORLD,
        ),
    ] = None
    turns: Annotated[
        bool | None,
        typer.Option(
            "--turns/--realtime",
            help="Wait for a key before each step, or go on without. Default: turns, but for Matrix-Game 2.",
            rich_help_panel=WORLD,
            show_default=False,
        ),
    ] = None
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frames that the model sees, the newest counted (latent ones in Matrix-Game 2; steps of the agent). "
            "Default: as it was trained.",
            rich_help_panel=WORLD,
        ),
    ] = None
    sinks: Annotated[
        int | None,
        typer.Option(
            "--sink-frames",
            min=0,
            help="First frames (of the agent: 0 for no first steps) that stay visible for ever. "
            "Default: as it was trained.",
            rich_help_panel=WORLD,
        ),
    ] = None
    block: Annotated[
        int | None,
        typer.Option(
            min=1, help="Frames made at once: 1 in the room, 3 latent ones in Matrix-Game 2.", rich_help_panel=WORLD
        ),
    ] = None
    steps: Annotated[
        int | None, typer.Option(min=1, help="End after this many. Default: when you do.", rich_help_panel=RUN)
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="The same seed and keys play the same.", rich_help_panel=RUN)] = 0
    fps: Annotated[
        float | None,
        typer.Option(min=0.1, max=1000, help="Frames a second. Default: the world's.", rich_help_panel=RUN),
    ] = None
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Of what the room shows next, or of the agent's actions; 0 takes the likeliest.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0
    mode: Annotated[
        Literal["universal", "gta_drive", "templerun"] | None,
        typer.Option(help="Which of the released models. Default: universal.", rich_help_panel=MODEL),
    ] = None
    decoder: Annotated[
        Literal["wan", "tiny"] | None,
        typer.Option(
            help="From latents to pictures: Wan's, or taew2_1, which is far faster. Default: wan.",
            rich_help_panel=MODEL,
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(help="Of its pictures, height x width. Default: 352x640, as trained.", rich_help_panel=MODEL),
    ] = None
    kv_cache: Annotated[
        Literal["model", "fp8"] | None,
        typer.Option(help="Keep its keys and values in the model's type, or in fp8.", rich_help_panel=MODEL),
    ] = None
    sampler: Annotated[
        str | None,
        typer.Option(
            help="Steps of Matrix-Game 2's sampler, from 1000 down. Default: as trained, such as 1000,666,333.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of Matrix-Game 2. Default: float32 on the CPU, bfloat16 on a GPU.", rich_help_panel=MACHINE),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda, cuda:1, ...; auto is cuda for Matrix-Game 2 where there is one.", rich_help_panel=MACHINE
        ),
    ] = "auto"
    debug: Debug = False

    def check(self) -> None:
        """Raises BadParameter for options that do not go together."""
        if self.agent:
            for name in ("model", "keys", "turns", "block"):
                if getattr(self, name) is not None:
                    raise typer.BadParameter(f"--{name} is for playing; --agent plays by itself: leave one out")
        if self.model is None:
            for name in ("image", "mode", "decoder", "size", "kv_cache", "sampler", "dtype"):
                if getattr(self, name) is not None:
                    raise typer.BadParameter(
                        f"--{name.replace('_', '-')} is of Matrix-Game 2: give --model, its directory"
                    )
        elif self.temperature:
            raise typer.BadParameter("--temperature is of the room and the agent; Matrix-Game 2 has --sampler")
        if self.model is not None and self.image is None:
            raise typer.BadParameter("--model: wanted --image too, the picture that the video begins with")
        self.place()

    def place(self) -> "torch.device":
        """Where the model runs. Left to itself, a small one stays on the CPU."""
        return torch_device("cpu" if self.model is None and self.device == "auto" else self.device)

    def waits(self, stage: Stage) -> bool:
        """Whether a step waits for a key."""
        return stage.turns if self.turns is None else self.turns

    def script(self, controls: Mapping[str, str]) -> list[str] | None:
        """The keys of `--keys`, "" to wait; None without that option.

        Raises:
            typer.BadParameter: a key that does nothing here, a number of times that is none, or more than `MOST_KEYS`.
        """
        if self.keys is None:
            return None
        script: list[str] = []
        for piece in self.keys.split(","):
            key, star, times = piece.strip().partition("*")
            if key != "-" and key not in controls:
                raise typer.BadParameter(f"--keys: {key!r} does nothing here, wanted {', '.join(controls)} or -")
            if star and not (times.isdecimal() and times.strip("0")):
                raise typer.BadParameter(f"--keys: {piece.strip()!r}, wanted a number of at least 1 after *")
            digits = times.lstrip("0") if star else "1"
            # By its length first: Python reads no number of thousands of digits.
            if len(digits) > len(str(MOST_KEYS)) or len(script) + int(digits) > MOST_KEYS:
                told = piece.strip() if len(digits) < 20 else f"{key}*{digits[:20]}..."
                raise typer.BadParameter(f"--keys: {told!r} is too often, wanted at most {MOST_KEYS:,} keys in all")
            script += ["" if key == "-" else key] * int(digits)
        return script

    def load(self) -> Stage:
        """What is played. Reading a model from disk shows a bar on the terminal."""
        with interruptible() as interrupted:
            stage = self._load()
        if interrupted():
            raise KeyboardInterrupt
        return stage

    def _load(self) -> Stage:
        if self.agent:
            return self._agent()
        if self.model is None:
            return WorldStage(self._room(), seed=self.seed, turns=True)
        with progress(f"loading {self.model}", count="share") as show:
            return WorldStage(self._matrix_game(show), seed=self.seed, turns=False)

    def _settings(self) -> "SamplerConfig":
        from longburn.sampling import SamplerConfig

        return SamplerConfig(temperature=self.temperature, seed=self.seed)

    def _agent(self) -> Stage:
        from longburn.models.minigrid import load_policy, memory_agent, memory_task, window

        task = memory_task(render_mode="rgb_array", tile_size=16)
        seen = window(self.window or AGENT_WINDOW, sinks=self.sinks != 0)
        agent = memory_agent(load_policy(window=seen, device=self.place()))
        return AgentStage(agent, task, fps=AGENT_FPS, seed=self.seed, sampler=self._settings())

    def _room(self) -> "PlayableWorld":
        from longburn.models.minigrid import RoomWorld, load_room

        if self.block not in (None, 1):
            raise typer.BadParameter(f"--block {self.block}: the room is made frame by frame, wanted 1")
        sizes = {"window": self.window, "sinks": self.sinks}
        given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        return RoomWorld(load_room(device=self.place(), **given), sampler=self._settings())

    def _matrix_game(self, show: Any) -> "PlayableWorld":
        import torch

        from longburn.models.matrix_game_2 import RolloutSettings
        from longburn.models.matrix_game_2.checkpoint import stated_config
        from longburn.models.matrix_game_2.config import BLOCK_FRAMES
        from longburn.models.matrix_game_2.release import find_parts, load_world
        from longburn.models.matrix_game_2.world import controls_of

        if self.block not in (None, BLOCK_FRAMES):
            raise typer.BadParameter(f"--block {self.block}: Matrix-Game 2 makes {BLOCK_FRAMES} latent frames at once")
        height, width = self._picture_size()
        settings = RolloutSettings(
            window=self.window,
            sink_frames=self.sinks,
            steps=self.sampler_steps(),
            packed=self.kv_cache == "fp8",
            latent_size=(height // 8, width // 8),
        )
        mode, tiny = self.mode or "universal", self.decoder == "tiny"
        folder = find_parts(self.model or "", mode=mode, tiny=tiny)["transformer"]
        config = stated_config(folder, mode)
        with wrong_usage():  # before gigabytes are read
            settings.check(config)
        self.script(controls_of(mode))
        return load_world(
            self.model or "",
            mode=mode,
            image=self.image,
            settings=settings,
            tiny=tiny,
            dtype=getattr(torch, self.dtype) if self.dtype else None,
            device=self.place(),
            progress=lambda part, done, total: show(done, total),
        )

    def sampler_steps(self) -> tuple[int, ...] | None:
        """The numbers of `--sampler`; None without that option."""
        if self.sampler is None:
            return None
        try:
            return tuple(int(step) for step in self.sampler.split(","))
        except ValueError:
            raise typer.BadParameter(f"--sampler {self.sampler!r}: wanted numbers such as 1000,666,333") from None

    def _picture_size(self) -> tuple[int, int]:
        height, by, width = (self.size or "352x640").partition("x")
        if not (by and height.isdecimal() and width.isdecimal()):
            raise typer.BadParameter(f"--size {self.size!r}: wanted height and width such as 352x640")
        if int(height) % 16 or int(width) % 16 or not int(height) or not int(width):
            raise typer.BadParameter(f"--size {self.size}: wanted multiples of 16")
        return int(height), int(width)
