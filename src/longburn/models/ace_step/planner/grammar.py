"""What may come next while the model writes the fields of a plan.

A plan is a coroutine: it yields what may come, and is sent what came. What can only come in one way is not drawn: its
tokens are read by the model together with the next ones.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

from longburn.models.ace_step.planner.fields import FIELDS, Choice, Text
from longburn.text import Tokenizer


@dataclass(frozen=True)
class Forced:
    """These tokens come next."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Draw:
    """One token is drawn and sent back.

    Args:
        allowed: of these; None for all but codes (and but the ids in `banned`).
        surest: the most likely one of them.
        banned: further ids that must not come.
        ends: asked with the most likely token before anything is masked; if True, nothing is drawn and -1 is sent.
    """

    allowed: tuple[int, ...] | None = None
    surest: bool = False
    banned: tuple[int, ...] = ()
    ends: Callable[[int], bool] | None = None


Writing = Generator[Forced | Draw, int, dict[str, str]]
"""Returns the text of every field (and of `lyrics`)."""


class Grammar:
    """Plans over one tokenizer's tokens.

    Args:
        tokenizer: the model's.
        end: the token that ends a turn.

    Raises:
        ValueError: the tokenizer joins a field's name with its value.
    """

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self._tokenizer, self._end = tokenizer, end
        self._newline = self._encode("\n")[-1]
        self._fence = self._encode("`")[-1]  # a caption is no code
        self._trees = {
            name: self._tree(name, field.values) for name, field in FIELDS.items() if isinstance(field, Choice)
        }

    def write(self, given: Mapping[str, str], *, without: Iterable[str] = (), lyrics: int = 0) -> Writing:
        """The fields in their order.

        Args:
            given: values that are put in as they are.
            without: fields that are left out.
            lyrics: at most so many tokens of lyrics after the fields.
        """
        values: dict[str, str] = {}
        yield Forced(self._encode("<think>\n"))
        for name in FIELDS:
            if name not in without:
                yield Forced(self._encode(f"{name}:"))
                values[name] = yield from self._given(name, given[name]) if name in given else self._value(name)
        yield Forced(self._encode("</think>"))
        if lyrics:
            values["lyrics"] = yield from self._lyrics(lyrics)
        return values

    def _given(self, name: str, value: str) -> Generator[Forced | Draw, int, str]:
        line = " ".join(value.split())
        yield Forced(self._after(name, f"{line}\n"))
        return line

    def _value(self, name: str) -> Generator[Forced | Draw, int, str]:
        field = FIELDS[name]
        tokens = yield from self._choice(name, field) if isinstance(field, Choice) else self._text(field)
        lines = self._tokenizer.decode(tokens).split("\n")
        return " ".join(line.strip() for line in lines if line.strip())

    def _choice(self, name: str, field: Choice) -> Generator[Forced | Draw, int, list[int]]:
        tree, made = self._trees[name], list[int]()
        while True:
            allowed = tree[tuple(made)]
            if len(allowed) == 1:
                yield Forced(allowed)
                token = allowed[0]
            else:
                token = yield Draw(allowed, surest=field.surest_first and not made)
            if token == self._newline:
                return made
            made.append(token)

    def _text(self, field: Text) -> Generator[Forced | Draw, int, list[int]]:
        made: list[int] = []
        banned = (self._fence, self._end)
        while len(made) < field.most_tokens:
            if made and self._bytes(made[-1]).endswith(b"\n"):  # a line begins: indented, or the text is over
                token = yield Draw(surest=True, banned=banned, ends=self._begins_a_field if field.lines else _always)
                if token < 0:
                    return made
            else:
                empty = not self._tokenizer.decode(made).strip()
                token = yield Draw(banned=(*banned, self._newline) if empty else banned)
            made.append(token)
        yield Forced((self._newline,))
        return made

    def _lyrics(self, most: int) -> Generator[Forced | Draw, int, str]:
        made: list[int] = []
        while len(made) < most:
            token = yield Draw()
            if token == self._end:
                break
            made.append(token)
        text = self._tokenizer.decode(made).strip()
        head, _, rest = text.partition("\n")
        return rest.strip() if head.lower().split() in (["#", "lyric"], ["#", "lyrics"]) else text

    def _begins_a_field(self, token: int) -> bool:
        return token >= self._tokenizer.vocab_size or self._bytes(token)[:1] not in (b" ", b"\t")

    def _tree(self, name: str, values: Sequence[str]) -> dict[tuple[int, ...], tuple[int, ...]]:
        """The tokens that may follow each beginning of a value; a newline ends it."""
        tree: dict[tuple[int, ...], list[int]] = {}
        for value in values:
            tokens = (*self._after(name, value), self._newline)
            for at, token in enumerate(tokens):
                known = tree.setdefault(tokens[:at], [])
                if token not in known:
                    known.append(token)
        return {begin: tuple(sorted(tokens)) for begin, tokens in tree.items()}

    def _after(self, name: str, value: str) -> tuple[int, ...]:
        """The tokens of a value after its field's name: with the space between them, however it is cut."""
        named, full = self._encode(f"{name}:"), self._encode(f"{name}: {value}")
        if full[: len(named)] != named:
            raise ValueError(f"Grammar: the tokenizer cuts {name + ': ' + value!r} elsewhere than after {name + ':'!r}")
        return full[len(named) :]

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, special=False))

    def _bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token)


def _always(_: int) -> bool:
    return True
