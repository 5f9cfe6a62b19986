"""`longburn music`: from a caption and lyrics to a WAV file, with ACE-Step 1.5."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from longburn.cli.display import note, progress
from longburn.cli.music_options import MusicOptions
from longburn.cli.options import takes
from longburn.cli.stream import interruptible
from longburn.cli.usage import wrong_usage

if TYPE_CHECKING:
    from torch import Tensor

    from longburn.models.ace_step.codecs import WavReader, Written
    from longburn.models.ace_step.planner import SongPlan, SongRequest
    from longburn.models.ace_step.v15.music import MusicMaker
    from longburn.models.ace_step.v15.sampling import Base, Turbo


@takes(MusicOptions)
def music(
    options: MusicOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="The WAV file to write.")] = Path("song.wav"),
    sample_format: Annotated[
        Literal["int16", "int24", "float32"], typer.Option("--format", help="Of its samples.")
    ] = "int16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Make music from a caption and lyrics: 48 kHz stereo, with ACE-Step 1.5."""
    request = options.request()
    options.check_source()
    check_output(output)
    from longburn.diffusion import SamplingCancelledError
    from longburn.models.ace_step.codecs import Cancelled, WavReader

    heard = None if options.source is None else WavReader(options.source)
    timbre = None if options.timbre is None else WavReader(options.timbre)
    with wrong_usage():
        if heard is not None:
            options.led_by(unheard(heard))
        if timbre is not None and not unheard(timbre).shape[1]:
            raise ValueError(f"--timbre {timbre.path}: {timbre.length} samples, wanted at least one frame of 0.04 s")
    settings = options.settings()
    maker = options.load()
    maker.check_lyrics(request)
    if options.model is None:
        note("no --model: small random weights take the part of ACE-Step 1.5, so this is noise")
    clock = Clock()
    try:
        with interruptible() as cancelled:
            written, plan = _make(
                options, request, maker, settings, heard, timbre, output, sample_format, clock, cancelled
            )
    except (SamplingCancelledError, Cancelled):
        note(f"cancelled: {output} was not written")
        raise typer.Exit(130) from None
    seconds = written.samples / maker.codec.config.sampling_rate
    if as_json:
        facts = {"output": str(output), "seconds": seconds, "seed": options.seed, "clipped": written.clipped}
        typer.echo(json.dumps(facts | {"plan": asdict(plan), "work": clock.laps}, ensure_ascii=False))
    parts = ", ".join(f"{name} {lap:.1f} s" for name, lap in clock.laps.items())
    work = sum(clock.laps.values())
    note(f"{output}: {seconds:.1f} s of audio in {work:.1f} s ({parts}): {seconds / work:.1f} s a second")


def check_output(path: Path, option: str = "--output") -> None:
    """Raises BadParameter where no file of this name can be written: the work comes first, and would be lost."""
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{option} {path}: no directory {path.parent}")
    try:
        if path.is_dir():
            raise typer.BadParameter(f"{option} {path}: a directory; wanted the name of a file")
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part"):
            pass  # `WavWriter` will begin with a hidden file of this kind
    except OSError as error:
        raise typer.BadParameter(f"{option} {path}: cannot write there: {error.strerror}") from error


def unheard(recording: "WavReader") -> "Tensor":
    """As many frames of latents as there will be of it, with nothing in them: for checks that ask for their number."""
    import torch

    from longburn.models.ace_step.v15.config import FRAME_RATE

    return torch.empty(1, recording.length * FRAME_RATE // recording.sample_rate, 0)


class Clock:
    """How long each part of the work took."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """The part that ends now."""
        now = time.perf_counter()
        self.laps[name], self._since = now - self._since, now


def _make(
    options: MusicOptions,
    request: "SongRequest",
    maker: "MusicMaker",
    settings: "Turbo | Base",
    heard: "WavReader | None",
    timbre: "WavReader | None",
    output: Path,
    sample_format: Literal["int16", "int24", "float32"],
    clock: Clock,
    cancelled: Callable[[], bool],
) -> "tuple[Written, SongPlan]":
    from longburn.models.ace_step.codecs import write_wav
    from longburn.models.ace_step.planner import PlannerSampling, SongPlan

    plan, codes, task = SongPlan(), None, None
    if heard is not None:
        task = options.led_by(_listen("listening", maker, heard, cancelled))
        clock.lap("listening")
    elif maker.planner is not None:
        trained = options.model is not None  # what random weights call a caption is not fit to print
        with progress("planning") as show:
            sampling = PlannerSampling(seed=options.seed)
            plan, codes = maker.plan(request, sampling, caption=trained, on_code=show, cancelled=cancelled)
        clock.lap("plan")
        note("plan: " + ", ".join(f"{name} {value}" for name, value in asdict(plan).items() if value is not None))
    sound = None if timbre is None else _listen("listening to the timbre", maker, timbre, cancelled)
    with progress("steps") as show:
        latents = maker.latents(
            request,
            seconds=None if task is not None else request.duration,
            plan=plan,
            codes=codes,
            task=task,
            timbre=sound,
            settings=settings,
            seed=options.seed,
            on_step=show,
            cancelled=cancelled,
        )
    clock.lap("latents")
    with progress(str(output), count="share") as show:
        written = write_wav(
            output,
            maker.audio(latents, on_piece=show, cancelled=cancelled),
            sample_format=sample_format,
            cancelled=cancelled,
        )
    clock.lap("audio")
    return written, plan


def _listen(label: str, maker: "MusicMaker", recording: "WavReader", cancelled: Callable[[], bool]) -> "Tensor":
    with progress(label, count="share") as show:
        return maker.listen(recording, on_piece=show, cancelled=cancelled)
