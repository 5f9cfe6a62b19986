"""Audio codes as tokens: where they stand in the vocabulary, how many a piece has, and a head for them alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from longburn.cache import CacheManager
from longburn.generation.model import check_tokens
from longburn.kernels.linear import linear
from longburn.models.decoder import Decoder
from longburn.text import Tokenizer

CODES = 64000  # that the codec knows; the vocabulary has names for 65535
CODES_PER_SECOND = 5
SHORTEST, LONGEST = 10, 600  # seconds


@dataclass(frozen=True)
class CodeTokens:
    """Where codes and the end of a turn stand in the vocabulary; the defaults are those of the released models.

    Beside ids of the vocabulary there are *local* ids: code k is k, the end is `count`.

    Args:
        first: id of code 0.
        count: codes that are valid.
        end: id of `<|im_end|>`.
    """

    first: int = 151669
    count: int = CODES
    end: int = 151645

    @classmethod
    def of(cls, tokenizer: Tokenizer, count: int = CODES) -> "CodeTokens":
        """As the tokenizer has them.

        Raises:
            ValueError: it lacks them, or their ids do not follow one another.
        """
        ids = [tokenizer.encode(f"<|audio_code_{code}|>") for code in (0, count - 1)]
        end = tokenizer.encode("<|im_end|>")
        if [len(found) for found in (*ids, end)] != [1, 1, 1] or ids[1][0] - ids[0][0] != count - 1:
            raise ValueError(
                f"CodeTokens: the tokenizer has no <|im_end|>, or not the tokens <|audio_code_0|> to "
                f"<|audio_code_{count - 1}|> one after the other; take the tokenizer of an ACE-Step 1.5 language model"
            )
        return cls(ids[0][0], count, end[0])

    def tokens(self, codes: Iterable[int]) -> list[int]:
        """The ids of codes.

        Raises:
            ValueError: a code outside `0 .. count - 1`.
        """
        codes = list(codes)
        if wrong := [code for code in codes if not 0 <= code < self.count]:
            raise ValueError(f"CodeTokens: code {wrong[0]}, wanted 0 to {self.count - 1}")
        return [self.first + code for code in codes]

    def local(self, tokens: Tensor) -> Tensor:
        """Local ids of tokens; -1 for all that are neither codes nor the end."""
        codes = tokens - self.first
        local = torch.where((codes >= 0) & (codes < self.count), codes, -1)
        return torch.where(tokens == self.end, self.count, local)

    def tokens_of(self, local: Tensor) -> Tensor:
        """Ids of local ones; -1 stays."""
        tokens = torch.where(local < self.count, local + self.first, self.end)
        return torch.where(local < 0, local, tokens)


def codes_of(seconds: float) -> int:
    """How many codes a piece has.

    Raises:
        ValueError: a duration outside 10 to 600 s.
    """
    return int(CODES_PER_SECOND * check_duration(seconds))


def check_duration(seconds: float) -> float:
    """Refuse what is not a duration of 10 to 600 s."""
    numbers: tuple[type, ...] = (Real,)  # NumPy's too
    if not isinstance(seconds, numbers):
        raise ValueError(f"ACE-Step: duration {seconds!r}, wanted a number of seconds, {SHORTEST} to {LONGEST}")
    if not SHORTEST <= seconds <= LONGEST:  # refuses NaN too
        raise ValueError(f"ACE-Step: duration {seconds} s, wanted {SHORTEST} to {LONGEST} s")
    return seconds


class CodeModel(nn.Module):
    """A decoder over local ids: `vocab_size` is `count` + 1, and only these rows of the head are multiplied.

    Implements `AutoregressiveModel`.

    Raises:
        ValueError: the decoder's vocabulary ends before the codes do.
    """

    def __init__(self, model: Decoder, tokens: CodeTokens) -> None:
        super().__init__()
        if max(tokens.first + tokens.count, tokens.end + 1) > model.vocab_size:
            raise ValueError(
                f"CodeModel: codes up to token {tokens.first + tokens.count - 1}, but the model's vocabulary has "
                f"{model.vocab_size} ids; take the language model of ACE-Step 1.5"
            )
        self.model, self.tokens = model, tokens

    @property
    def vocab_size(self) -> int:
        """Codes, and the end."""
        return self.tokens.count + 1

    def init_cache(self, batch: int, *, max_length: int | None = None) -> CacheManager:
        """The decoder's own."""
        return self.model.init_cache(batch, max_length=max_length)

    def forward_logits(
        self, tokens: Tensor, cache: CacheManager, *, all_positions: bool = False, commit: bool = True
    ) -> Tensor:
        """As `Decoder.forward_logits`, from local ids `[B, T]` to logits of local ids."""
        check_tokens(tokens, self.vocab_size)
        return self._head(self.model.forward_features(self.tokens.tokens_of(tokens), cache, all_positions, commit))

    def read(self, prompts: Sequence[Sequence[int]], cache: CacheManager) -> Tensor:
        """Logits of local ids `[B, count + 1]` after prompts in ids of the vocabulary."""
        return self._head(self.model.forward_features(padded(prompts), cache))

    def _head(self, features: Tensor) -> Tensor:
        first, count, end = self.tokens.first, self.tokens.count, self.tokens.end
        weight = self.model.head.weight  # rows of it, where they lie: nothing is copied
        rows = (weight[first : first + count], weight[end : end + 1])
        return torch.cat([linear(features, part) for part in rows], -1)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of ids as one `[B, T]`, with -1 where a row has ended."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows])
