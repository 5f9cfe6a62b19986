"""The options of `longburn music`, and what they ask for."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longburn.cli.display import progress
from longburn.cli.generate import decode
from longburn.cli.options import MACHINE, MODEL, Debug, torch_device
from longburn.cli.usage import wrong_usage

if TYPE_CHECKING:
    from torch import Tensor

    from longburn.models.ace_step.planner import SongRequest
    from longburn.models.ace_step.v15.leads import Task
    from longburn.models.ace_step.v15.music import MusicMaker
    from longburn.models.ace_step.v15.sampling import Base, Turbo

SONG, SOURCE, RUN = "Song", "Source", "Run"
SMALL_SECONDS = 10.0  # of a piece by random weights, of which nobody says how long it is


@dataclass(frozen=True)
class MusicOptions:
    """What is to be made, under what, and how."""

    caption: Annotated[
        str | None, typer.Option("--caption", "-c", help="Style, instruments, mood.", rich_help_panel=SONG)
    ] = None
    lyrics: Annotated[
        str | None,
        typer.Option(help="Lyrics, with section names in brackets. Default: none.", rich_help_panel=SONG),
    ] = None
    lyrics_file: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file with the lyrics.", rich_help_panel=SONG)
    ] = None
    duration: Annotated[
        float | None, typer.Option(help="Seconds, 10 to 600. Default: the plan decides.", rich_help_panel=SONG)
    ] = None
    bpm: Annotated[int | None, typer.Option(help="Beats a minute, 30 to 300.", rich_help_panel=SONG)] = None
    key: Annotated[str | None, typer.Option(help='Such as "F# minor".', rich_help_panel=SONG)] = None
    time_signature: Annotated[str | None, typer.Option(help="2, 3, 4 or 6.", rich_help_panel=SONG)] = None
    language: Annotated[str | None, typer.Option(help='Of the lyrics, such as "en".', rich_help_panel=SONG)] = None
    task: Annotated[
        Literal["cover", "repaint", "extend"] | None,
        typer.Option(
            help="With --source: another version of it, a span made anew, or more of it.", rich_help_panel=SOURCE
        ),
    ] = None
    source: Annotated[Path | None, typer.Option(help="A WAV file, 48 kHz, mono or stereo.", rich_help_panel=SOURCE)] = (
        None
    )
    start: Annotated[
        float | None, typer.Option(help="repaint: where the span begins, in seconds.", rich_help_panel=SOURCE)
    ] = None
    end: Annotated[
        float | None, typer.Option(help="repaint: where the span ends, in seconds.", rich_help_panel=SOURCE)
    ] = None
    strength: Annotated[
        float | None,
        typer.Option(help="cover: part of the steps led by the source. Default: 1.", rich_help_panel=SOURCE),
    ] = None
    context: Annotated[
        float | None,
        typer.Option(help="extend: seconds of the source's end that are heard. Default: all.", rich_help_panel=SOURCE),
    ] = None
    timbre: Annotated[
        Path | None, typer.Option(help="A WAV file, 48 kHz, whose sound is wanted.", rich_help_panel=SOURCE)
    ] = None
    plan: Annotated[
        bool,
        typer.Option(help="Let the language model plan the piece and its audio codes first.", rich_help_panel=RUN),
    ] = True
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the base and sft models. Default: 50 (turbo always takes 8).", rich_help_panel=RUN
        ),
    ] = None
    guidance: Annotated[
        float | None, typer.Option(help="Of the base and sft models. Default: 7.", rich_help_panel=RUN)
    ] = None
    shift: Annotated[
        float | None, typer.Option(help="Of noise levels. Default: 3 for turbo, else 1.", rich_help_panel=RUN)
    ] = None
    seed: Annotated[
        int, typer.Option(min=0, max=2**64 - 1, help="The same seed makes the same piece.", rich_help_panel=RUN)
    ] = 0
    model: Annotated[
        Path | None,
        typer.Option(
            help="Directory of an ACE-Step 1.5 checkpoint. Default: small random weights, which make noise.",
            rich_help_panel=MODEL,
        ),
    ] = None
    variant: Annotated[
        str | None, typer.Option(help="Such as turbo, base, xl-turbo. Default: turbo.", rich_help_panel=MODEL)
    ] = None
    planner: Annotated[
        str | None, typer.Option(help="Size of the language model. Default: 1.7B.", rich_help_panel=MODEL)
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights. Default: float32 on the CPU, bfloat16 on a GPU.", rich_help_panel=MACHINE),
    ] = None
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is cuda where there is one.", rich_help_panel=MACHINE)
    ] = "auto"
    debug: Debug = False

    def request(self) -> "SongRequest":
        """What is asked for. A value out of range is wrong usage."""
        from longburn.models.ace_step.planner import SongRequest

        if not self.caption:
            raise typer.BadParameter("no --caption: wanted a few words on style, instruments, mood")
        if self.lyrics is not None and self.lyrics_file is not None:
            raise typer.BadParameter("--lyrics and --lyrics-file both given: wanted one of them")
        lyrics = self.lyrics if self.lyrics_file is None else read_lyrics(self.lyrics_file)
        seconds = self.duration
        if seconds is None and self.model is None and self.task is None:
            seconds = SMALL_SECONDS
        with wrong_usage():
            request = SongRequest(
                self.caption,
                bpm=self.bpm,
                duration=None if self.task is not None else seconds,
                keyscale=self.key,
                language=self.language,
                timesignature=self.time_signature,
            )
        return request if lyrics is None else replace(request, lyrics=lyrics)

    def check_source(self) -> None:
        """Raises BadParameter for options that the task lacks or does not have, before any file is opened."""
        if (self.task is None) != (self.source is None):
            raise typer.BadParameter("--task and --source belong together: give both or none")
        belong = {"start": "repaint", "end": "repaint", "strength": "cover", "context": "extend"}
        for name, task in belong.items():
            if getattr(self, name) is not None and self.task != task:
                raise typer.BadParameter(f"--{name} belongs to --task {task}")
        if self.task == "repaint" and (self.start is None or self.end is None):
            raise typer.BadParameter("--task repaint: wanted --start and --end, in seconds")
        if self.task == "extend" and self.duration is None:
            raise typer.BadParameter("--task extend: wanted --duration, the seconds to add")
        if self.task in ("cover", "repaint") and self.duration is not None:
            raise typer.BadParameter(
                f"--duration {self.duration}: a {self.task} is as long as its --source; leave it out"
            )

    def settings(self) -> "Turbo | Base":
        """How the model is run, by its configuration alone. A value out of range is wrong usage."""
        from longburn.models.ace_step.v15.checkpoint import find_parts
        from longburn.models.ace_step.v15.model import read_config
        from longburn.models.ace_step.v15.sampling import Base, Turbo

        turbo = True  # as the small one is
        if self.model is not None:
            turbo = read_config(find_parts(self.model, variant=self.variant, planner=self.planner).model).is_turbo
        given = {"steps": self.steps, "guidance_scale": self.guidance, "shift": self.shift}
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        with wrong_usage():
            if not turbo:
                return replace(Base(), **chosen)
            if wrong := [name for name in ("steps", "guidance") if getattr(self, name) is not None]:
                raise ValueError(
                    f"--{wrong[0]} is of the base and sft models; a turbo model takes 8 steps without guidance"
                )
            return replace(Turbo(), **chosen)

    def load(self) -> "MusicMaker":
        """The model, with a bar on the terminal."""
        import torch

        if self.model is None:
            from longburn.models.ace_step.v15.small import small_music_maker

            return small_music_maker(planner=self.plan and self.task is None)
        from longburn.models.ace_step.v15.checkpoint import load_music_maker

        device = torch_device(self.device)
        dtype = getattr(torch, self.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
        with progress(f"loading {self.model}", count="share") as show:
            return load_music_maker(
                self.model,
                variant=self.variant,
                planner=self.planner,
                plans=self.plan and self.task is None,
                dtype=dtype,
                device=device,
                progress=lambda part, done, total: show(done, total),
            )

    def led_by(self, recording: "Tensor") -> "Task":
        """What leads the run besides words."""
        from longburn.models.ace_step.v15.leads import Cover, Extend, Repaint

        match self.task:
            case "cover":
                return Cover(recording, 1.0 if self.strength is None else self.strength)
            case "repaint":
                assert self.start is not None
                assert self.end is not None
                return Repaint(recording, self.start, self.end)
            case _:
                assert self.duration is not None
                return Extend(recording, self.duration, self.context)


def read_lyrics(path: Path) -> str:
    """The lyrics in a file."""
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        raise OSError(f"lyrics file {path}: {error.strerror}") from error
