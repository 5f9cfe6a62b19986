"""How the tokens of a reply become text to show: as they stand, or message by message in Harmony."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from longburn.generation import GenerationConfig, TokenEvent
    from longburn.text import HarmonyMessage, Tokenizer


@dataclass(frozen=True)
class Piece:
    """Text that can be shown now. `label` is None for the answer itself, and names whatever is shown apart from it."""

    text: str
    label: str | None = None


@dataclass
class Spoken:
    """One message of a reply in a format that has messages."""

    channel: str | None
    recipient: str | None
    content_type: str | None
    text: str = ""

    @property
    def label(self) -> str | None:
        """What a reader should know of it; None if it is the answer."""
        if self.channel in (None, "final") and self.recipient is None:
            return None
        words = [self.channel, self.recipient and f"to {self.recipient}", self.content_type]
        return " ".join(word for word in words if word)


class Reading(Protocol):
    """Reads one reply.

    Attributes:
        config: where the loop stops.
        speller: gives the loop the text of tokens, if it is the loop that makes text of them.
        spoken: the messages so far, in a format that has messages.
        stopped: whether the reply is over for a reason that the loop does not see.
    """

    @property
    def config(self) -> "GenerationConfig": ...

    @property
    def speller(self) -> "Tokenizer | None": ...

    @property
    def spoken(self) -> list[Spoken]: ...

    @property
    def stopped(self) -> bool: ...

    def take(self, event: "TokenEvent") -> list[Piece]:
        """What one more event makes fit to show."""
        ...


class PlainReading:
    """A reply is the text of its tokens."""

    def __init__(self, config: "GenerationConfig", tokenizer: "Tokenizer") -> None:
        self.config, self.speller = config, tokenizer
        self.spoken: list[Spoken] = []
        self.stopped = False

    def take(self, event: "TokenEvent") -> list[Piece]:
        return [Piece(event.text)] if event.text else []


class HarmonyReading:
    """A reply is messages on channels. Stop strings are looked for in the content of each, not in headers.

    Args:
        config: of the run; its stop tokens give way to Harmony's.
        tokenizer: one that speaks Harmony.
        on_second: called when the second token is made, and so the first one is in the cache.
    """

    def __init__(
        self, config: "GenerationConfig", tokenizer: "Tokenizer", on_second: Callable[[], None] = lambda: None
    ) -> None:
        from longburn.text import HarmonyParser
        from longburn.text.harmony import STOP_TOKENS

        self.config = replace(config, stop_tokens=STOP_TOKENS, stop_strings=())
        self.speller = None
        self.parser = HarmonyParser(tokenizer.token_bytes)
        self.spoken: list[Spoken] = []
        self.stopped = False
        self._stop_strings, self._on_second = config.stop_strings, on_second
        self._taken = 0
        self._message: HarmonyMessage | None = None

    def take(self, event: "TokenEvent") -> list[Piece]:
        before = len(self.parser.messages)
        if event.token >= 0:
            self._taken += 1
            if self._taken == 2:
                self._on_second()
            self.parser.feed(event.token)
        if event.finish is not None:
            self.parser.close()
        over = self.parser.messages[before:]
        pieces = [self._say(message, over=True) for message in over]
        if self.parser.open is not None:
            pieces.append(self._say(self.parser.open, over=False))
        return [piece for piece in pieces if piece.text]

    def _say(self, message: "HarmonyMessage", *, over: bool) -> Piece:
        """What of the message has not been said yet, and is whole."""
        from longburn.generation.stop import TextStream

        if message is not self._message:
            self._message, self._said = message, 0
            self._text = TextStream(self._stop_strings)
            self.spoken.append(Spoken(message.channel, message.recipient, message.content_type))
        text = self._text.feed(bytes(message.content[self._said :]))
        self._said = len(message.content)
        if over:
            text += self._text.flush()
        self.stopped = self._text.stop is not None
        self.spoken[-1].text += text
        return Piece(text, self.spoken[-1].label)
