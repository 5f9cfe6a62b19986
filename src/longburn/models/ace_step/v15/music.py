"""From a request to sound with ACE-Step 1.5: a plan and audio codes if there is a planner, latents, audio.

A request in words is read by the text encoder, the transformer turns noise into latents under it, and the codec turns
those into audio. What leads a run besides words is a task: `Cover`, `Repaint`, `Extend`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longburn.diffusion import Cancelled, OnStep, SamplingCancelledError, draw_noise, seeded
from longburn.models.ace_step.codecs import Oobleck
from longburn.models.ace_step.codecs.level import at_peak
from longburn.models.ace_step.codecs.tiles import Signal
from longburn.models.ace_step.planner import Planner, PlannerSampling, SongPlan, SongRequest
from longburn.models.ace_step.planner.codes import LONGEST, SHORTEST, check_duration, codes_of
from longburn.models.ace_step.v15 import sampling
from longburn.models.ace_step.v15.config import FRAME_RATE
from longburn.models.ace_step.v15.model import AceStep15
from longburn.models.ace_step.v15.prompts import Metadata, caption_text, lyrics_text
from longburn.models.ace_step.v15.sampling import Base, Turbo
from longburn.models.ace_step.v15.tasks import DiTVelocity, context_latents, frame_span, recorded_passes
from longburn.models.ace_step.v15.texts import TextEncoder

LANGUAGE = "en"  # of lyrics of which nobody says


@dataclass(frozen=True, eq=False)
class Cover:
    """Another version of a recording, from what its audio tokens say of it.

    Args:
        source: the recording's latents `[1, N, 64]` (`MusicMaker.listen`).
        strength: part of the steps that are led by it.
        closeness: 0 starts from noise, more starts nearer to the recording itself.
    """

    source: Tensor
    strength: float = 1.0
    closeness: float = 0.0


@dataclass(frozen=True, eq=False)
class Repaint:
    """A recording with the span from `start` to `end` seconds made anew."""

    source: Tensor
    start: float
    end: float


@dataclass(frozen=True, eq=False)
class Extend:
    """A recording that goes on for `seconds` more.

    Args:
        source: its latents `[1, N, 64]`.
        seconds: to add.
        context: seconds at its end that the new part is made under; None is all of it. More costs more, and what is
            not heard is not referred to.
    """

    source: Tensor
    seconds: float
    context: float | None = None


Task = Cover | Repaint | Extend


class MusicMaker:
    """Makes music.

    Args:
        model, codec: of ACE-Step 1.5, in `eval` mode.
        texts: the text encoder.
        planner: the 5 Hz language model; None makes music from words alone.
    """

    def __init__(self, model: AceStep15, codec: Oobleck, texts: TextEncoder, planner: Planner | None = None) -> None:
        self.model, self.codec, self.texts, self.planner = model, codec, texts, planner
        self._passes = recorded_passes(model.dit)

    @property
    def settings(self) -> Turbo | Base:
        """How the model was made to be run."""
        return Turbo() if self.model.config.is_turbo else Base()

    @torch.no_grad()
    def listen(self, audio: Tensor | Signal, *, mode: Literal["mean", "sample"] = "mean", seed: int = 0) -> Tensor:
        """Latents `[1, N, 64]` of audio `[1, 2, T]` at the codec's rate, of whose end less than a frame is left out.

        Args:
            mode: the posterior's mean, which is the same every time, or a draw of it, as in the released pipeline.
        """
        (generator,) = seeded([seed], self.model.silence.device)
        parts = self.codec.encode_stream(audio)
        latents = [part.mean if mode == "mean" else part.sample(generator) for part in parts]
        return torch.cat(latents, 2).mT.to(self.model.silence)

    def plan(
        self,
        request: SongRequest,
        sampling: PlannerSampling | None = None,
        *,
        caption: bool = True,
        on_code: OnStep | None = None,
        cancelled: Cancelled | None = None,
    ) -> tuple[SongPlan, list[int]]:
        """The planner's plan, and its codes, five a second.

        Args:
            request: what is asked for.
            sampling: default `PlannerSampling()`.
            caption: whether the plan has a caption of its own.
            on_code: told (codes made, codes in all).
            cancelled: asked before each code.

        Raises:
            ValueError: there is no planner, or it refuses the request.
            SamplingCancelledError: as was asked.
        """
        if self.planner is None:
            raise ValueError("MusicMaker.plan: no planner; load one, or make music without codes")
        plan = self.planner.plan(request, sampling, caption=caption)
        codes: list[int] = []
        total = codes_of(request.duration or plan.duration or 0)
        for (code,) in self.planner.stream_codes([(request, plan)], sampling):
            if cancelled is not None and cancelled():
                raise SamplingCancelledError(f"plan cancelled after {len(codes)} of {total} codes")
            if code is not None:
                codes.append(code)
            if on_code is not None:
                on_code(len(codes), total)
        return plan, codes

    @torch.no_grad()
    def latents(
        self,
        request: SongRequest,
        *,
        seconds: float | None = None,
        plan: SongPlan | None = None,
        codes: Sequence[int] | None = None,
        task: Task | None = None,
        timbre: Tensor | None = None,
        settings: Turbo | Base | None = None,
        seed: int = 0,
        on_step: OnStep | None = None,
        cancelled: Cancelled | None = None,
    ) -> Tensor:
        """Make a piece, `[1, N, 64]` in fp32.

        Args:
            request: what is asked for; its duration counts if `seconds` is None.
            seconds: 10 to 600. A cover and a repaint are as long as their recording.
            plan: of a planner; says what the request leaves open.
            codes: of a planner; only without a task.
            task: what leads the run besides words.
            timbre: latents `[1, n, 64]` of a recording whose sound is wanted; 30 s of it are heard.
            settings: default `MusicMaker.settings`.
            seed: of the noise. The same seed gives the same piece on every machine, up to rounding.
            on_step: told (steps done, steps in all).
            cancelled: asked before each step.

        Raises:
            ValueError: a duration outside 10 to 600 s, lyrics that are too long, codes beside a task.
            SamplingCancelledError: as was asked.
        """
        settings, plan = settings or self.settings, plan or SongPlan()
        if task is not None and codes is not None:
            raise ValueError(f"MusicMaker.latents: codes beside a {type(task).__name__}; wanted one of them")
        asked = seconds if seconds is not None else request.duration or plan.duration
        run = self._of_task(task, asked) if task is not None else self._of_words(asked, codes)
        conditions = self._conditions(request, plan, run.frames / FRAME_RATE, run.task, timbre)
        guided = isinstance(settings, Base) and settings.guidance_scale > 1
        null = self.model.encoder.null if guided else None
        velocity = DiTVelocity(self.model.dit, run.context, conditions, null=null, passes=self._passes)
        cover = None
        if isinstance(task, Cover):
            plain = None
            if task.strength < 1:
                told = self._conditions(request, plan, run.frames / FRAME_RATE, "text2music", timbre)
                silent = context_latents(self.model.silent(run.frames))
                plain = DiTVelocity(self.model.dit, silent, told, null=null, passes=self._passes)
            cover = sampling.Cover(task.strength, plain, task.closeness, task.source)
        noise = draw_noise((1, run.frames, self.model.silence.shape[2]), seeded([seed])).to(self.model.silence.device)
        made = sampling.sample(
            velocity, noise, settings, cover=cover, repaint=run.repaint, on_step=on_step, cancelled=cancelled
        )
        return made if run.before is None else torch.cat([run.before.to(made), made], 1)

    def audio(self, latents: Tensor, *, decibels: float | None = -1.0) -> Iterator[Tensor]:
        """The audio of latents `[1, N, 64]`, in consecutive pieces `[.., 2, n]` whose memory does not grow with N.

        Args:
            decibels: level of the largest number (`at_peak`), which is known only when all is decoded; None leaves the
                codec's own level, and the first piece comes at once.
        """
        like = next(self.codec.decoder.parameters())
        pieces: Iterable[Tensor] = self.codec.decode_stream(latents.mT.to(like))
        return iter(pieces) if decibels is None else at_peak(pieces, decibels=decibels)

    # --- what leads a run --------------------------------------------------------------------------------------------

    def _of_words(self, seconds: float | None, codes: Sequence[int] | None) -> "_Run":
        if seconds is None:
            raise ValueError("MusicMaker.latents: no duration; wanted seconds, or one in the request or the plan")
        frames = math.ceil(check_duration(seconds) * FRAME_RATE)
        if codes is None:
            return _Run("text2music", frames, context_latents(self.model.silent(frames)))
        hints = self.model.hints(torch.tensor([list(codes)], device=self.model.silence.device))[:, :frames]
        source = torch.cat([hints, self.model.silent(frames)[:, hints.shape[1] :]], 1)
        return _Run("cover", frames, context_latents(source))

    def _of_task(self, task: Task, seconds: float | None) -> "_Run":
        source = task.source.to(self.model.silence)
        frames = source.shape[1]
        if isinstance(task, Extend):
            return self._of_extension(task, source)
        if seconds is not None and math.ceil(seconds * FRAME_RATE) != frames:
            raise ValueError(
                f"MusicMaker.latents: {seconds} s for a {type(task).__name__} of {frames / FRAME_RATE} s; "
                "it is as long as its recording"
            )
        if isinstance(task, Cover):
            check_duration(frames / FRAME_RATE)
            hints = self.model.detokenizer.forward(self.model.tokenizer.forward(source, self.model.silence)[0])
            return _Run("cover", frames, context_latents(hints[:, :frames]))
        span = frame_span(task.start, task.end, frames)
        context = context_latents(source, span=span, silence=self.model.silent(frames))
        return _Run("repaint", frames, context, sampling.Repaint(source, span))

    def _of_extension(self, task: Extend, source: Tensor) -> "_Run":
        heard = source.shape[1] if task.context is None else math.ceil(task.context * FRAME_RATE)
        if not task.seconds > 0 or not 0 < heard <= source.shape[1]:
            raise ValueError(
                f"MusicMaker.latents: an extension by {task.seconds} s under {task.context} s of "
                f"{source.shape[1] / FRAME_RATE} s; wanted more than 0 s, under more than 0 s and at most all of it"
            )
        more = math.ceil(task.seconds * FRAME_RATE)
        frames, span = heard + more, (heard, heard + more)
        if not SHORTEST <= frames / FRAME_RATE <= LONGEST:
            raise ValueError(
                f"MusicMaker.latents: {heard / FRAME_RATE} s that are heard and {task.seconds} s to add are "
                f"{frames / FRAME_RATE} s; wanted {SHORTEST} to {LONGEST} s together"
            )
        silence = self.model.silent(frames)
        canvas = torch.cat([source[:, -heard:], silence[:, :more]], 1)
        context = context_latents(canvas, span=span, silence=silence)
        return _Run("repaint", frames, context, sampling.Repaint(canvas, span), source[:, :-heard])

    def _conditions(
        self, request: SongRequest, plan: SongPlan, seconds: float, task: str, timbre: Tensor | None
    ) -> Tensor:
        """What the transformer attends to, `[1, S, C]`."""
        bpm, keyscale, time = (
            getattr(request, name) or getattr(plan, name) for name in ("bpm", "keyscale", "timesignature")
        )
        metadata = Metadata(seconds, bpm, keyscale, None if time is None else str(time))
        caption = self.texts.caption(caption_text(plan.caption or request.caption, metadata, task=task))
        lyrics = self.texts.lyrics(lyrics_text(request.lyrics, request.language or plan.language or LANGUAGE))
        like, fixed = self.model.silence, self.model.config.timbre_fix_frame
        heard = self.model.silent(fixed) if timbre is None else _thirds(timbre.to(like), fixed)
        return self.model.encoder.forward(caption.to(like), lyrics.to(like), heard[:, None]).hidden


@dataclass(frozen=True, eq=False)
class _Run:
    """What a run is told and over how many frames; `before` is put in front of what it makes."""

    task: str
    frames: int
    context: Tensor
    repaint: sampling.Repaint | None = None
    before: Tensor | None = None


def _thirds(latents: Tensor, frames: int) -> Tensor:
    """A third of `frames` each from the beginning, from a third on, and from the end; repeated where it is shorter."""
    times = -(-frames // latents.shape[1])
    latents, third = latents.repeat(1, times, 1), frames // 3
    total = latents.shape[1]
    starts = (0, total // 3, total - third)
    return torch.cat([latents[:, start : start + third] for start in starts], 1)
