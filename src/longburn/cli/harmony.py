"""The turns of a conversation in Harmony, over a cache that reads only what it does not hold yet."""

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

from longburn.cli.reading import HarmonyReading

if TYPE_CHECKING:
    from longburn.cache import CacheMark
    from longburn.cli.stream import Reply, Stream


class HarmonyConversation:
    """Turns questions into the token ids that a model has yet to read, as the format has them.

    The format leaves out the thinking behind an earlier answer. So when the next question comes, the cache goes back to
    where answer and thinking parted, one token into the reply, and reads the answer again, this time right after its
    question; all before that point stays. A reply without thinking, or one that was cut off before its answer, stays
    as it was made, and nothing is read again.

    Args:
        stream: its cache belongs to this conversation alone, and is empty.
        reasoning: how much the model thinks before it answers.
        instructions: for the developer message; None leaves it out.

    Attributes:
        history: the conversation so far in its official form, without an unanswered `<|start|>assistant`.
        held: the tokens that the cache holds.
    """

    def __init__(
        self,
        stream: "Stream",
        *,
        reasoning: Literal["low", "medium", "high"] = "medium",
        instructions: str | None = None,
    ) -> None:
        from longburn.text.harmony import opening

        self.stream = stream
        self.history = opening(reasoning=reasoning, instructions=instructions)
        self.held: list[int] = []
        self._prompt: list[int] = []
        self._reading: HarmonyReading | None = None
        self._mark: CacheMark | None = None

    def ask(self, question: str) -> list[int]:
        """The token ids that have yet to be read for this turn. The cache may go back for them."""
        from longburn.text.harmony import REPLY, user_turn

        self._prompt = [*self.history, *user_turn(question), *REPLY]
        return self._prompt[self._go_back(common_length(self.held, self._prompt[:-1])) :]

    def reading(self) -> HarmonyReading:
        """What reads the reply that comes now."""
        self._reading = HarmonyReading(self.stream.config, self.stream.loaded.tokenizer, self._remember)
        return self._reading

    def said(self, reply: "Reply") -> None:
        """Takes note of the reply."""
        from longburn.text.harmony import REPLY
        from longburn.text.harmony_reply import reply_tokens

        assert self._reading is not None
        self._reading.parser.close()
        self.held = [*self._prompt, *reply.tokens][: self.stream.cache.position]
        self.history = self._prompt[: -len(REPLY)] + reply_tokens(self._reading.parser.messages)

    def _remember(self) -> None:
        """Marks the place behind the reply's first token, `<|channel|>`, where thinking and answer part."""
        from longburn.cache import CacheMark

        self._mark = CacheMark(self.stream.cache)

    def _go_back(self, length: int) -> int:
        """Brings the cache to its first `length` tokens, or as few less as it can; returns how many it then holds."""
        cache = self.stream.cache
        try:
            cache.rewind(cache.position - length)
        except ValueError:  # a window has rolled on since
            if self._mark is not None and self._mark.position <= length:
                self._mark.restore()
            else:
                cache.reset()
        return cache.position


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items agree."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
