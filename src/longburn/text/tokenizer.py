"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from longburn.text import sources
from longburn.text.sources import TokenizerError, TokenizerParts


class Tokenizer:
    """Encodes text and spells tokens out as bytes.

    *Special tokens* are those that no text contains by itself, such as `<|im_end|>`. Encoding finds them in the text
    unless told not to; decoding leaves them out, so that streamed output never shows them.

    Attributes:
        vocab_size: one more than the largest id. A model's embedding may be larger, for alignment.
        special_tokens: their ids, by text.
        bos, eos: ids of the tokens that begin and end a text, where the model has them. `encode` adds neither.
        add_bos: whether the model expects `bos` in front of every text.
        stop_tokens: ids that end a reply: `eos` and what else the model's files name.
        chat_template: the Jinja source that turns messages into text, where the model has one.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._core = parts.core
        self.vocab_size = self._core.vocab_size
        self.special_tokens: Mapping[str, int] = self._core.special_tokens
        self._special = frozenset(self.special_tokens.values())
        self.bos, self.eos, self.add_bos = parts.bos, parts.eos, parts.add_bos
        self.stop_tokens = parts.stop_tokens | ({parts.eos} if parts.eos is not None else set())
        self.chat_template = parts.chat_template
        for id in (self.bos, *self.stop_tokens):
            if id is not None:
                self._check(id)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that a GGUF file carries, from its metadata. Ids are those of llama.cpp.

        Raises:
            TokenizerError: metadata missing or contradictory, a kind other than byte-level byte-pair encoding
                (`tokenizer.ggml.model` "gpt2"), or a `tokenizer.ggml.pre` that is not in `PRE_TOKENIZERS`.
        """
        return cls(sources.from_gguf(metadata))

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a model directory, or of one `tokenizer.json` and the files beside it.

        `tokenizer_config.json` gives bos, eos and the chat template (or `chat_template.jinja` does),
        `generation_config.json` further stop tokens; they may be absent.

        Raises:
            TokenizerError: no or unreadable files, or tokens that are spelled neither by bytes nor with byte fallback.
        """
        return cls(sources.from_file(Path(path)))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`. Characters whose bytes the vocabulary lacks are left out, as the model's own encoder does.

        Args:
            special: whether special tokens written out in `text` count as such. Text from others must not be encoded
                so, or it can pass for the frame around it; `chat_prompt` takes care of that.

        Raises:
            TokenizerError: a lone surrogate, which UTF-8 cannot express.
        """
        check_text(text, "encode")
        return self._core.encode(text, special=special)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Special tokens are left out unless `special`.

        Raises:
            TokenizerError: an id beyond the vocabulary.
        """
        return b"".join(self.token_bytes(id, special=special) for id in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The exact bytes that `token` stands for: none for an unused id, nor for a special token unless `special`.

        Raises:
            TokenizerError: an id beyond the vocabulary.
        """
        self._check(token)
        if token in self._special and not special:
            return b""
        return self._core.spell(token)

    def cut_at_special(self, text: str) -> list[str | int]:
        """`text` as stretches of ordinary text and, between them, the ids of the special tokens that stand in it."""
        check_text(text, "cut_at_special")
        return self._core.cut_at_special(text)

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"token {token} is beyond the vocabulary, wanted 0 to {self.vocab_size - 1}")


def check_text(text: str, operation: str) -> None:
    """Raises TokenizerError for a lone surrogate, which UTF-8 cannot express."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{operation}: text has the lone surrogate {text[error.start]!a} at {error.start}"
        ) from error
