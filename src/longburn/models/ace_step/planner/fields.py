"""The fields of a plan, in the order in which the model writes them, and the values that it knows."""

from collections.abc import Mapping
from dataclasses import dataclass

# fmt: off
LANGUAGES = (
    "ar", "az", "bg", "bn", "ca", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hr",
    "ht", "hu", "id", "is", "it", "ja", "ko", "la", "lt", "ms", "ne", "nl", "no", "pa", "pl", "pt", "ro",
    "ru", "sa", "sk", "sr", "sv", "sw", "ta", "te", "th", "tl", "tr", "uk", "ur", "vi", "yue", "zh", "unknown",
)
# fmt: on
KEYSCALES = tuple(
    f"{note}{accidental} {mode}"
    for note in "ABCDEFG"
    for accidental in ("", "#", "b", "♯", "♭")
    for mode in ("major", "minor")
)
TIME_SIGNATURES = ("2", "3", "4", "6")
BPM = range(30, 301)
DURATIONS = range(10, 601)


@dataclass(frozen=True)
class Choice:
    """A field whose value is one of several.

    Args:
        values: all of them.
        surest_first: the value's first token is the most likely one instead of a draw.
    """

    values: tuple[str, ...]
    surest_first: bool = False


@dataclass(frozen=True)
class Text:
    """A field of free text.

    Args:
        lines: whether it may go on in indented lines, as YAML folds long texts; it ends where a line is not.
        most_tokens: after these it ends.
    """

    lines: bool
    most_tokens: int = 512


FIELDS: Mapping[str, Choice | Text] = {
    "bpm": Choice(tuple(map(str, BPM))),
    "caption": Text(lines=True),
    "duration": Choice(tuple(map(str, DURATIONS))),
    "genres": Text(lines=False),
    "keyscale": Choice(KEYSCALES),
    "language": Choice(LANGUAGES, surest_first=True),
    "timesignature": Choice(TIME_SIGNATURES),
}


def check_bpm(bpm: int) -> int:
    """Refuse what is not a whole number of 30 to 300 beats a minute."""
    if isinstance(bpm, bool) or not isinstance(bpm, int) or bpm not in BPM:
        raise ValueError(f"ACE-Step: bpm {bpm!r}, wanted a whole number from {BPM[0]} to {BPM[-1]}")
    return bpm


def read_keyscale(key: str) -> str:
    """A key as the model spells it, from any case.

    Raises:
        ValueError: it is none of the 70.
    """
    words = " ".join(key.split())
    found = {known.casefold(): known for known in KEYSCALES}.get(words.casefold())
    if found is None:
        raise ValueError(
            f"ACE-Step: key {key!r}, wanted a note A to G, then nothing, # or b, then ' major' or ' minor': 'F# minor'"
        )
    return found


def read_language(language: str) -> str:
    """A language's code, from any case.

    Raises:
        ValueError: it is none of the 51.
    """
    code = language.strip().lower()
    if code not in LANGUAGES:
        raise ValueError(f"ACE-Step: language {language!r}, wanted one of {' '.join(LANGUAGES)}")
    return code


def read_time(signature: str) -> str:
    """Beats of a bar: "4" from "4" and "4/4", "6" from "6/8".

    Raises:
        ValueError: it is not 2, 3, 4 or 6.
    """
    beats, _, unit = signature.strip().partition("/")
    if beats not in TIME_SIGNATURES or unit not in ("", "8" if beats == "6" else "4"):
        raise ValueError(f"ACE-Step: time signature {signature!r}, wanted 2/4, 3/4, 4/4 or 6/8")
    return beats
