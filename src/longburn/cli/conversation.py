"""The turns of a conversation as tokens, such that what a cache has read is never read again."""

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longburn.models import LoadedModel


class Conversation:
    """Turns questions into the token ids that a model has yet to read.

    The chat template sees a placeholder for each reply: the replies themselves stand in the cache, token for token as
    they were made, and only what the template puts after the last one is new. So a template that would edit an
    earlier reply (trim it, say) cannot make it be read again.

    Raises:
        ValueError: the model has no chat template.
    """

    def __init__(self, loaded: "LoadedModel") -> None:
        if loaded.tokenizer.chat_template is None:
            raise ValueError(
                f"model {loaded.name} has no chat template: use 'longburn generate --raw', or a model tuned for chat"
            )
        self.tokenizer = loaded.tokenizer
        self.messages: list[dict[str, str]] = []
        self.reply = f"reply {secrets.token_hex(8)}"  # the placeholder: nothing that a question could contain
        self.unread: list[int] = []  # tokens said, but not in the cache: the last one of a reply that was cut off

    def ask(self, question: str) -> list[int]:
        """The token ids that have yet to be read for this turn."""
        from longburn.text import chat_prompt

        self.messages.append({"role": "user", "content": question})
        prompt = chat_prompt(self.tokenizer, self.messages)
        if len(self.messages) > 1:
            prompt = prompt.after(self.reply)
        self.messages.append({"role": "assistant", "content": self.reply})
        return self.unread + prompt.encode()

    def said(self, prompt: Sequence[int], reply: Sequence[int], *, read: int) -> None:
        """Takes note of a turn, of whose tokens the cache has read the first `read`."""
        self.unread = [*prompt, *reply][read:]
