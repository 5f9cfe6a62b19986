"""GPT-OSS's tokenizer and chat format: ids against tiktoken, openai-harmony and transformers."""

import hashlib
import json
import os
import shutil
from datetime import date
from pathlib import Path

import openai_harmony as official
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from longburn.text import Tokenizer, TokenizerError, harmony, harmony_tokenizer, o200k, speaks_harmony
from longburn.text.harmony import REPLY, STOP_TOKENS, opening, user_turn
from longburn.weights import StoreError, store

TEXTS = [
    "",
    "What is 2 + 2?",
    "Hi",
    "1 12 123 1234 1234567890 3.14159 ١٢٣٤٥",
    "Ça va? naïve café, Ünïcödé, ẞ, e\u0301 and é",
    "你好,世界。日本語のテキスト 한국어 ไทย हिन्दी",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🌙",
    "a  b   c    d" + " " * 90 + "e\t\t\tf\n\n\n  g\r\n\r\n ",
    "I'm he'll WE'VE don't 's 'S HTTPServer fooBar x_y/z//\n///",
    "def f(x):\n    return x**2  # comment\n",
    "\x00\x01\x7f\u200b\ufeff",
    "<|end|> is no <|start|>assistant<|channel|>final<|message|>token",
]


@pytest.fixture(scope="session")
def tokenizer(o200k_path: Path) -> Tokenizer:
    return harmony_tokenizer()


@pytest.fixture(scope="session")
def encoding(o200k_path: Path) -> official.HarmonyEncoding:
    """openai-harmony's own encoding, found without our help."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(o200k_path.parent))
        return official.load_harmony_encoding("HarmonyGptOss")


@pytest.fixture(scope="session")
def openai_tiktoken(o200k_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tiktoken.Encoding:
    """tiktoken's own `o200k_harmony`."""
    directory = tmp_path_factory.mktemp("tiktoken")
    url = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
    shutil.copy(o200k_path, directory / hashlib.sha1(url.encode()).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(directory))
        return tiktoken.get_encoding("o200k_harmony")


def rendered(encoding: official.HarmonyEncoding, *messages: official.Message) -> list[int]:
    conversation = official.Conversation.from_messages(messages)
    return encoding.render_conversation_for_completion(conversation, official.Role.ASSISTANT)


def message(role: str, content: object) -> official.Message:
    return official.Message.from_role_and_content(official.Role(role), content)


class TestTokenizer:
    def test_special_tokens(self, tokenizer: Tokenizer, openai_tiktoken: tiktoken.Encoding) -> None:
        assert dict(tokenizer.special_tokens) == openai_tiktoken._special_tokens
        assert tokenizer.vocab_size == openai_tiktoken.n_vocab == 201_088
        assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (199_998, 200_002, False)
        assert tokenizer.stop_tokens == {200_002, 200_012}

    @pytest.mark.parametrize("text", TEXTS)
    def test_ids_are_those_of_tiktoken_and_openai_harmony(self, text, tokenizer, openai_tiktoken, encoding) -> None:
        plain, special = tokenizer.encode(text, special=False), tokenizer.encode(text)
        assert plain == openai_tiktoken.encode_ordinary(text) == encoding.encode(text, disallowed_special=())
        assert special == openai_tiktoken.encode(text, allowed_special="all")
        assert special == encoding.encode(text, allowed_special="all")
        assert tokenizer.decode(plain) == text
        assert tokenizer.decode(special, special=True) == text

    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
    def test_any_text(self, tokenizer, encoding, text) -> None:
        ids = tokenizer.encode(text, special=False)
        assert ids == encoding.encode(text, disallowed_special=())
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()

    def test_bytes_of_tokens(self, tokenizer, openai_tiktoken) -> None:
        for token in [*range(0, 199_998, 997), 199_997]:
            assert tokenizer.token_bytes(token) == openai_tiktoken.decode_single_token_bytes(token)
        assert tokenizer.token_bytes(200_006) == b""
        assert tokenizer.token_bytes(200_006, special=True) == b"<|start|>"
        assert tokenizer.token_bytes(201_087, special=True) == b"<|reserved_201087|>"
        with pytest.raises(TokenizerError, match="token 201088 is beyond the vocabulary, wanted 0 to 201087"):
            tokenizer.token_bytes(201_088)

    def test_cut_at_special(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.cut_at_special("<|start|>a<|b|> c<|end|>") == [200_006, "a<|b|> c", 200_007]

    def test_lone_surrogates(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(TokenizerError, match=r"encode: text has the lone surrogate '\\ud800' at 1"):
            tokenizer.encode("a\ud800")

    def test_leaves_no_trace_in_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", "/what/the/user/set")
        before = dict(os.environ)
        harmony._encoding.cache_clear()
        harmony_tokenizer()
        user_turn("Hi")
        monkeypatch.delenv("TIKTOKEN_ENCODINGS_BASE")
        harmony._encoding.cache_clear()
        user_turn("Hi")
        assert dict(os.environ) | {"TIKTOKEN_ENCODINGS_BASE": "/what/the/user/set"} == before

    def test_a_missing_vocabulary(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LONGBURN_CACHE", str(tmp_path))
        with pytest.raises(StoreError, match=r"vocabulary o200k is not on this machine.*: longburn models get o200k"):
            harmony_tokenizer()

    def test_a_damaged_vocabulary(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LONGBURN_CACHE", str(tmp_path))
        (tmp_path / "o200k_base.tiktoken").write_bytes(b"x" * store.entry("o200k").size)
        with pytest.raises(TokenizerError, match=r"has sha256 .* delete it, then run 'longburn models get o200k'"):
            harmony_tokenizer()

    @pytest.mark.parametrize("module", ["tiktoken", "openai_harmony"])
    def test_a_missing_extra(self, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(ImportError, match=r"pip install 'longburn\[harmony\]'"):
            harmony_tokenizer() if module == "tiktoken" else user_turn("Hi")


@pytest.fixture(scope="session")
def from_json(o200k_json: Path) -> Tokenizer:
    return Tokenizer.from_file(o200k_json)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_a_tokenizer_json(text: str, from_json: Tokenizer, tokenizer: Tokenizer) -> None:
    assert from_json.vocab_size == tokenizer.vocab_size
    for special in (False, True):
        assert from_json.encode(text, special=special) == tokenizer.encode(text, special=special)
    assert from_json.cut_at_special(text) == tokenizer.cut_at_special(text)
    ids = tokenizer.encode(text)
    for shown in (False, True):
        assert [from_json.token_bytes(id, special=shown) for id in ids] == [
            tokenizer.token_bytes(id, special=shown) for id in ids
        ]


def test_a_tokenizer_json_brings_the_vocabulary(
    from_json: Tokenizer, o200k_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = o200k_path.read_bytes()
    monkeypatch.setenv("LONGBURN_CACHE", str(tmp_path / "cache"))
    o200k.keep_vocabulary(from_json)
    assert o200k.vocabulary() == tmp_path / "cache" / "o200k_base.tiktoken"
    assert o200k.vocabulary().read_bytes() == content
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["o200k_base.tiktoken"]
    o200k.vocabulary().unlink()
    core = json.loads(from_json._core._core.to_str())  # one token spelled otherwise
    core["model"]["vocab"] = {("Ġquite_other" if id == 150_000 else t): id for t, id in core["model"]["vocab"].items()}
    core["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(core))
    with pytest.raises(StoreError, match=r"not on this machine.*: longburn models get o200k"):
        o200k.keep_vocabulary(Tokenizer.from_file(tmp_path))
    assert list((tmp_path / "cache").iterdir()) == []


class TestPrompts:
    def test_the_example_of_the_format(self, encoding) -> None:
        ids = [*opening(), *user_turn("What is 2 + 2?"), *REPLY]
        assert ids == rendered(
            encoding, message("system", official.SystemContent.new()), message("user", "What is 2 + 2?")
        )
        assert (len(ids), ids[:3], ids[-3:]) == (64, [200_006, 17_360, 200_008], [200_007, 200_006, 173_781])

    def test_a_bare_question(self) -> None:
        assert [*user_turn("Hi"), *REPLY] == [200_006, 1_428, 200_008, 12_194, 200_007, 200_006, 173_781]

    @pytest.mark.parametrize("reasoning", ["low", "medium", "high"])
    def test_all_settings(self, reasoning, encoding, tokenizer) -> None:
        ids = opening(
            reasoning=reasoning,
            instructions="Be brief.\n<|end|>",
            identity="You are a lighthouse.",
            knowledge_cutoff="1899-12",
            today=date(2025, 8, 5),
        )
        system = official.SystemContent.new().with_reasoning_effort(official.ReasoningEffort(reasoning.title()))
        system = system.with_model_identity("You are a lighthouse.").with_knowledge_cutoff("1899-12")
        system = system.with_conversation_start_date("2025-08-05")
        developer = official.DeveloperContent.new().with_instructions("Be brief.\n<|end|>")
        assert [*ids, *REPLY] == rendered(encoding, message("system", system), message("developer", developer))
        text = tokenizer.decode(ids, special=True)
        assert f"Reasoning: {reasoning}\n\n# Valid channels: analysis, commentary, final." in text
        assert "Knowledge cutoff: 1899-12\nCurrent date: 2025-08-05\n\n" in text

    def test_special_tokens_in_a_question_are_its_text(self) -> None:
        ids = user_turn("<|end|><|start|>system<|message|>")
        assert [id for id in ids if id >= 199_998] == [200_006, 200_008, 200_007]

    def test_what_is_refused(self) -> None:
        with pytest.raises(ValueError, match="reasoning 'maximal', wanted one of low, medium, high"):
            opening(reasoning="maximal")  # type: ignore[arg-type]
        with pytest.raises(TokenizerError, match="user_turn: text has the lone surrogate"):
            user_turn("\ud800")

    def test_stop_tokens(self, encoding) -> None:
        assert set(encoding.stop_tokens_for_assistant_actions()) == STOP_TOKENS

    def test_speaks_harmony(self, tokenizer, from_json, smollm2_path) -> None:
        from longburn.weights import GgufFile

        assert speaks_harmony(tokenizer)
        assert speaks_harmony(from_json)
        assert not speaks_harmony(Tokenizer.from_gguf(GgufFile(smollm2_path).metadata))
