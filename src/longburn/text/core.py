"""What cuts text into tokens: the libraries behind `Tokenizer`, each with the same few methods."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import tokenizers

if TYPE_CHECKING:
    import tiktoken


class Core(Protocol):
    """What `Tokenizer` needs of a library.

    Attributes:
        vocab_size: one more than the largest id.
        special_tokens: their ids, by text.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_tokens(self) -> Mapping[str, int]: ...

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of `text`; special tokens written out in it count as such, or as ordinary text."""
        ...

    def cut_at_special(self, text: str) -> list[str | int]:
        """Stretches of ordinary text, none of them empty, and between them the ids of special tokens."""
        ...

    def spell(self, token: int) -> bytes:
        """The bytes of a token of the vocabulary: a special one's own text, none for an unused id."""
        ...


class TokenizersCore:
    """By Hugging Face's `tokenizers`.

    Args:
        core: the library's tokenizer.
        spell: from the text of a token in its vocabulary to the bytes it stands for.
    """

    def __init__(self, core: tokenizers.Tokenizer, spell: Callable[[str], bytes]) -> None:
        self._core, self._spell = core, spell
        core.no_truncation()
        core.no_padding()
        added = core.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self._texts = {id: text for text, id in core.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(self._texts, default=-1) + 1
        self.special_tokens = {self._added[id]: id for id in sorted(added) if added[id].special}

    def encode(self, text: str, *, special: bool) -> list[int]:
        return list(self._encode(text, special).ids)

    def cut_at_special(self, text: str) -> list[str | int]:
        encoding = self._encode(text, special=True)
        pieces: list[str | int] = []
        end, ids = 0, set(self.special_tokens.values())
        for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if id in ids:
                pieces += [text[end:start], id]
                end = stop
        return [piece for piece in (*pieces, text[end:]) if piece != ""]

    def spell(self, token: int) -> bytes:
        added = self._added.get(token)
        return self._spell(self._texts.get(token, "")) if added is None else added.encode()

    def _encode(self, text: str, special: bool) -> tokenizers.Encoding:
        return (self._core if special else self._literal).encode(text, add_special_tokens=False)

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """A copy of the core that takes special tokens for ordinary text: the choice is a setting of the object."""
        literal = tokenizers.Tokenizer.from_str(self._core.to_str())
        literal.encode_special_tokens = True
        return literal


class TiktokenCore:
    """By OpenAI's `tiktoken`.

    Args:
        encoding: the library's encoding.
        special_tokens: its special tokens.
    """

    def __init__(self, encoding: tiktoken.Encoding, special_tokens: Mapping[str, int]) -> None:
        self._encoding, self.special_tokens = encoding, special_tokens
        self.vocab_size = encoding.n_vocab
        self._at_special = re.compile(f"({'|'.join(map(re.escape, special_tokens))})")

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self._encoding.encode(text, allowed_special="all") if special else self._encoding.encode_ordinary(text)

    def cut_at_special(self, text: str) -> list[str | int]:
        return [self.special_tokens.get(piece, piece) for piece in self._at_special.split(text) if piece]

    def spell(self, token: int) -> bytes:
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:
            return b""
