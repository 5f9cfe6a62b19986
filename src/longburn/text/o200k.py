"""`o200k_harmony`, the tokenizer of GPT-OSS: its vocabulary from this machine, its special tokens, no network.

The ranks are those of `o200k_base`, a file that `longburn models get o200k` takes out of a wheel. The special tokens
are those that tiktoken and openai-harmony give this encoding.
"""

from __future__ import annotations

import base64
import hashlib
from binascii import a2b_base64
from pathlib import Path

from longburn.text.core import TiktokenCore
from longburn.text.pretokenizers import O200K
from longburn.text.sources import TokenizerError, TokenizerParts
from longburn.text.tokenizer import Tokenizer

VOCAB_SIZE = 201_088
START_OF_TEXT, END_OF_TEXT, RETURN, CONSTRAIN = 199_998, 199_999, 200_002, 200_003
CHANNEL, START, END, MESSAGE, CALL = 200_005, 200_006, 200_007, 200_008, 200_012

_NAMED = {
    "<|startoftext|>": START_OF_TEXT,
    "<|endoftext|>": END_OF_TEXT,
    "<|return|>": RETURN,
    "<|constrain|>": CONSTRAIN,
    "<|channel|>": CHANNEL,
    "<|start|>": START,
    "<|end|>": END,
    "<|message|>": MESSAGE,
    "<|call|>": CALL,
}
_RESERVED = [id for id in range(200_000, VOCAB_SIZE) if id not in _NAMED.values()]
# One id has two names.
SPECIAL_TOKENS = _NAMED | {f"<|reserved_{id}|>": id for id in _RESERVED} | {"<|endofprompt|>": 200_018}


def harmony_tokenizer() -> Tokenizer:
    """The tokenizer of GPT-OSS for checkpoints that come without a `tokenizer.json`: 201,088 ids, by tiktoken.

    It stops at `<|return|>` and `<|call|>` only: `<|end|>` stands between the messages of one reply.

    Raises:
        ImportError: tiktoken is not installed.
        StoreError: the vocabulary is not on this machine.
        TokenizerError: its file is damaged.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise ImportError("GPT-OSS's tokenizer needs tiktoken: pip install 'longburn[harmony]'") from error
    lines = vocabulary().read_bytes().splitlines()
    ranks = {a2b_base64(token): int(rank) for token, _, rank in (line.partition(b" ") for line in lines)}
    encoding = tiktoken.Encoding(
        "o200k_harmony", pat_str=O200K, mergeable_ranks=ranks, special_tokens=SPECIAL_TOKENS, explicit_n_vocab=None
    )
    return Tokenizer(
        TokenizerParts(
            TiktokenCore(encoding, SPECIAL_TOKENS),
            bos=START_OF_TEXT,
            eos=RETURN,
            stop_tokens=frozenset({RETURN, CALL}),
        )
    )


def keep_vocabulary(tokenizer: Tokenizer) -> None:
    """Writes the vocabulary's file from a tokenizer that has the same tokens, unless it is on this machine already.

    So a checkpoint with a `tokenizer.json` brings all that Harmony needs.

    Raises:
        StoreError: the tokenizer has other tokens, and the file is not here; the message says how to get it.
    """
    from longburn.weights.store import StoreError, keep

    try:
        vocabulary()
    except StoreError as missing:
        tokens = (base64.b64encode(tokenizer.token_bytes(id)) for id in range(START_OF_TEXT))
        try:
            keep("o200k", b"".join(b"%s %d\n" % (token, id) for id, token in enumerate(tokens)))
        except StoreError as error:
            raise missing from error


def vocabulary() -> Path:
    """The file of `o200k_base`'s ranks on this machine, checked.

    Raises:
        StoreError: it is not here; the message says how to get it.
        TokenizerError: it is not the file that it should be.
    """
    from longburn.weights.store import StoreError, entry, locate  # late: it brings PyTorch with it

    try:
        path = locate("o200k")
    except StoreError as error:
        raise StoreError(f"{error}: longburn models get o200k") from error
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != (wanted := entry("o200k").sha256):
        raise TokenizerError(
            f"{path} has sha256 {found}, wanted {wanted}: delete it, then run 'longburn models get o200k'"
        )
    return path
