"""The turns of a conversation as tokens, such that what a cache has read is never read again."""

import secrets
from typing import TYPE_CHECKING, Protocol

from longburn.cli.harmony import HarmonyConversation
from longburn.cli.reading import PlainReading, Reading

if TYPE_CHECKING:
    from longburn.cli.options import RunOptions
    from longburn.cli.stream import Reply, Stream


class Conversation(Protocol):
    """What `chat` needs of a chat format."""

    def ask(self, question: str) -> list[int]:
        """The token ids that have yet to be read for this turn."""
        ...

    def reading(self) -> Reading:
        """What reads the reply that comes now."""
        ...

    def said(self, reply: "Reply") -> None:
        """Takes note of the reply."""
        ...


def converse(stream: "Stream", options: "RunOptions") -> Conversation:
    """A new conversation in the format that the model was tuned on.

    Raises:
        ValueError: the model was not tuned for chat, or does not know an option that was given.
    """
    from longburn.text import speaks_harmony
    from longburn.text.o200k import keep_vocabulary

    name = stream.loaded.name
    if speaks_harmony(stream.loaded.tokenizer):
        keep_vocabulary(stream.loaded.tokenizer)
        return HarmonyConversation(stream, reasoning=options.reasoning or "medium", instructions=options.system)
    if stream.loaded.tokenizer.chat_template is None:
        raise ValueError(
            f"model {name} is not tuned for chat, it has no chat template: use 'longburn generate --raw', "
            "or a model tuned for chat"
        )
    if options.reasoning is not None:
        raise ValueError(
            f"--reasoning {options.reasoning}: model {name} does not know a reasoning effort, as GPT-OSS does; "
            "leave it out"
        )
    return TemplateConversation(stream, instructions=options.system)


class TemplateConversation:
    """Turns questions into the token ids that a model has yet to read, by its chat template.

    The chat template sees a placeholder for each reply: the replies themselves stand in the cache, token for token as
    they were made, and only what the template puts after the last one is new. So a template that would edit an
    earlier reply (trim it, say) cannot make it be read again.

    Args:
        stream: its cache belongs to this conversation alone, and is empty.
        instructions: the system's message; None leaves it to the template.
    """

    def __init__(self, stream: "Stream", *, instructions: str | None = None) -> None:
        self.stream = stream
        self.messages = [] if instructions is None else [{"role": "system", "content": instructions}]
        self.reply = f"reply {secrets.token_hex(8)}"  # the placeholder: nothing that a question could contain
        self.unread: list[int] = []  # tokens said, but not in the cache: the last one of a reply that was cut off
        self._prompt: list[int] = []
        self._before = 0

    def ask(self, question: str) -> list[int]:
        """The token ids that have yet to be read for this turn."""
        from longburn.text import chat_prompt

        answered = any(message["role"] == "assistant" for message in self.messages)
        self.messages.append({"role": "user", "content": question})
        prompt = chat_prompt(self.stream.loaded.tokenizer, self.messages)
        if answered:
            prompt = prompt.after(self.reply)
        self.messages.append({"role": "assistant", "content": self.reply})
        self._prompt, self._before = self.unread + prompt.encode(), self.stream.cache.position
        return self._prompt

    def reading(self) -> PlainReading:
        """What reads the reply that comes now."""
        return PlainReading(self.stream.config, self.stream.loaded.tokenizer)

    def said(self, reply: "Reply") -> None:
        """Takes note of the reply, of which the cache may not have read the end."""
        self.unread = [*self._prompt, *reply.tokens][self.stream.cache.position - self._before :]
