"""How text is cut into words before byte-pair merges, by the names that GGUF files give to the ways in use.

Sources: the `tokenizer.json` of the models named here; for o200k, tiktoken's `o200k_base`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS_THEN = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

LLAMA3 = rf"{_CONTRACTION}|{_LETTERS_THEN}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WHITESPACE}"
QWEN2 = rf"{_CONTRACTION}|{_LETTERS_THEN}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WHITESPACE}"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_WHITESPACE}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting.

    Attributes:
        steps: makes the cutting steps, of which the last one maps bytes to printable characters.
        nfc: whether text is first brought to Unicode's composed form.
        whole_words: whether a word that is itself a token is taken as such, without looking at merges.
    """

    steps: Callable[[], list[pre_tokenizers.PreTokenizer]]
    nfc: bool = False
    whole_words: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The cutting as an object of the `tokenizers` package."""
        return pre_tokenizers.Sequence(self.steps())

    def normalizer(self) -> normalizers.Normalizer | None:
        """What happens to the text before it is cut."""
        return normalizers.NFC() if self.nfc else None


def _gpt2() -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _digits_then_gpt2() -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Digits(individual_digits=True), *_gpt2()]


def _by(pattern: str) -> Callable[[], list[pre_tokenizers.PreTokenizer]]:
    return lambda: [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# By values of the metadata `tokenizer.ggml.pre`. Qwen2's own tokenizer composes its text, llama.cpp leaves that out.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(_gpt2),
    "smollm": PreTokenizer(_digits_then_gpt2),
    "llama-bpe": PreTokenizer(_by(LLAMA3), whole_words=True),
    "qwen2": PreTokenizer(_by(QWEN2), nfc=True),
    "gpt-4o": PreTokenizer(_by(O200K)),
}
