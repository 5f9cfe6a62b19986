"""From texts to tokens: the tokenizer, what is held out, and where everything comes from."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tiny_training.texts import HELD_OUT, SOURCES, Source

END = "<|endoftext|>"  # between two works
VALIDATION = 0.02  # of each source: its end, never trained on; chooses the checkpoint
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Part:
    """Tokens int64 `[n]` on the CPU, and how many bytes of UTF-8 they stand for."""

    tokens: Tensor
    size: int


@dataclass(frozen=True)
class Corpus:
    """What `prepare` wrote: the three parts, the tokenizer's file and the account of where the texts come from.

    `train` and `validation` are of all sources, `test` is a book that neither of them has.
    """

    train: Part
    validation: Part
    test: Part
    tokenizer: str
    provenance: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "Corpus":
        """The corpus in a folder.

        Raises:
            FileNotFoundError: `prepare` has not run there.
        """
        path = folder / "provenance.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; run 'train_tiny_gpt_oss.py prepare' first")
        provenance = json.loads(path.read_text(encoding="utf-8"))
        parts = (
            Part(
                torch.from_numpy(np.fromfile(folder / f"{name}.u16", dtype="<u2").astype(np.int64)),
                provenance["splits"][name]["bytes"],
            )
            for name in SPLITS
        )
        return cls(*parts, (folder / "tokenizer.json").read_text(encoding="utf-8"), provenance)


def prepare(folder: Path, vocabulary: int, sources: Sequence[Source] = SOURCES) -> dict[str, Any]:
    """Fetch and clean the texts, train the tokenizer, write tokens and provenance; returns the provenance."""
    works = {source.name: source.works() for source in sources}
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    account = []
    for source in sources:
        held_out = [text for title, text in works[source.name] if title == HELD_OUT]
        rest = [text for title, text in works[source.name] if title != HELD_OUT]
        train, validation = _cut(rest)
        splits["train"] += train
        splits["validation"] += validation
        splits["test"] += held_out
        account.append(_account(source, works[source.name]))
    tokenizer = train_tokenizer(splits["train"], vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, texts in splits.items():
        tokens = _encode(tokenizer, texts)
        tokens.astype("<u2").tofile(folder / f"{name}.u16")
        sizes[name] = {"tokens": len(tokens), "bytes": sum(len(text.encode()) for text in texts)}
    provenance = {
        "sources": account,
        "test": f"{HELD_OUT}, whole",
        "validation": f"the last {VALIDATION:.0%} of each source",
        "splits": sizes,
        "vocabulary": tokenizer.get_vocab_size(),
    }
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    return provenance


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level byte-pair encoding (GPT-2's kind) with one special token, `END`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All texts, one after the other, each begun by `END`."""
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    for text in texts:
        ids.append(end)
        ids += tokenizer.encode(text).ids
    return np.array(ids)


def _cut(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts without their last VALIDATION of characters, and those, cut between two paragraphs."""
    left = int(sum(map(len, texts)) * (1 - VALIDATION))
    train, validation = [], []
    for text in texts:
        stop = len(text) if len(text) <= left else max(0, text.rfind("\n\n", 0, max(left, 0)))
        left -= len(text)
        if stop:
            train.append(text[:stop])
        if stop < len(text):
            validation.append(text[stop:].strip())
    return train, validation


def _account(source: Source, works: Sequence[tuple[str, str]]) -> dict[str, Any]:
    texts = "".join(text for _, text in works).encode()
    return {
        "name": source.name,
        "package": source.package,
        "licence": source.licence,
        "works": len(works),
        "bytes": len(texts),
        "sha256": hashlib.sha256(texts).hexdigest(),
    }
