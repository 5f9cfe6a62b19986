"""What a tokenizer is made of, read from the metadata of a GGUF file or from the files of a model directory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models

from longburn.text.core import Core, TokenizersCore
from longburn.text.pretokenizers import PRE_TOKENIZERS

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type


class TokenizerError(ValueError):
    """A tokenizer cannot be built, or cannot take what it was given: says which part and why."""


@dataclass(frozen=True)
class TokenizerParts:
    """What `Tokenizer` needs; its docstring says what the fields mean.

    Attributes:
        core: the encoder.
    """

    core: Core
    bos: int | None = None
    eos: int | None = None
    add_bos: bool = False
    stop_tokens: frozenset[int] = frozenset()
    chat_template: str | None = None


def from_gguf(metadata: Mapping[str, Any]) -> TokenizerParts:
    """The parts of the tokenizer in a GGUF file's metadata (see `Tokenizer.from_gguf`)."""
    meta = _Typed(metadata, "tokenizer.")
    if (model := meta.get("ggml.model", str)) != "gpt2":
        raise TokenizerError(f"tokenizer.ggml.model is {model!r}, wanted 'gpt2' (byte-level byte-pair encoding)")
    if (pre := meta.get("ggml.pre", str)) not in PRE_TOKENIZERS:
        raise TokenizerError(f"tokenizer.ggml.pre is {pre!r}, wanted one of {', '.join(PRE_TOKENIZERS)}")
    way = PRE_TOKENIZERS[pre]
    tokens, merges = meta.all("ggml.tokens", str), [tuple(m.split(" ")) for m in meta.all("ggml.merges", str)]
    if not tokens:
        raise TokenizerError("tokenizer.ggml.tokens is missing or empty")
    if wrong := [" ".join(merge) for merge in merges if len(merge) != 2]:
        raise TokenizerError(f"tokenizer.ggml.merges has {wrong[0]!r}, wanted two tokens with a space between")
    kinds = meta.all("ggml.token_type", int) or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise TokenizerError(f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens")
    try:
        bpe = models.BPE({text: id for id, text in enumerate(tokens)}, merges, ignore_merges=way.whole_words)
    except Exception as error:  # the package raises nothing narrower
        raise TokenizerError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error
    core = tokenizers.Tokenizer(bpe)
    core.pre_tokenizer = way.build()
    core.decoder = decoders.ByteLevel()
    if normalizer := way.normalizer():
        core.normalizer = normalizer
    for text, kind in zip(tokens, kinds, strict=True):
        if kind in (_UNKNOWN, _CONTROL):
            core.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            core.add_tokens([AddedToken(text, special=False, normalized=False)])
    return TokenizerParts(
        TokenizersCore(core, _spell_byte_level),
        bos=meta.get("ggml.bos_token_id", int),
        eos=meta.get("ggml.eos_token_id", int),
        add_bos=meta.get("ggml.add_bos_token", bool) or False,
        stop_tokens=frozenset(
            id for name in ("eos", "eot", "eom") if (id := meta.get(f"ggml.{name}_token_id", int)) is not None
        ),
        chat_template=meta.get("chat_template", str),
    )


def from_file(path: Path) -> TokenizerParts:
    """The parts of the tokenizer in a model directory (see `Tokenizer.from_file`)."""
    file = path / "tokenizer.json" if path.is_dir() else path
    spec = _read_json(file)
    if spec is None:
        raise TokenizerError(f"{file}: no such file")
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing narrower
        raise TokenizerError(f"{file}: not a tokenizer: {error}") from error
    config = _Typed(_read_json(file.with_name("tokenizer_config.json")) or {}, "")
    generation = _read_json(file.with_name("generation_config.json")) or {}
    stops = generation.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(type(id) is int for id in stops):
        raise TokenizerError(f"eos_token_id of generation_config.json is {stops!r}, wanted ids")
    return TokenizerParts(
        TokenizersCore(core, _speller(spec.get("decoder"), file)),
        bos=_named_token(core, config, "bos_token"),
        eos=_named_token(core, config, "eos_token"),
        add_bos=config.get("add_bos_token", bool) or False,
        stop_tokens=frozenset(stops),
        chat_template=_chat_template(file.with_name("chat_template.jinja"), config),
    )


class _Typed:
    """Typed look-ups in a mapping of anything, whose keys errors show behind `prefix`."""

    def __init__(self, values: Mapping[str, Any], prefix: str) -> None:
        self.values, self.prefix = values, prefix

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value, or None where there is none."""
        value = self.values.get(self.prefix + key)
        if value is not None and not isinstance(value, kind):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise TokenizerError(f"{self.prefix}{key} is {type(value).__name__}, wanted {wanted}")
        return value

    def all(self, key: str, kind: type) -> list[Any]:
        """The values of a list, or none where there is none."""
        values = self.get(key, list) or []
        if wrong := [value for value in values if not isinstance(value, kind)]:
            raise TokenizerError(f"{self.prefix}{key} holds {wrong[0]!r}, wanted only {kind.__name__}")
        return values


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: holds a {type(content).__name__}, wanted an object")
    return content


def _named_token(core: tokenizers.Tokenizer, config: _Typed, key: str) -> int | None:
    """The id of a token that the configuration names, as its text or as an object with the text in `content`."""
    value = config.get(key, (str, dict))
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
        return None
    id = core.token_to_id(text) if isinstance(text, str) else None
    if id is None:
        raise TokenizerError(f"{key} of tokenizer_config.json is {text!r}, which the vocabulary lacks")
    return id


def _chat_template(file: Path, config: _Typed) -> str | None:
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = config.get("chat_template", (str, list))
    if not isinstance(value, list):
        return value  # type: ignore[no-any-return]  # a string or None
    named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if not isinstance(named.get("default"), str):
        raise TokenizerError(f"chat_template of tokenizer_config.json has {list(named)}, wanted one named 'default'")
    return str(named["default"])


def _byte_symbols() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary, inverted.

    Bytes that are printable in Latin-1 stand for themselves, the others for the characters from U+0100 on.
    Source: the encoder of GPT-2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_symbols()


def _spell_byte_level(text: str) -> bytes:
    try:
        return bytes(_BYTE_OF[symbol] for symbol in text)
    except KeyError:  # an entry that is no sequence of byte symbols stands for its own text
        return text.encode()


def _speller(decoder: Any, file: Path) -> Callable[[str], bytes]:
    """How tokens are spelled, from the `decoder` of a `tokenizer.json`."""
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds:
        return _spell_byte_level
    if "ByteFallback" not in kinds:
        raise TokenizerError(f"{file}: decoder is {kinds}, wanted one with ByteLevel or ByteFallback")
    # A leading space that a Strip step would take away stays: it depends on the place of the token in the text.
    spaces = [step["replacement"] for step in steps if step["type"] == "Metaspace"]
    spaces += [step["pattern"].get("String") for step in steps if step["type"] == "Replace" and step["content"] == " "]

    def spell(text: str) -> bytes:
        if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", text):
            return bytes.fromhex(byte[1])
        for space in spaces:
            text = text.replace(space, " ")
        return text.encode()

    return spell
