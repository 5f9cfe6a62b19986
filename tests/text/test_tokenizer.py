"""Token ids against llama.cpp, tiktoken and transformers; bytes against the text."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longburn.text import Tokenizer, TokenizerError
from longburn.text.pretokenizers import PRE_TOKENIZERS
from longburn.weights import GgufFile

HERE = Path(__file__).parent
SMOLLM2 = json.loads((HERE / "golden_smollm2_tokens.json").read_text())
CUTS = json.loads((HERE / "golden_pretokenizers.json").read_text())
PREFIX = "tokenizer.ggml."


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GgufFile(smollm2_path).metadata)


def small(**changes: Any) -> dict[str, Any]:
    """Metadata of a small vocabulary: all bytes, some merges, and one token of each special kind at the end."""
    tokens = [*CUTS["tokens"], "<unk>", "<|end|>", "<|ending|>", "<tool>", "<|start|>"]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": CUTS["merges"],
        "token_type": [1] * len(CUTS["tokens"]) + [2, 3, 3, 4, 3],
        "bos_token_id": len(tokens) - 1,
        "eos_token_id": len(tokens) - 4,
        "eot_token_id": len(tokens) - 3,
        "add_bos_token": True,
    }
    return {PREFIX + key: value for key, value in (metadata | changes).items() if value is not None}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(small())


def test_smollm2_ids_are_those_of_llama_cpp(smollm2: Tokenizer) -> None:
    assert len(SMOLLM2["samples"]) >= 300
    for sample in SMOLLM2["samples"]:
        assert smollm2.encode(sample["text"], special=False) == sample["ids"], sample["text"]
        assert smollm2.encode(sample["text"]) == sample.get("special_ids", sample["ids"]), sample["text"]


def test_smollm2_text_comes_back_byte_for_byte(smollm2: Tokenizer) -> None:
    for sample in SMOLLM2["samples"]:
        assert b"".join(map(smollm2.token_bytes, sample["ids"])) == sample["text"].encode()
        ids = sample.get("special_ids", sample["ids"])
        assert smollm2.decode(ids, special=True) == sample["text"]


def test_smollm2_properties(smollm2: Tokenizer) -> None:
    assert (smollm2.vocab_size, smollm2.bos, smollm2.eos, smollm2.add_bos) == (49152, 1, 2, False)
    assert smollm2.stop_tokens == {2}
    assert len(smollm2.special_tokens) == 17
    assert smollm2.special_tokens["<|im_end|>"] == 2
    assert smollm2.chat_template is not None


@pytest.mark.parametrize("pre", CUTS["ids"])
def test_cuts_are_those_of_llama_cpp(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(small(pre=pre, token_type=None, tokens=CUTS["tokens"], bos_token_id=None,
                                          eos_token_id=None, eot_token_id=None))  # fmt: skip
    for text, ids in zip(CUTS["texts"], CUTS["ids"][pre], strict=True):
        assert tokenizer.encode(text) == ids, text


def test_cuts_of_o200k_are_those_of_tiktoken() -> None:
    cut = PRE_TOKENIZERS["gpt-4o"].build()
    for text, lengths in zip(CUTS["texts"], CUTS["o200k_pieces"], strict=True):
        assert [end - start for _, (start, end) in cut.pre_tokenize_str(text)] == lengths, text


def test_every_pre_tokenizer_is_checked_and_they_differ() -> None:
    assert PRE_TOKENIZERS.keys() == {*CUTS["ids"], "gpt-4o"}
    assert len({json.dumps(ids) for ids in CUTS["ids"].values()}) == len(CUTS["ids"])


def test_qwen2_composes_as_its_own_tokenizer_does() -> None:
    apart, composed = "cafe\u0301", unicodedata.normalize("NFC", "cafe\u0301")
    tokenizer = Tokenizer.from_gguf(small(pre="qwen2"))
    assert tokenizer.encode(apart) == tokenizer.encode(composed)
    assert Tokenizer.from_gguf(small(pre="gpt-2")).encode(apart) != tokenizer.encode(apart)
    # Positions in the text that was given, not in the composed one.
    assert tokenizer.cut_at_special(f"{apart}<|end|>{apart}") == [apart, tokenizer.eos, apart]


def test_llama3_takes_whole_words_before_merges() -> None:
    tokens = [*CUTS["tokens"], "xqzj"]
    changes = {"tokens": tokens, "token_type": None, "bos_token_id": None, "eos_token_id": None, "eot_token_id": None}
    assert Tokenizer.from_gguf(small(pre="llama-bpe", **changes)).encode("xqzj") == [len(tokens) - 1]
    assert len(Tokenizer.from_gguf(small(pre="gpt-2", **changes)).encode("xqzj")) > 1


def test_special_tokens_only_when_asked(tokenizer: Tokenizer) -> None:
    end, ending = tokenizer.special_tokens["<|end|>"], tokenizer.special_tokens["<|ending|>"]
    assert tokenizer.encode("<|end|>") == [end]
    assert tokenizer.encode("<|ending|>") == [ending]
    assert tokenizer.encode("<unk>") == [tokenizer.special_tokens["<unk>"]]
    for text in ("<|end|>", "<|ending|>", "<unk>", "a<|start|>b"):
        ids = tokenizer.encode(text, special=False)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == text


def test_user_defined_tokens_always_count_and_are_text(tokenizer: Tokenizer) -> None:
    tool = tokenizer.vocab_size - 2
    assert tokenizer.encode("<tool>", special=False) == tokenizer.encode("<tool>") == [tool]
    assert tokenizer.token_bytes(tool) == b"<tool>"
    assert "<tool>" not in tokenizer.special_tokens


def test_special_tokens_are_not_printed_unless_asked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|end|>b")
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, special=True) == "a<|end|>b"
    assert tokenizer.token_bytes(ids[1]) == b""
    assert tokenizer.token_bytes(ids[1], special=True) == b"<|end|>"


def test_cut_at_special(tokenizer: Tokenizer) -> None:
    start, end = tokenizer.special_tokens["<|start|>"], tokenizer.special_tokens["<|end|>"]
    assert tokenizer.cut_at_special("<|start|>日本 x<|end|><|end|>é") == [start, "日本 x", end, end, "é"]
    assert tokenizer.cut_at_special("") == []
    assert tokenizer.cut_at_special("plain 日本") == ["plain 日本"]


def test_stop_tokens_and_flags(tokenizer: Tokenizer) -> None:
    assert tokenizer.stop_tokens == {tokenizer.special_tokens["<|end|>"], tokenizer.special_tokens["<|ending|>"]}
    assert tokenizer.bos == tokenizer.special_tokens["<|start|>"]
    assert tokenizer.add_bos
    assert tokenizer.encode("") == []


@given(text=st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


@given(data=st.binary(max_size=30))
def test_token_bytes_spell_any_bytes(tokenizer: Tokenizer, data: bytes) -> None:
    by_byte = {tokenizer.token_bytes(token): token for token in range(256)}
    assert len(by_byte) == 256
    assert tokenizer.decode(by_byte[bytes([byte])] for byte in data) == data.decode(errors="replace")


def test_ids_beyond_the_vocabulary_and_lone_surrogates(tokenizer: Tokenizer) -> None:
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(TokenizerError, match=f"token {token} is beyond the vocabulary, wanted 0 to"):
            tokenizer.decode([token])
    with pytest.raises(TokenizerError, match=r"lone surrogate '\\ud800' at 2"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, r"tokenizer\.ggml\.model is 'llama', wanted 'gpt2'"),
        ({"model": None}, r"tokenizer\.ggml\.model is None"),
        ({"pre": "falcon"}, r"tokenizer\.ggml\.pre is 'falcon', wanted one of gpt-2, smollm, llama-bpe, qwen2, gpt-4o"),
        ({"pre": None}, r"tokenizer\.ggml\.pre is None"),
        ({"pre": 3}, r"tokenizer\.ggml\.pre is int, wanted str"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"tokens": []}, r"tokenizer\.ggml\.tokens is missing"),
        ({"tokens": "abc"}, r"tokenizer\.ggml\.tokens is str, wanted list"),
        ({"tokens": ["a", 1]}, r"tokenizer\.ggml\.tokens holds 1, wanted only str"),
        ({"tokens": ["a"], "token_type": None}, r"merges do not fit tokenizer\.ggml\.tokens: .*Token `.*` out of"),
        ({"merges": ["ab"]}, r"tokenizer\.ggml\.merges has 'ab', wanted two tokens"),
        ({"merges": ["a b c"]}, r"tokenizer\.ggml\.merges has 'a b c', wanted two tokens"),
        ({"merges": [7]}, r"tokenizer\.ggml\.merges holds 7"),
        ({"token_type": [1]}, r"token_type has 1 entries for \d+ tokens"),
        ({"eos_token_id": 10**6}, r"token 1000000 is beyond the vocabulary"),
        ({"bos_token_id": "1"}, r"tokenizer\.ggml\.bos_token_id is str, wanted int"),
    ],
)
def test_metadata_that_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_gguf(small(**changes))
    assert "\n" not in str(caught.value)


def save(core: tokenizers.Tokenizer, directory: Path, **configs: object) -> Path:
    core.save(str(directory / "tokenizer.json"))
    for name, content in configs.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def byte_level() -> tokenizers.Tokenizer:
    vocabulary = {token: id for id, token in enumerate(CUTS["tokens"])}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in CUTS["merges"]]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|end|>"), AddedToken("<|start|>", lstrip=True)])
    core.add_tokens([AddedToken("<tool>", normalized=False)])
    core.enable_truncation(5)  # a setting for training, of which nothing may remain
    core.enable_padding(length=7)
    return core


def test_tokenizer_json_against_transformers(tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    ours, theirs = (
        Tokenizer.from_file(tmp_path),
        PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")),
    )
    for text in CUTS["texts"]:
        text = f"<|start|> {text}<|end|>  <|start|><tool>"
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.vocab_size == byte_level().get_vocab_size()
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").encode("a b") == ours.encode("a b")


def test_configurations_beside_tokenizer_json(tmp_path: Path) -> None:
    config = {
        "bos_token": "<|start|>",
        "eos_token": {"content": "<|end|>"},
        "add_bos_token": True,
        "chat_template": "x",
    }
    size = len(CUTS["tokens"])
    bare = Tokenizer.from_file(save(byte_level(), tmp_path))
    assert (bare.bos, bare.eos, bare.stop_tokens, bare.chat_template) == (None, None, frozenset(), None)
    save(byte_level(), tmp_path, tokenizer_config=config, generation_config={"eos_token_id": [size + 1, 5]})
    full = Tokenizer.from_file(tmp_path)
    assert (full.bos, full.eos, full.add_bos, full.chat_template) == (size + 1, size, True, "x")
    assert full.stop_tokens == {size, size + 1, 5}
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    save(byte_level(), tmp_path, tokenizer_config={"chat_template": named}, generation_config={"eos_token_id": 3})
    again = Tokenizer.from_file(tmp_path)
    assert (again.chat_template, again.stop_tokens) == ("d", {3})
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert Tokenizer.from_file(tmp_path).chat_template == "own file"


def test_byte_fallback_spells_spaces_and_bytes(tmp_path: Path) -> None:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    merges = [("a", "b"), ("▁", "ab")]
    bpe = models.BPE({token: id for id, token in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>")
    core = tokenizers.Tokenizer(bpe)
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer.from_file(save(core, tmp_path))
    for text in (" ab ab", "日本 ab\n", "  a b  ", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == core.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.token_bytes(tokens.index("<0xE6>")) == b"\xe6"
    assert tokenizer.token_bytes(tokens.index("▁ab")) == b" ab"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "not a readable JSON file"),
        ("tokenizer.json", "[]", "holds a list, wanted an object"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", "nonsense", "tokenizer_config.json: not a readable JSON file"),
        ("tokenizer_config.json", '{"eos_token": "<none>"}', "eos_token .* is '<none>', which the vocabulary lacks"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token is int, wanted str or dict"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a", "template": "b"}]}', r"\['a'\], wanted one named"),
        ("generation_config.json", '{"eos_token_id": "2"}', r"eos_token_id of generation_config.json is \['2'\]"),
        ("generation_config.json", '{"eos_token_id": 99999}', "token 99999 is beyond the vocabulary"),
    ],
)
def test_files_that_are_wrong_are_named(file: str, content: str, message: str, tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_file(tmp_path)


def test_files_that_are_not_there_and_decoders_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_file(tmp_path)
    core = byte_level()
    core.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match=r"decoder is \['WordPiece'\], wanted one with ByteLevel or ByteFallback"):
        Tokenizer.from_file(save(core, tmp_path))
