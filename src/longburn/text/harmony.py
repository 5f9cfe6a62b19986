"""Harmony, the chat format that GPT-OSS was tuned on: prompts as token ids, rendered by openai-harmony.

A conversation is a sequence of messages, each `<|start|>header<|message|>content<|end|>`. What a user writes is always
content: special tokens spelled out in it are ordinary text. There is no token in front of the first message.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

from longburn.text.o200k import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, SPECIAL_TOKENS, START, vocabulary
from longburn.text.tokenizer import Tokenizer, check_text

if TYPE_CHECKING:
    from openai_harmony import HarmonyEncoding, Message

Reasoning = Literal["low", "medium", "high"]

ASSISTANT = 173_781
REPLY = (START, ASSISTANT)
"""What ends a prompt: the model goes on with the rest of the header."""
STOP_TOKENS = frozenset({RETURN, CALL})
"""What ends a reply. `END` does not: it stands between the messages of one."""

_FRAME_IDS = {START, END, MESSAGE, CHANNEL, CONSTRAIN, *STOP_TOKENS}
_FRAME = {text: id for text, id in SPECIAL_TOKENS.items() if id in _FRAME_IDS}


def speaks_harmony(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has Harmony's special tokens at their ids, wherever it was read from."""
    return _FRAME.items() <= tokenizer.special_tokens.items()


def opening(
    *,
    reasoning: Reasoning = "medium",
    instructions: str | None = None,
    identity: str | None = None,
    knowledge_cutoff: str | None = None,
    today: date | None = None,
) -> list[int]:
    """The messages with which a conversation begins: the system's and, if there are instructions, the developer's.

    Args:
        reasoning: how much the model thinks before it answers.
        instructions: what other formats call the system prompt.
        identity, knowledge_cutoff: what the system message says of the model; None is what it was trained with.
        today: the date in the system message; None leaves it out.

    Raises:
        ValueError: an unknown `reasoning`, or text that UTF-8 cannot express.
        ImportError, StoreError: openai-harmony or the vocabulary is not on this machine.
    """
    _import_harmony()
    from openai_harmony import DeveloperContent, Message, ReasoningEffort, Role, SystemContent

    if reasoning not in get_args(Reasoning):
        raise ValueError(f"reasoning {reasoning!r}, wanted one of {', '.join(get_args(Reasoning))}")
    system = SystemContent.new().with_reasoning_effort(ReasoningEffort[reasoning.upper()])
    if identity is not None:
        system = system.with_model_identity(_checked(identity, "identity"))
    if knowledge_cutoff is not None:
        system = system.with_knowledge_cutoff(_checked(knowledge_cutoff, "knowledge_cutoff"))
    if today is not None:
        system = system.with_conversation_start_date(today.isoformat())
    ids = _render(Message.from_role_and_content(Role.SYSTEM, system))
    if instructions is not None:
        developer = DeveloperContent.new().with_instructions(_checked(instructions, "instructions"))
        ids += _render(Message.from_role_and_content(Role.DEVELOPER, developer))
    return ids


def user_turn(text: str) -> list[int]:
    """A user's message.

    Raises:
        ValueError: text that UTF-8 cannot express.
        ImportError, StoreError: as `opening`.
    """
    _import_harmony()
    from openai_harmony import Message, Role

    return _render(Message.from_role_and_content(Role.USER, _checked(text, "user_turn")))


def _render(message: Message) -> list[int]:
    """One message of openai-harmony's, as token ids."""
    return list(_encoding().render(message))


def _checked(text: str, name: str) -> str:
    check_text(text, name)
    return text


def _import_harmony() -> None:
    """Raises ImportError, with what to do, unless openai-harmony is installed."""
    try:
        import openai_harmony  # noqa: F401
    except ImportError as error:
        raise ImportError("the Harmony chat format needs openai-harmony: pip install 'longburn[harmony]'") from error


@cache
def _encoding() -> HarmonyEncoding:
    """openai-harmony's encoding, from the vocabulary on this machine."""
    _import_harmony()
    from openai_harmony import HarmonyEncodingName, load_harmony_encoding

    with _environment("TIKTOKEN_ENCODINGS_BASE", str(vocabulary().parent)):
        return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


_lock = threading.Lock()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets a variable of this process while inside: the only way to tell openai-harmony where its vocabulary lies."""
    with _lock:
        before = os.environ.get(name)
        os.environ[name] = value
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
