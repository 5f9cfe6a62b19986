"""From messages to the prompt that a model was tuned on, by the Jinja template that comes with it.

A template is a program from a model file: it runs in Jinja's sandbox, without access to Python's internals, but
nothing bounds its time. What a message merely quotes, such as `<|im_end|>` in a user's text, cannot end a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from longburn.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""`role` and what the template knows besides, mostly `content`."""


class ChatTemplateError(ValueError):
    """A chat template is missing, is not valid, or refuses the messages."""


def render_chat(
    template: str | None,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    bos: str = "",
    eos: str = "",
    now: datetime | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation as the template lays it out.

    Args:
        template: Jinja source. None is an error that says so, for models that were not tuned for chat.
        messages: each with a `role`.
        add_generation_prompt: end with what begins a reply.
        bos, eos: what the template sees as `bos_token` and `eos_token`.
        now: the time that `strftime_now` formats; None is the present.
        variables: further names for the template, such as `tools`.

    Raises:
        ChatTemplateError: with the line of the template where that is known.
    """
    if template is None:
        raise ChatTemplateError("the model has no chat template: give it plain text, or take a model tuned for chat")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(f"message {i} is {message!r}, wanted a mapping with a text 'role'")

    def strftime_now(form: str) -> str:
        return (now or datetime.now()).strftime(form)

    try:
        return _compile(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=bos,
            eos_token=eos,
            strftime_now=strftime_now,
            **variables,
        )
    except ChatTemplateError:
        raise
    except TemplateError as error:
        where = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
        raise ChatTemplateError(f"chat template{where}: {error.message or type(error).__name__}") from error
    except Exception as error:  # what the template's own operations raise: adding None to a text, say
        raise ChatTemplateError(f"chat template: {type(error).__name__}: {error}") from error


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> ChatPrompt:
    """The prompt of a conversation for the model that `tokenizer` belongs to; options are those of `render_chat`.

    Special tokens in the messages are quoted text, wherever they stand; only the template's own ones count.

    Raises:
        ChatTemplateError: as `render_chat`.
    """
    spoken = "".join(_strings(messages))
    quoted = [token for token in tokenizer.special_tokens if token in spoken]
    taken = set(spoken) | set(tokenizer.chat_template or "")
    private = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in taken)
    marks = dict(zip(quoted, private, strict=False))

    def special(id: int | None) -> str:
        return tokenizer.decode([id], special=True) if id is not None else ""

    marked = render_chat(
        tokenizer.chat_template,
        _mark(messages, marks) if marks else messages,
        **{"bos": special(tokenizer.bos), "eos": special(tokenizer.eos)} | options,
    )
    return ChatPrompt(tokenizer, marked, {mark: token for token, mark in marks.items()})


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation that knows which special tokens are the template's and which a message only quotes.

    Attributes:
        marked: the text, with one private character in place of each quoted special token.
        quoted: what those characters stand for.
    """

    tokenizer: Tokenizer
    marked: str
    quoted: Mapping[str, str]

    @property
    def text(self) -> str:
        """The text as it would be printed."""
        return self._unmark(self.marked)

    def after(self, marker: str) -> ChatPrompt:
        """The part behind the last `marker`: what a cache has yet to read, if `marker` stands for the last reply.

        Raises:
            ValueError: `marker` is not in the text.
        """
        _, found, rest = self.marked.rpartition(marker)
        if not found:
            raise ValueError(f"the prompt does not contain {marker!r}")
        return replace(self, marked=rest)

    def encode(self) -> list[int]:
        """The token ids. Quoted special tokens are spelled out in ordinary tokens."""
        if not self.quoted:
            return self.tokenizer.encode(self.marked)
        ids: list[int] = []
        for piece in self.tokenizer.cut_at_special(self.marked):
            ids += [piece] if isinstance(piece, int) else self.tokenizer.encode(self._unmark(piece), special=False)
        return ids

    def _unmark(self, text: str) -> str:
        for mark, token in self.quoted.items():
            text = text.replace(mark, token)
        return text


def _strings(value: Any) -> list[str]:
    """Every text within nested messages."""
    if isinstance(value, str):
        return [value]
    inner = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []
    return [text for item in inner for text in _strings(item)]


def _mark(value: Any, marks: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        # The longest first: one special token may begin another.
        pattern = "|".join(re.escape(token) for token in sorted(marks, key=len, reverse=True))
        return re.sub(pattern, lambda found: marks[found[0]], value)
    if isinstance(value, Mapping):
        return {key: _mark(item, marks) for key, item in value.items()}
    return [_mark(item, marks) for item in value] if isinstance(value, list | tuple) else value


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; for a prompt it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's `namespace`, less the names with which a template could pose as one of Python's own objects."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r}: names with a leading underscore are not allowed")
        super().__setitem__(name, value)


def _namespace(*args: Any, **values: Any) -> _Namespace:
    space = _Namespace()
    for name, value in dict(*args, **values).items():
        space[name] = value
    return space


def _raise_exception(message: str) -> NoReturn:
    raise ChatTemplateError(f"the chat template refuses these messages: {message}")


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own one escapes for HTML


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "namespace": _namespace}
    return environment


@cache
def _compile(template: str) -> Template:
    return _environment().from_string(template)
