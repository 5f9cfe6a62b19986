"""The 5 Hz language model of ACE-Step 1.5: from a caption to a plan, from a plan to audio codes, and back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from longburn.cache import CacheManager
from longburn.generation.ahead import AheadSteps, DeviceStep, runs_ahead
from longburn.generation.loop import GenerationError
from longburn.generation.steps import HostSteps, Steps
from longburn.models.ace_step.planner.codes import CODES, LONGEST, CodeModel, CodeTokens, codes_of, padded
from longburn.models.ace_step.planner.grammar import Grammar
from longburn.models.ace_step.planner.prompts import MOST_LYRIC_TOKENS, Prompts, SongPlan, SongRequest
from longburn.models.ace_step.planner.sampling import CodeRules, GuidedSampler, PlannerSampling
from longburn.models.ace_step.planner.writing import write
from longburn.models.decoder import Decoder
from longburn.models.loading import load_model
from longburn.text import Tokenizer

UNDERSTANDING = PlannerSampling(temperature=0.3, top_p=1.0, guidance=1.0)
PLANNED_FIELDS = ("bpm", "duration", "keyscale", "timesignature")  # if all are given, there is nothing to plan


class Planner:
    """Plans songs and hears them, over one model.

    Args:
        model: a decoder whose vocabulary has the codes (`Qwen3`), in `eval` mode.
        tokenizer: the model's.
        codes: valid ones; the released models have 64000.

    Raises:
        ValueError: model or tokenizer lack what it takes.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, *, codes: int = CODES) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.tokens = CodeTokens.of(tokenizer, codes)
        self.prompts = Prompts(tokenizer, self.tokens)
        self._codes = CodeModel(model, self.tokens)
        self._grammar = Grammar(tokenizer, self.tokens.end)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
        codes: int = CODES,
    ) -> "Planner":
        """From a directory with `config.json`, safetensors and `tokenizer.json`; see `load_model` and the class."""
        loaded = load_model(path, dtype=dtype, device=device, progress=progress)
        return cls(loaded.model, loaded.tokenizer, codes=codes)

    def plan(
        self,
        request: SongRequest,
        sampling: PlannerSampling | None = None,
        *,
        caption: bool = True,
        language: bool = True,
    ) -> SongPlan:
        """Phase 1: decide what the request leaves open. If it leaves open nothing but texts, the plan is what it says.

        Args:
            request: what is asked for.
            sampling: default `PlannerSampling()`.
            caption: whether the plan has a caption of its own.
            language: whether the plan names a language that the request does not.

        Raises:
            ValueError: lyrics that are too long.
            GenerationError: the model gave nothing to choose from.
        """
        self._check(request)
        given, sampling = request.given, sampling or PlannerSampling()
        if all(name in given for name in PLANNED_FIELDS):
            return SongPlan.of(given)
        prompts = [self.prompts.plan(request)]
        if sampling.guided:
            prompts.append(self.prompts.plan_without(request))
        without = {"genres"} | ({"caption"} if not caption else set()) | ({"language"} if not language else set())
        writing = self._grammar.write(given, without=without - set(given))
        return SongPlan.of(write(self.model, prompts, writing, sampling, self.tokens.first))

    def understand(self, codes: Sequence[int], sampling: PlannerSampling = UNDERSTANDING) -> tuple[SongPlan, str]:
        """What codes sound like, and their lyrics.

        Raises:
            ValueError: no codes, codes that are not valid, or guidance, for which there is no other prompt.
            GenerationError: as `plan`.
        """
        if not codes or len(codes) > codes_of(LONGEST) or sampling.guided:
            raise ValueError(
                f"Planner.understand: {len(codes)} codes, guidance {sampling.guidance}: wanted 1 to "
                f"{codes_of(LONGEST)} codes, and guidance 1 (off)"
            )
        writing = self._grammar.write({}, lyrics=MOST_LYRIC_TOKENS)
        values = write(self.model, [self.prompts.understand(codes)], writing, sampling, self.tokens.first)
        lyrics = values.pop("lyrics")
        return SongPlan.of(values), lyrics

    def codes(
        self, songs: Sequence[tuple[SongRequest, SongPlan]], sampling: PlannerSampling | None = None
    ) -> list[list[int]]:
        """Phase 2: all codes of each planned song; see `stream_codes`."""
        made: list[list[int]] = [[] for _ in songs]
        for step in self.stream_codes(songs, sampling):
            for song, code in zip(made, step, strict=True):
                if code is not None:
                    song.append(code)
        return made

    def stream_codes(
        self,
        songs: Sequence[tuple[SongRequest, SongPlan]],
        sampling: PlannerSampling | None = None,
        *,
        free_end: bool = False,
    ) -> Iterator[list[int | None]]:
        """Phase 2: the codes of planned songs, five a second, made together; `int(5 * duration)` of each.

        On CUDA a step is one graph from codes to the next ones, and the device runs one step ahead of what is given.

        Args:
            songs: what was asked for, and `plan`'s answer. The request's duration counts, else the plan's.
            sampling: default `PlannerSampling()`. Song i of the batch has seed `seed + i`, and gives what it would give
                alone.
            free_end: let the model end a song by itself, after 600 s at the latest.

        Returns:
            An iterator of steps: every song's next code, None after its end. Arguments are checked at once.

        Raises:
            ValueError: no songs, a duration that is missing or outside 10 to 600 s, lyrics that are too long.
            GenerationError: (while iterating) the model gave nothing to choose from.
        """
        if not songs:
            raise ValueError("Planner.stream_codes: no songs; give at least one request and its plan")
        for request, _ in songs:
            self._check(request)
        most = [codes_of(LONGEST if free_end else _duration(*song)) for song in songs]
        sampling = sampling or PlannerSampling()
        prompts = [self.prompts.codes(*song) for song in songs]
        if sampling.guided:
            prompts += [self.prompts.codes_without(request) for request, _ in songs]
        return self._stream(prompts, [0] * len(songs) if free_end else most, most, sampling)

    def _stream(
        self, prompts: list[list[int]], least: list[int], most: list[int], sampling: PlannerSampling
    ) -> Iterator[list[int | None]]:
        songs, end = len(most), self.tokens.count
        cache = self.model.init_cache(len(prompts), max_length=max(map(len, prompts)) + max(most))
        with torch.no_grad():
            logits = self._codes.read(prompts, cache)
        live = set(range(songs))
        with closing(self._steps(cache, logits, prompts, least, most, sampling)) as steps:
            for made in range(1, max(most) + 1):
                if made < max(most):
                    steps.ahead()
                tokens = steps.read().tokens[:songs].tolist()
                if any(tokens[song] < 0 for song in live):
                    raise GenerationError("Planner: no logit of a code is finite; the weights may hold NaN")
                live -= {song for song in live if tokens[song] == end}
                if not live:
                    return
                yield [tokens[song] if song in live else None for song in range(songs)]
                live -= {song for song in live if made == most[song]}
                if not live:
                    return
                steps.go_on([row for row in range(len(prompts)) if row % songs in live])

    def _steps(
        self,
        cache: CacheManager,
        logits: Tensor,
        prompts: list[list[int]],
        least: list[int],
        most: list[int],
        sampling: PlannerSampling,
    ) -> Steps:
        songs, V = len(most), self._codes.vocab_size
        positions = list(map(len, prompts))
        seen = self.tokens.local(padded(prompts))  # for penalties
        ahead = runs_ahead(cache)
        device = cache.device if ahead else torch.device("cpu")
        rules = CodeRules(positions[:songs], least, most, device)
        sampler = GuidedSampler(sampling, songs=songs, vocab_size=V, rules=rules, device=device)
        if not ahead:
            return HostSteps(self._codes, cache, logits, positions, seen, sampler, None)
        step = DeviceStep(self._codes, sampler, batch=len(prompts), logprobs=None, device=device)
        last = max(positions) + max(most) - 1
        return AheadSteps(step, cache, logits, positions, seen, frozenset({self.tokens.count}), last)

    def _check(self, request: SongRequest) -> None:
        length = len(self.tokenizer.encode(request.lyrics, special=False))
        if length > MOST_LYRIC_TOKENS:
            raise ValueError(f"Planner: lyrics of {length} tokens, wanted at most {MOST_LYRIC_TOKENS}; shorten them")


def _duration(request: SongRequest, plan: SongPlan) -> float:
    duration = plan.duration if request.duration is None else request.duration
    if duration is None:
        raise ValueError("Planner.stream_codes: neither the request nor the plan says how long the song is; give it")
    return duration
