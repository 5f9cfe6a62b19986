"""What the 5 Hz language model reads: turns of chat in the words that it was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longburn.models.ace_step.planner.codes import CodeTokens, check_duration
from longburn.models.ace_step.planner.fields import check_bpm, read_keyscale, read_language, read_time
from longburn.text import Tokenizer

GENERATE = "Generate audio semantic tokens based on the given conditions:"
UNDERSTAND = "Understand the given musical conditions and describe the audio semantics accordingly:"
MOST_LYRIC_TOKENS = 2048  # that the generator's own lyric encoder reads


@dataclass(frozen=True)
class SongRequest:
    """What is asked for. What is None is for the model to decide.

    Args:
        caption: style, instruments, mood.
        lyrics: with section names in brackets.
        negative: a caption of what the music should not be; guidance leads away from it. None leads away from a prompt
            without what was asked for.
        bpm: 30 to 300.
        duration: seconds, 10 to 600.
        keyscale: such as "F# minor", one of 70.
        language: code of the lyrics' language, one of 51.
        timesignature: 2, 3, 4 or 6, also as "3/4".

    Raises:
        ValueError: a value that is not one of these.
    """

    caption: str
    lyrics: str = "[Instrumental]"
    negative: str | None = None
    bpm: int | None = None
    duration: float | None = None
    keyscale: str | None = None
    language: str | None = None
    timesignature: str | int | None = None

    def __post_init__(self) -> None:
        readers = {"keyscale": read_keyscale, "language": read_language, "timesignature": read_time}
        for name in ("caption", "lyrics", "negative"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name != "negative" or value is not None):
                raise ValueError(f"SongRequest: {name} is {value!r}, wanted a string")
        for name, read in readers.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, read(str(value)))
        if self.bpm is not None:
            check_bpm(self.bpm)
        if self.duration is not None:
            check_duration(self.duration)

    @property
    def given(self) -> dict[str, str]:
        """What the plan must say, by field."""
        values = {
            "bpm": self.bpm,
            "duration": None if self.duration is None else int(self.duration),
            "keyscale": self.keyscale,
            "language": self.language,
            "timesignature": self.timesignature,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class SongPlan:
    """What the model has decided before the first code, or what it heard in codes. None was left out."""

    bpm: int | None = None
    caption: str | None = None
    duration: int | None = None
    genres: str | None = None
    keyscale: str | None = None
    language: str | None = None
    timesignature: str | None = None

    @classmethod
    def of(cls, values: dict[str, str]) -> "SongPlan":
        """From the text of the fields."""
        numbers: dict[str, Any] = {name: int(values[name]) for name in ("bpm", "duration") if name in values}
        return cls(**values | numbers)

    def thoughts(self) -> str:
        """The plan as the model writes it for itself: YAML between think tags. Genres are not part of it."""
        import yaml  # type: ignore[import-untyped]

        names = ("bpm", "caption", "duration", "keyscale", "language", "timesignature")
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        numbers = {name: int(value) if str(value).isdecimal() else value for name, value in values.items()}
        lines = yaml.dump(numbers, allow_unicode=True, sort_keys=True).strip() if numbers else ""
        return f"<think>\n{lines}\n</think>\n\n"


class Prompts:
    """Prompts as token ids. Special tokens that a user writes are ordinary text.

    Args:
        tokenizer: the model's.
        tokens: where codes are.

    Raises:
        ValueError: the tokenizer has no tokens for turns of chat.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: CodeTokens) -> None:
        self._tokenizer, self._tokens = tokenizer, tokens
        begin = tokenizer.encode("<|im_start|>")
        if len(begin) != 1:
            raise ValueError("Prompts: the tokenizer has no token <|im_start|>; take that of the language model")
        self._begin = begin[0]

    def plan(self, request: SongRequest) -> list[int]:
        """Before the fields of a plan."""
        return self._chat(GENERATE, _asked(request.caption, request.lyrics))

    def plan_without(self, request: SongRequest) -> list[int]:
        """The same to lead away from: without the caption, or with the negative one."""
        asked = _asked(request.negative, request.lyrics) if _said(request.negative) else _lyric(request.lyrics)
        return self._chat(GENERATE, asked)

    def codes(self, request: SongRequest, plan: SongPlan) -> list[int]:
        """Before the codes of a planned song."""
        return self._chat(GENERATE, _asked(request.caption, request.lyrics), plan)

    def codes_without(self, request: SongRequest) -> list[int]:
        """The same to lead away from: with an empty plan, and with the negative caption if there is one."""
        caption = request.negative if _said(request.negative) else request.caption
        return self._chat(GENERATE, _asked(caption, request.lyrics), SongPlan())

    def understand(self, codes: Sequence[int]) -> list[int]:
        """Before the fields that describe codes, and their lyrics."""
        return self._chat(UNDERSTAND, "", codes=self._tokens.tokens(codes))

    def _chat(self, instruction: str, asked: str, plan: SongPlan | None = None, codes: Sequence[int] = ()) -> list[int]:
        ids = self._turn("system", f"# Instruction\n{instruction}\n\n") + self._turn("user", asked, codes)
        reply = [self._begin, *self._encode("assistant\n")]
        return ids + (reply if plan is None else self._turn("assistant", plan.thoughts()))

    def _turn(self, role: str, text: str, ids: Sequence[int] = ()) -> list[int]:
        return [self._begin, *self._encode(f"{role}\n{text}"), *ids, self._tokens.end, *self._encode("\n")]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=False)


def _asked(caption: str | None, lyrics: str) -> str:
    return f"# Caption\n{caption}\n\n{_lyric(lyrics)}"


def _lyric(lyrics: str) -> str:
    return f"# Lyric\n{lyrics}\n"


def _said(negative: str | None) -> bool:
    return negative is not None and bool(negative.strip())
