"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

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
        self._core, self._spell = parts.core, parts.spell
        self._core.no_truncation()
        self._core.no_padding()
        added = self._core.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self._special = frozenset(id for id, token in added.items() if token.special)
        self._texts = {id: text for text, id in self._core.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(self._texts, default=-1) + 1
        self.special_tokens: Mapping[str, int] = {self._added[id]: id for id in sorted(self._special)}
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
        return list(self._encode(text, special).ids)

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
        if token in self._added:
            return self._added[token].encode()
        return self._spell(self._texts.get(token, ""))

    def cut_at_special(self, text: str) -> list[str | int]:
        """`text` as stretches of ordinary text and, between them, the ids of the special tokens that stand in it."""
        encoding = self._encode(text, special=True)
        pieces: list[str | int] = []
        end = 0
        for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if id in self._special:
                pieces += [text[end:start], id]
                end = stop
        return [piece for piece in (*pieces, text[end:]) if piece != ""]

    def _encode(self, text: str, special: bool) -> tokenizers.Encoding:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"encode: text has the lone surrogate {text[error.start]!a} at {error.start}"
            ) from error
        return (self._core if special else self._literal).encode(text, add_special_tokens=False)

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """A copy of the core that takes special tokens for ordinary text: the choice is a setting of the object."""
        literal = tokenizers.Tokenizer.from_str(self._core.to_str())
        literal.encode_special_tokens = True
        return literal

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"token {token} is beyond the vocabulary, wanted 0 to {self.vocab_size - 1}")
