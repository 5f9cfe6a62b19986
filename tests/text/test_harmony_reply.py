"""What a model says in Harmony, against openai-harmony's own parser; and anything else that a model may say."""

import openai_harmony as official
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from longburn.text import HarmonyParser, Tokenizer, harmony_tokenizer
from longburn.text.harmony import ASSISTANT, REPLY, user_turn
from longburn.text.harmony_reply import reply_tokens
from longburn.text.o200k import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, SPECIAL_TOKENS, START


@pytest.fixture(scope="session")
def tokenizer(o200k_path) -> Tokenizer:
    return harmony_tokenizer()


@pytest.fixture(scope="session")
def encoding(o200k_path) -> official.HarmonyEncoding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(o200k_path.parent))
        return official.load_harmony_encoding("HarmonyGptOss")


def parsed(tokenizer: Tokenizer, tokens: list[int]) -> HarmonyParser:
    parser = HarmonyParser(tokenizer.token_bytes)
    for token in tokens:
        parser.feed(token)
    return parser


WELL_FORMED = [
    "<|channel|>final<|message|>Hi.<|return|>",
    "<|channel|>analysis<|message|>User says hi. 🙂<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Héllo 世界<|return|>",
    "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|><|return|>",
    "<|channel|>analysis<|message|>Call it.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
    '<|constrain|>json<|message|>{"city":"Paris"}<|call|>',
    '<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x":'
    "1}<|call|>",
    "<|channel|>commentary<|message|>First I look.<|end|><|start|>assistant<|channel|>analysis to=python code"
    "<|message|>print(1)<|call|>",
]


@pytest.mark.parametrize("text", WELL_FORMED)
def test_messages_are_those_of_openai_harmony(text, tokenizer, encoding) -> None:
    tokens = tokenizer.encode(text)
    wanted = encoding.parse_messages_from_completion_tokens(tokens, official.Role.ASSISTANT)
    parser = parsed(tokenizer, tokens)
    assert parser.open is None
    assert [
        (m.author, m.channel, m.recipient, m.content_type, m.text, m.end in (END, RETURN, CALL))
        for m in parser.messages
    ] == [
        (
            m.author.role.value,
            m.channel,
            m.recipient,
            m.content_type and m.content_type.removeprefix("<|constrain|>"),
            m.content[0].text,
            True,
        )
        for m in wanted
    ]


@pytest.mark.parametrize("text", WELL_FORMED)
def test_state_while_streaming_is_that_of_openai_harmony(text, tokenizer, encoding) -> None:
    theirs = official.StreamableParser(encoding, official.Role.ASSISTANT)
    ours = HarmonyParser(tokenizer.token_bytes)
    for token in tokenizer.encode(text):
        theirs.process(token)
        ours.feed(token)
        assert (ours.open is not None) == (theirs.state == official.StreamState.CONTENT)
        if ours.open is not None:
            assert (ours.open.channel, ours.open.recipient) == (theirs.current_channel, theirs.current_recipient)
            assert ours.open.text.rstrip("\ufffd") == theirs.current_content.rstrip("\ufffd")


def test_a_message_that_is_cut_off(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode(WELL_FORMED[1])[:-1]
    for length in range(len(whole)):
        parser = parsed(tokenizer, whole[:length])
        parser.close()
        assert "User says hi. 🙂Héllo 世界".startswith("".join(m.text for m in parser.messages).rstrip("\ufffd"))
        ends = [m.end for m in parser.messages]
        assert ends in ([], [None], [END], [END, None])
        assert (END in ends) == (END in whole[:length])


SOMETIMES_SPECIAL = st.one_of(
    st.sampled_from([START, CHANNEL, MESSAGE, CONSTRAIN, END, 200_000, 201_087]), st.integers(0, 199_997)
)


@given(st.lists(SOMETIMES_SPECIAL, max_size=40), st.sampled_from([None, RETURN, CALL]))
def test_whatever_a_model_says_is_taken_and_no_text_of_a_message_is_lost(tokenizer, tokens, end) -> None:
    parser = parsed(tokenizer, [*tokens, *([end] if end else [])])
    parser.close()
    assume(ASSISTANT not in tokens)  # a role at the head of a message is no text
    kept, header = b"", True  # once more, independently: all text but headers that a message or a channel shows to be
    pending: list[int] = []

    def drop() -> bytes:
        return b"" if CHANNEL in pending else b"".join(map(tokenizer.token_bytes, pending))

    for token in tokens:
        if token in (START, END):
            kept += drop() if header else b""
            header, pending = token == START, []
        elif header and token == MESSAGE:
            header, pending = False, []
        elif header:
            pending.append(token)
        else:
            kept += tokenizer.token_bytes(token)
    kept += drop() if header else b""
    assert b"".join(bytes(m.content) for m in parser.messages) == kept


class TestWhatStaysInTheConversation:
    def kept(self, tokenizer: Tokenizer, text: str) -> str:
        parser = parsed(tokenizer, tokenizer.encode(text))
        parser.close()
        return tokenizer.decode(reply_tokens(parser.messages), special=True)

    def test_thinking_behind_an_answer_is_left_out(self, tokenizer, encoding) -> None:
        reply = tokenizer.encode(WELL_FORMED[1])
        messages = [
            official.Message.from_role_and_content(official.Role.USER, "q1"),
            *encoding.parse_messages_from_completion_tokens(reply, official.Role.ASSISTANT),
            official.Message.from_role_and_content(official.Role.USER, "q2"),
        ]
        conversation = official.Conversation.from_messages(messages)
        wanted = encoding.render_conversation_for_completion(conversation, official.Role.ASSISTANT)
        ours = [*user_turn("q1"), *reply_tokens(parsed(tokenizer, reply).messages), *user_turn("q2"), *REPLY]
        assert ours == wanted
        assert "User says hi" not in tokenizer.decode(ours)

    def test_a_tool_call_keeps_it(self, tokenizer, encoding) -> None:
        text = WELL_FORMED[4]  # in the order in which openai-harmony writes a header
        messages = encoding.parse_messages_from_completion_tokens(tokenizer.encode(text), official.Role.ASSISTANT)
        wanted = encoding.render_conversation(official.Conversation.from_messages(messages))
        assert reply_tokens(parsed(tokenizer, tokenizer.encode(text)).messages) == wanted
        for text in WELL_FORMED[3:]:
            assert self.kept(tokenizer, text) == f"<|start|>assistant{text}"  # as it was made

    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("", ""),
            ("<|channel|>analysis", "<|start|>assistant<|channel|>analysis<|message|><|end|>"),
            ("<|channel|>analysis<|message|>Hm", "<|start|>assistant<|channel|>analysis<|message|>Hm<|end|>"),
            (
                "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant",
                "<|start|>assistant<|channel|>analysis<|message|>Hm<|end|>",
            ),
            (
                "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>So",
                "<|start|>assistant<|channel|>final<|message|>So<|end|>",
            ),
            (
                "<|channel|>analysis<|message|>Hm<|end|>"
                "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
                "<|start|>assistant<|channel|>final<|message|>So<|return|>",
                "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
                "<|start|>assistant<|channel|>final<|message|>So<|end|>",
            ),
            ("<|return|>", "<|start|>assistant<|message|><|end|>"),
        ],
    )
    def test_a_reply_is_closed_where_it_was_cut_off(self, text: str, wanted: str, tokenizer: Tokenizer) -> None:
        assert self.kept(tokenizer, text) == wanted


def test_special_ids_are_those_of_the_table() -> None:
    names = {"start": START, "end": END, "message": MESSAGE, "channel": CHANNEL, "constrain": CONSTRAIN}
    assert {name: SPECIAL_TOKENS[f"<|{name}|>"] for name in names} == names
