"""From a request to sound with ACE-Step 1.5: a plan and audio codes if there is a planner, latents, audio.

A request in words is read by the text encoder, the transformer turns noise into latents under it, and the codec turns
those into audio. What leads a run besides words is a task (`leads`): `Cover`, `Repaint`, `Extend`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longburn.diffusion import Cancelled, OnStep, SamplingCancelledError, draw_noise, seeded
from longburn.models.ace_step.codecs import Oobleck
from longburn.models.ace_step.codecs.level import at_peak
from longburn.models.ace_step.codecs.tiles import Samples, Signal
from longburn.models.ace_step.planner import Planner, PlannerSampling, SongPlan, SongRequest
from longburn.models.ace_step.planner.codes import check_duration, codes_of
from longburn.models.ace_step.v15 import sampling
from longburn.models.ace_step.v15.conditions import thirds
from longburn.models.ace_step.v15.config import FRAME_RATE
from longburn.models.ace_step.v15.leads import Cover, Extend, Repaint, Task, check_latents
from longburn.models.ace_step.v15.model import AceStep15
from longburn.models.ace_step.v15.prompts import Metadata, caption_text, lyrics_text
from longburn.models.ace_step.v15.sampling import Base, Turbo
from longburn.models.ace_step.v15.tasks import DiTVelocity, context_latents, frames_of, recorded_passes
from longburn.models.ace_step.v15.texts import TextEncoder

__all__ = ["Cover", "Extend", "MusicMaker", "Repaint", "Task"]

LANGUAGE = "en"  # of lyrics of which nobody says


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
    def listen(
        self,
        audio: Tensor | Signal,
        *,
        mode: Literal["mean", "sample"] = "mean",
        seed: int = 0,
        on_piece: OnStep | None = None,
        cancelled: Cancelled | None = None,
    ) -> Tensor:
        """Latents `[1, N, 64]` of audio `[1, 2, T]` at the codec's rate, of whose end less than a frame is left out.

        Args:
            mode: the posterior's mean, which is the same every time, or a draw of it, as in the released pipeline.
            seed: of the draw.
            on_piece: told (frames heard, frames in all) after each piece.
            cancelled: asked before each piece.

        Raises:
            ValueError: another number of rows or channels, or audio that is too short for one frame.
            SamplingCancelledError: as was asked.
        """
        signal = Samples(audio) if isinstance(audio, Tensor) else audio
        came = signal.between(0, 0).shape[:-1]
        channels = self.codec.config.audio_channels
        if came != (1, channels):
            raise ValueError(
                f"MusicMaker.listen: audio {[*came, signal.length]}, wanted [1, {channels}, T]; "
                "repeat a single channel, and listen to recordings one by one"
            )
        (generator,) = seeded([seed], self.model.silence.device)
        parts = self.codec.encode_stream(signal)
        latents = (part.mean if mode == "mean" else part.sample(generator) for part in parts)
        frames = signal.length // self.codec.config.hop_length
        return torch.cat([*_watched("listen", latents, frames, on_piece, cancelled)], 2).mT.to(self.model.silence)

    def check_lyrics(self, request: SongRequest, plan: SongPlan | None = None) -> None:
        """Refuse lyrics that the text encoder does not read to the end, before anything is made of them.

        Raises:
            ValueError: too many tokens, those of the words around the lyrics with them.
        """
        self.texts.lyric_ids(_told_lyrics(request, plan or SongPlan()))

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
            ValueError: there is no planner, it refuses the request, or `check_lyrics` does.
            SamplingCancelledError: as was asked.
        """
        if self.planner is None:
            raise ValueError("MusicMaker.plan: no planner; load one, or make music without codes")
        self.check_lyrics(request)
        plan = self.planner.plan(request, sampling, caption=caption)
        self.check_lyrics(request, plan)  # now that their language is known
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
            ValueError: a duration outside 10 to 600 s, lyrics that are too long, codes beside a task, or other codes
                than the duration and the model ask for, latents of another shape.
            SamplingCancelledError: as was asked.
        """
        settings, plan = settings or self.settings, plan or SongPlan()
        (generator,) = seeded([seed])  # on the CPU, whose numbers are the same everywhere
        self.check_lyrics(request, plan)
        channels = self.model.silence.shape[2]
        for name, recording in (("task", None if task is None else task.source), ("timbre", timbre)):
            if recording is not None:
                check_latents(f"MusicMaker.latents: {name}", recording, channels)
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
        noise = draw_noise((1, run.frames, channels), [generator]).to(self.model.silence.device)
        made = sampling.sample(
            velocity,
            noise,
            settings,
            cover=cover,
            repaint=run.repaint,
            generator=generator,
            on_step=on_step,
            cancelled=cancelled,
        )
        return made if run.before is None else torch.cat([run.before.to(made), made], 1)

    def audio(
        self,
        latents: Tensor,
        *,
        decibels: float | None = -1.0,
        on_piece: OnStep | None = None,
        cancelled: Cancelled | None = None,
    ) -> Iterator[Tensor]:
        """The audio of latents `[1, N, 64]`, in consecutive pieces `[.., 2, n]` whose memory does not grow with N.

        Args:
            decibels: level of the largest number (`at_peak`), which is known only when all is decoded; None leaves the
                codec's own level, and the first piece comes at once.
            on_piece: told (samples decoded, samples in all) after each piece.
            cancelled: asked before each piece is decoded.

        Raises:
            ValueError: latents of another shape.
            SamplingCancelledError: (while iterating) as was asked.
        """
        config, like = self.codec.config, next(self.codec.decoder.parameters())
        check_latents("MusicMaker.audio", latents, config.decoder_input_channels)
        decoded = self.codec.decode_stream(latents.mT.to(like))
        pieces = _watched("audio", decoded, latents.shape[1] * config.hop_length, on_piece, cancelled)
        return pieces if decibels is None else at_peak(pieces, decibels=decibels)

    # --- what leads a run --------------------------------------------------------------------------------------------

    def _of_words(self, seconds: float | None, codes: Sequence[int] | None) -> "_Run":
        if seconds is None:
            raise ValueError("MusicMaker.latents: no duration; wanted seconds, or one in the request or the plan")
        frames = frames_of(check_duration(seconds))
        if codes is None:
            return _Run("text2music", frames, context_latents(self.model.silent(frames)))
        if len(codes) != (wanted := codes_of(seconds)):
            raise ValueError(
                f"MusicMaker.latents: {len(codes)} codes for {seconds} s, wanted {wanted}; make them for this duration"
            )
        known = self.model.tokenizer.quantizer.codebook_size
        if wrong := [code for code in codes if not 0 <= code < known]:
            raise ValueError(f"MusicMaker.latents: code {wrong[0]}, wanted 0 to {known - 1}; take the model's planner")
        hints = self.model.hints(torch.tensor([list(codes)], device=self.model.silence.device))[:, :frames]
        source = torch.cat([hints, self.model.silent(frames)[:, hints.shape[1] :]], 1)
        return _Run("cover", frames, context_latents(source))

    def _of_task(self, task: Task, seconds: float | None) -> "_Run":
        source = task.source.to(self.model.silence)
        frames = source.shape[1]
        if isinstance(task, Extend):
            return self._of_extension(task, source)
        if seconds is not None and not (math.isfinite(seconds) and frames_of(seconds) == frames):
            raise ValueError(
                f"MusicMaker.latents: {seconds} s for a {type(task).__name__} of {frames / FRAME_RATE} s; "
                "it is as long as its recording"
            )
        if isinstance(task, Cover):
            hints = self.model.detokenizer.forward(self.model.tokenizer.forward(source, self.model.silence)[0])
            return _Run("cover", frames, context_latents(hints[:, :frames]))
        context = context_latents(source, span=task.span, silence=self.model.silent(frames))
        return _Run("repaint", frames, context, sampling.Repaint(source, task.span))

    def _of_extension(self, task: Extend, source: Tensor) -> "_Run":
        heard, more = task.heard, task.more
        frames, span = heard + more, (heard, heard + more)
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
        lyrics = self.texts.lyrics(_told_lyrics(request, plan))
        like, fixed = self.model.silence, self.model.config.timbre_fix_frame
        heard = self.model.silent(fixed) if timbre is None else thirds(timbre.to(like), fixed)
        return self.model.encoder.forward(caption.to(like), lyrics.to(like), heard[:, None]).hidden


@dataclass(frozen=True, eq=False)
class _Run:
    """What a run is told and over how many frames; `before` is put in front of what it makes."""

    task: str
    frames: int
    context: Tensor
    repaint: sampling.Repaint | None = None
    before: Tensor | None = None


def _told_lyrics(request: SongRequest, plan: SongPlan) -> str:
    return lyrics_text(request.lyrics, request.language or plan.language or LANGUAGE)


def _watched(
    name: str, pieces: Iterator[Tensor], total: int, on_piece: OnStep | None, cancelled: Cancelled | None
) -> Iterator[Tensor]:
    """The same pieces `[.., n]`, with `on_piece` told of every n and `cancelled` asked before each piece."""
    done = 0
    while True:
        if cancelled is not None and cancelled():
            raise SamplingCancelledError(f"MusicMaker.{name}: cancelled after {done} of {total}")
        if (piece := next(pieces, None)) is None:
            return
        done += piece.shape[-1]
        if on_piece is not None:
            on_piece(done, total)
        yield piece
