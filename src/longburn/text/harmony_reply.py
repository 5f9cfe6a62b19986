"""What a model says in Harmony: the messages of one reply, read token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from longburn.text.harmony import ASSISTANT, STOP_TOKENS
from longburn.text.o200k import CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START


@dataclass
class HarmonyMessage:
    """One message of a reply.

    Attributes:
        author: "assistant", unless the model speaks for somebody else.
        channel: "analysis" (thinking), "commentary" (about and to tools), "final" (the answer); None if none is named.
        recipient: the tool that is called.
        content_type: how the content is written, such as "json".
        content: its bytes so far.
        tokens: as they were made: header and content, without `<|start|>` and what ends the message.
        end: the token that ended it; None if the reply was cut off before.
        headed: whether the header was over. If not, all text of the message counts as its content.
    """

    author: str = "assistant"
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    content: bytearray = field(default_factory=bytearray)
    tokens: list[int] = field(default_factory=list)
    end: int | None = None
    headed: bool = True

    @property
    def text(self) -> str:
        """The content as text; bytes that are not UTF-8 become U+FFFD."""
        return self.content.decode("utf-8", "replace")


class HarmonyParser:
    """Reads a reply by its token ids, from behind the prompt's `<|start|>assistant`.

    It takes any tokens at all, because a model may make any: text outside a message is a message without a channel, a
    message that is not ended is ended by the next `<|start|>`. Nothing but headers and special tokens is left out.

    Args:
        token_bytes: the exact bytes of a token, none for a special one (`Tokenizer.token_bytes`).

    Attributes:
        messages: those that are over.
        open: the one whose content is being written; None within a header and between messages.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._header: list[int] | None = [ASSISTANT]
        self.messages: list[HarmonyMessage] = []
        self.open: HarmonyMessage | None = None

    def feed(self, token: int) -> bytes:
        """Takes one more token; returns what it adds to the content of the message `open`."""
        if token in (END, *STOP_TOKENS):
            self.close(token)
        elif token == START:
            self.close()
            self._header = []
        elif self._header is not None and token == MESSAGE:
            self.open = self._headed(self._header)
            self.open.tokens = [*self._header, token]
            self._header = None
        elif self._header is not None:
            self._header.append(token)
        else:
            self.open = self.open or HarmonyMessage()
            self.open.tokens.append(token)
            data = self._token_bytes(token)
            self.open.content += data
            return data
        return b""

    def close(self, end: int | None = None) -> None:
        """Ends the message in work, if there is one: by the token `end`, or by being cut off."""
        message, header = self.open, self._header
        if header is not None and (end is not None or header not in ([], [ASSISTANT])):
            message = self._headed(header)
            message.headed = False
            if CHANNEL not in header:  # plain text, as far as one can tell
                message.content += b"".join(map(self._token_bytes, header[header[:1] == [ASSISTANT] :]))
        if message is not None:
            message.end = end
            self.messages.append(message)
        self.open = self._header = None

    def _headed(self, header: list[int]) -> HarmonyMessage:
        """The message of a header: `author[ to=tool][<|channel|>name[ to=tool]][ <|constrain|>type]`."""
        author, channel, kind = (self._words(header, mark) for mark in (None, CHANNEL, CONSTRAIN))
        calls = [word.removeprefix("to=") for word in (*author, *channel, *kind) if word.startswith("to=")]
        author, channel, kind = ([w for w in words if not w.startswith("to=")] for words in (author, channel, kind))
        kind += channel[1:] + author[1:]
        return HarmonyMessage(
            author=author[0] if author else "assistant",
            channel=channel[0] if channel else None,
            recipient=calls[0] if calls else None,
            content_type=kind[0] if kind else None,
            tokens=header,
        )

    def _words(self, header: list[int], mark: int | None) -> list[str]:
        """The words of a header behind `mark` (None: in front of all marks)."""
        data, section = b"", None
        for token in header:
            section = token if token in (CHANNEL, CONSTRAIN) else section
            data += self._token_bytes(token) if section == mark else b""
        return data.decode("utf-8", "replace").split()


def reply_tokens(messages: Sequence[HarmonyMessage]) -> list[int]:
    """What of a reply stays in the conversation, from `<|start|>assistant` on.

    A reply that came to its final message leaves its thinking behind; tool calls, and replies that were cut off before
    the answer, keep it. Tokens stay as they were made; `<|end|>` takes the place of `<|return|>`, and ends what was cut
    off.
    """
    answered = any(message.channel == "final" for message in messages[-1:])
    ids: list[int] = []
    for message in messages:
        if answered and message.channel == "analysis" and message.recipient is None:
            continue
        ids += [START, *message.tokens]
        ids += [] if message.headed else [MESSAGE]
        ids += [END if message.end in (None, RETURN) else message.end]
    return ids
