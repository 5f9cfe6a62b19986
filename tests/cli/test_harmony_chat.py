"""Chat in Harmony, end to end: a small random GPT-OSS, whose choice of the next token follows a script.

The model is whole (caches, windows, logits); only what it says is given, because random weights speak no Harmony.
"""

import json
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import openai_harmony as official
import pytest
import torch

from longburn import RotaryEncoding, ntk_yarn
from longburn.models import LoadedModel
from longburn.models.gpt_oss import GptOss, GptOssConfig
from longburn.text import Tokenizer, harmony_tokenizer
from longburn.text.harmony import ASSISTANT, REPLY, opening, user_turn
from longburn.text.o200k import END, START, VOCAB_SIZE

USER = 1_428
WINDOW = 16

CONFIG = GptOssConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    experts_per_token=2,
    sliding_window=WINDOW,
    rope=ntk_yarn(8, theta=150_000.0, factor=32.0, original_context=64, truncate=False),
)
assert isinstance(CONFIG.rope, RotaryEncoding)


class Scripted(GptOss):
    """Says `replies[n]` to the n-th question: what it says follows from the tokens that its cache holds."""

    replies: Sequence[Sequence[int]] = ()

    def forward_logits(self, tokens, cache, **options):
        start = cache.position
        ids = tokens.flatten().tolist()
        self.at = getattr(self, "at", {}) | dict(enumerate(ids, start))
        logits = super().forward_logits(tokens, cache, **options)
        held = [self.at[position] for position in range(start + len(ids))]
        self.seen = {**getattr(self, "seen", {}), tuple(held): logits.clone()}
        said = torch.zeros_like(logits)
        said[:, self.next(held)] = 1.0
        return said

    def next(self, held: list[int]) -> int:
        turns = [i for i, pair in enumerate(pairwise(held)) if pair == (START, USER)]
        if not turns or END not in held[turns[-1] :]:
            return 0  # within the prompt, where nobody asks
        made = len(held) - (turns[-1] + held[turns[-1] :].index(END) + 1 + len(REPLY))
        reply = self.replies[len(turns) - 1]
        return reply[made] if 0 <= made < len(reply) else 0


@pytest.fixture(scope="session")
def tokenizer(o200k_path) -> Tokenizer:
    return harmony_tokenizer()


@pytest.fixture(scope="session")
def weights() -> Scripted:
    torch.manual_seed(5)
    model = Scripted(CONFIG).eval().double()  # so that rounding hides nothing
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("embed.weight", "head.weight"):
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.5)
    return model


@pytest.fixture
def model(weights, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """What every `--model <tmp_path>` loads."""
    weights.at, weights.seen = {}, {}
    loaded = LoadedModel(str(tmp_path), tmp_path, weights, tokenizer)
    monkeypatch.setattr("longburn.models.load_model", lambda *a, **k: loaded)
    return weights


@pytest.fixture
def encoding(tokenizer, o200k_path, monkeypatch: pytest.MonkeyPatch) -> official.HarmonyEncoding:
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(o200k_path.parent))
    return official.load_harmony_encoding("HarmonyGptOss")


THINK = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"
QUESTIONS = ("Why is the sky blue?", "How far is the moon? 🌙", "And now?")
THOUGHTS = ("The user asks about the sky. " * 9, "Distance to the moon, in km, I recall.", "Hm.")
ANSWERS = ("Rayleigh scattering, c'est ça.", "384 400 km 🌙", "Nothing.")


def replies(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(THINK.format(*pair)) for pair in zip(THOUGHTS, ANSWERS, strict=True)]


def chat(invoke, tmp_path, *arguments: object, lines: Sequence[str] = QUESTIONS):
    return invoke(
        "chat", "--model", tmp_path, "--temperature", "0", *arguments, stdin="".join(f"{x}\n" for x in lines).encode()
    )


def read_and_position(err: str) -> list[tuple[int, int]]:
    """Of each reply: prompt tokens read, and where the cache then stands."""
    return [(int(a), int(b)) for a, b in re.findall(r"prefill (\d+) tokens.* position (\d+)", err)]


def official_prompt(encoding, turns: Sequence[tuple[str, str]], question: str) -> list[int]:
    """openai-harmony's prompt after answered turns, whose thinking is left out."""
    say = official.Message.from_role_and_content
    messages = [say(official.Role.SYSTEM, official.SystemContent.new())]
    for asked, answer in turns:
        messages += [say(official.Role.USER, asked)]
        messages += [say(official.Role.ASSISTANT, answer).with_channel("final")]
    messages += [say(official.Role.USER, question)]
    conversation = official.Conversation.from_messages(messages)
    return encoding.render_conversation_for_completion(conversation, official.Role.ASSISTANT)


@pytest.mark.parametrize("chunk", ["512", "7"])
def test_the_model_sees_the_official_prompt_and_reads_no_common_prefix_twice(
    chunk, invoke, model, tmp_path, tokenizer, encoding
) -> None:
    model.replies = replies(tokenizer)
    outcome = chat(invoke, tmp_path, "--chunk-size", chunk)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == list(ANSWERS)
    counts, held, previous = read_and_position(outcome.err), [], 0
    for turn, question in enumerate(QUESTIONS):
        prompt = official_prompt(encoding, list(zip(QUESTIONS, ANSWERS, strict=True))[:turn], question)
        common = next((i for i, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b), len(held))
        assert counts[turn][0] == len(prompt) - common
        if turn:  # the prompt before, and the token behind which thinking and answer part
            assert common == previous + 1
        # The logits behind the prompt are those of a model that reads the official prompt from its beginning.
        with torch.no_grad():
            wanted = GptOss.forward_logits(model, torch.tensor([prompt]), model.init_cache(1))
        torch.testing.assert_close(model.seen[tuple(prompt)], wanted, atol=1e-9, rtol=0)
        held, previous = [*prompt, *model.replies[turn][:-1]], len(prompt)
        assert counts[turn][1] == len(held)
    assert len(held) > 5 * WINDOW


def test_an_answer_without_thinking_is_never_read_again(invoke, model, tmp_path, tokenizer) -> None:
    model.replies = [tokenizer.encode(f"<|channel|>final<|message|>{answer}<|return|>") for answer in ANSWERS]
    outcome = chat(invoke, tmp_path)
    counts = read_and_position(outcome.err)
    assert outcome.out.splitlines() == list(ANSWERS)
    for (_, before), (read, after), question, reply in zip(
        counts, counts[1:], QUESTIONS[1:], model.replies[1:], strict=False
    ):
        assert read == 1 + len(user_turn(question)) + len(REPLY)  # the <|end|> of the answer, and the question
        assert after == before + read + len(reply) - 1


def test_a_rolling_cache_on_every_layer_goes_back_as_far(invoke, model, tmp_path, tokenizer, monkeypatch) -> None:
    """Every layer is a ring here, and the thinking alone is longer than it."""
    from longburn import AttnWindow, WindowPolicy

    model.replies = replies(tokenizer)
    for layer, window in zip(model.layers, WindowPolicy.fixed(WINDOW, sink_tokens=4).windows(4), strict=True):
        monkeypatch.setattr(layer.attention, "window", window)
    assert isinstance(model.layers[1].attention.window, AttnWindow)
    outcome = chat(invoke, tmp_path)
    assert outcome.out.splitlines() == list(ANSWERS)
    prompts = [held for held in model.seen if held[-2:] == REPLY]
    assert len(prompts) == 6  # behind each question, and behind each thought
    with torch.no_grad():
        for prompt in prompts:
            wanted = GptOss.forward_logits(model, torch.tensor([prompt]), model.init_cache(1))
            torch.testing.assert_close(model.seen[prompt], wanted, atol=1e-9, rtol=0)
    assert (
        len({line.partition("cache ")[2].partition(",")[0] for line in outcome.err.splitlines() if "cache" in line})
        == 1
    )


def test_channels_are_shown_apart(invoke, model, tmp_path, tokenizer) -> None:
    model.replies = [
        tokenizer.encode(
            "<|channel|>analysis<|message|>Look it up. 🙂<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.sky <|constrain|>json<|message|>{"at":"noon"}<|call|>'
        ),
        tokenizer.encode(THINK.format("Again.", "Blue.\nVery.")),
    ]
    outcome = chat(invoke, tmp_path, lines=QUESTIONS[:2])
    assert outcome.out == "Blue.\nVery.\n"
    shown = [line for line in outcome.err.splitlines() if not line.startswith("prefill")]
    assert shown == [
        "[analysis]",
        "Look it up. 🙂",
        "[commentary to functions.sky json]",
        '{"at":"noon"}',
        "[analysis]",
        "Again.",
    ]


def test_thinking_stays_behind_a_tool_call(invoke, model, tmp_path, tokenizer) -> None:
    call = tokenizer.encode(
        "<|channel|>analysis<|message|>Look.<|end|>"
        "<|start|>assistant to=f<|channel|>commentary json<|message|>{}<|call|>"
    )
    model.replies = [call, tokenizer.encode(THINK.format("Again.", "Blue."))]
    outcome = chat(invoke, tmp_path, lines=QUESTIONS[:2])
    (_, _), (read, _) = read_and_position(outcome.err)
    assert read == 1 + len(user_turn(QUESTIONS[1])) + len(REPLY)
    second = [*opening(), *user_turn(QUESTIONS[0]), *REPLY, *call, *user_turn(QUESTIONS[1]), *REPLY]
    assert tuple(second) in model.seen


def test_stops_at_return_and_call_alone(invoke, model, tmp_path, tokenizer) -> None:
    """<|end|> and <|endoftext|> go by."""
    text = (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|endoftext|> c<|return|>"
    )
    model.replies = [[*tokenizer.encode(text), *[ASSISTANT] * 9]]
    outcome = chat(invoke, tmp_path, lines=QUESTIONS[:1])
    assert outcome.out == "b c\n"


def test_a_character_in_two_tokens_is_held_back(invoke, model, tmp_path, tokenizer) -> None:
    moon = tokenizer.encode("🩻", special=False)
    assert len(moon) > 1
    with pytest.raises(UnicodeDecodeError):
        tokenizer.token_bytes(moon[0]).decode()
    model.replies = [tokenizer.encode("<|channel|>final<|message|>a🩻b<|return|>")]
    assert chat(invoke, tmp_path, lines=QUESTIONS[:1]).out == "a🩻b\n"
    model.replies = [[*tokenizer.encode("<|channel|>analysis<|message|>"), moon[0], END, *model.replies[0]]]
    outcome = chat(invoke, tmp_path, lines=QUESTIONS[:1])
    assert "[analysis]\n\ufffd\n" in outcome.err  # what can no longer be completed belongs to its own message


class TestCutOff:
    def test_while_thinking(self, invoke, model, tmp_path, tokenizer) -> None:
        first, second, _ = replies(tokenizer)
        model.replies = [first, second]
        outcome = chat(invoke, tmp_path, "--max-new-tokens", "9", lines=QUESTIONS[:2])
        assert outcome.code == 0
        (_, before), (read, _) = read_and_position(outcome.err)
        end = [*first[:9], END]
        wanted = [*opening(), *user_turn(QUESTIONS[0]), *REPLY, *end, *user_turn(QUESTIONS[1]), *REPLY]
        assert tuple(wanted) in model.seen
        assert read == len(wanted) - before  # nothing twice

    def test_within_the_answer(self, invoke, model, tmp_path, tokenizer) -> None:
        think = tokenizer.encode("<|channel|>analysis<|message|>Hm.<|end|>")
        answer = tokenizer.encode("<|start|>assistant<|channel|>final<|message|>One two three four five")
        model.replies = [[*think, *answer], replies(tokenizer)[1]]
        new = len(think) + len(answer) - 2
        chat(invoke, tmp_path, "--max-new-tokens", str(new), lines=QUESTIONS[:2])
        wanted = [*opening(), *user_turn(QUESTIONS[0]), *answer[:-2], END, *user_turn(QUESTIONS[1]), *REPLY]
        assert tuple(wanted) in model.seen

    @pytest.mark.parametrize("made", [1, 2])
    def test_within_a_header(self, made, invoke, model, tmp_path, tokenizer) -> None:
        model.replies = replies(tokenizer)
        outcome = chat(invoke, tmp_path, "--max-new-tokens", str(made), lines=QUESTIONS[:2])
        assert (outcome.code, outcome.out) == (0, "")
        (_, before), (read, after) = read_and_position(outcome.err)
        assert after - (made - 1) == before + read  # nothing twice

    def test_by_ctrl_c_at_the_start(self, invoke, model, tmp_path, tokenizer, monkeypatch) -> None:
        """No token was made: the next question follows the first, as if nobody had begun to answer."""
        model.replies = replies(tokenizer)
        forward, calls = Scripted.forward_logits, []

        def interrupted(self, tokens, cache, **options):
            calls.append(tokens)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return forward(self, tokens, cache, **options)

        monkeypatch.setattr(Scripted, "forward_logits", interrupted)
        outcome = chat(invoke, tmp_path, "--chunk-size", "30", lines=QUESTIONS[:2])
        assert outcome.out.splitlines() == [ANSWERS[1]]
        wanted = [*opening(), *user_turn(QUESTIONS[0]), *user_turn(QUESTIONS[1]), *REPLY]
        assert tuple(wanted) in model.seen

    def test_by_a_stop_string_of_the_answer_not_of_a_header(self, invoke, model, tmp_path, tokenizer) -> None:
        think = tokenizer.encode("<|channel|>analysis<|message|>Think of final things.<|end|>")
        answer = tokenizer.encode("<|start|>assistant<|channel|>final<|message|>a final answer to")
        model.replies = [[*think, *answer, *tokenizer.encode("=me<|return|>")], replies(tokenizer)[1]]
        outcome = chat(invoke, tmp_path, "--stop", "answer to", "--stop", "assistant", lines=QUESTIONS[:2])
        assert (outcome.code, outcome.out) == (0, f"a final \n{ANSWERS[1]}\n")
        assert "[analysis]\nThink of final things.\n" in outcome.err
        wanted = [*opening(), *user_turn(QUESTIONS[0]), *answer, END, *user_turn(QUESTIONS[1]), *REPLY]
        assert tuple(wanted) in model.seen


def test_reset_forgets(invoke, model, tmp_path, tokenizer) -> None:
    model.replies = replies(tokenizer)
    outcome = chat(invoke, tmp_path, lines=[QUESTIONS[0], "/reset", QUESTIONS[0]])
    assert outcome.out.splitlines() == [ANSWERS[0]] * 2
    assert len(set(read_and_position(outcome.err))) == 1


class TestOptions:
    @pytest.mark.parametrize("name", ["--system", "--developer"])
    def test_instructions_and_reasoning(self, name, invoke, model, tmp_path, tokenizer) -> None:
        model.replies = replies(tokenizer)
        chat(invoke, tmp_path, name, "Be brief.", "--reasoning", "high", lines=QUESTIONS[:1])
        wanted = [*opening(reasoning="high", instructions="Be brief."), *user_turn(QUESTIONS[0]), *REPLY]
        assert tuple(wanted) in model.seen

    def test_a_template_gets_a_system_message_and_no_reasoning(self, invoke, tiny) -> None:
        outcome = invoke("chat", "--model", tiny, "--max-new-tokens", "2", "--system", "Be brief.", stdin=b"Hello\n")
        plain = invoke("chat", "--model", tiny, "--max-new-tokens", "2", stdin=b"Hello\n")
        assert outcome.code == 0
        assert read_and_position(outcome.err)[0] > read_and_position(plain.err)[0]
        refused = invoke("chat", "--model", tiny, "--reasoning", "low", stdin=b"Hello\n")
        assert refused.code == 1
        assert "--reasoning low: model" in refused.err
        assert "does not know a reasoning effort" in refused.err

    def test_unknown_reasoning_is_wrong_usage(self, invoke, tiny) -> None:
        assert invoke("chat", "--model", tiny, "--reasoning", "much", stdin=b"Hello\n").code == 2

    def test_a_raw_prompt_takes_neither(self, invoke, model, tmp_path) -> None:
        for option in (("--system", "Be brief."), ("--reasoning", "low")):
            outcome = invoke("generate", "--model", tmp_path, "--raw", "-p", "Hi", *option)
            assert outcome.code == 1
            assert f"{option[0]} belongs to a turn of chat" in outcome.err


class TestGenerate:
    def test_json_has_the_messages(self, invoke, model, tmp_path, tokenizer) -> None:
        model.replies = replies(tokenizer)
        outcome = invoke("generate", "--model", tmp_path, "-p", QUESTIONS[0], "--temperature", "0", "--json")
        reply = json.loads(outcome.out)
        assert reply["text"] == ANSWERS[0]
        assert reply["messages"] == [
            {"channel": "analysis", "recipient": None, "content_type": None, "text": THOUGHTS[0]},
            {"channel": "final", "recipient": None, "content_type": None, "text": ANSWERS[0]},
        ]
        assert reply["tokens"] == model.replies[0][:-1]
        assert (reply["finish"], reply["stats"]["prompt_tokens"]) == (
            "stop_token",
            len([*opening(), *user_turn(QUESTIONS[0]), *REPLY]),
        )

    def test_the_answer_alone_goes_to_stdout(self, invoke, model, tmp_path, tokenizer) -> None:
        model.replies = replies(tokenizer)
        outcome = invoke("generate", "--model", tmp_path, "-p", QUESTIONS[0], "--temperature", "0")
        assert outcome.out == f"{ANSWERS[0]}\n"
        assert outcome.err.startswith(f"[analysis]\n{THOUGHTS[0]}\n")

    def test_raw_is_text_as_it_stands(self, invoke, model, tmp_path, tokenizer) -> None:
        outcome = invoke(
            "generate", "--model", tmp_path, "--raw", "-p", "Hi", "--temperature", "0", "--max-new-tokens", "3"
        )
        assert (outcome.code, outcome.out) == (0, tokenizer.decode([0, 0, 0]) + "\n")


def test_a_gpt_oss_without_harmony_is_not_tuned_for_chat(invoke, tiny_base, model, tmp_path, monkeypatch) -> None:
    """The architecture does not make a chat model: the tokenizer does."""
    loaded = LoadedModel("small", tmp_path, model, Tokenizer.from_file(tiny_base))
    monkeypatch.setattr("longburn.models.load_model", lambda *a, **k: replace(loaded))
    outcome = chat(invoke, tmp_path, lines=["Hello"])
    assert (outcome.code, outcome.out) == (1, "")
    assert "model small is not tuned for chat" in outcome.err
    outcome = invoke("generate", "--model", tmp_path, "-p", "Hello", "--temperature", "0", "--max-new-tokens", "2")
    assert outcome.code == 0


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in the original format, which has no tokenizer."""
    from longburn.models.gpt_oss.names import original_rules
    from longburn.weights import save_checkpoint

    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "config.json").write_text(json.dumps(CONFIG.to_original()))
    torch.manual_seed(6)
    model = GptOss(CONFIG, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    save_checkpoint(model, directory / "model.safetensors", original_rules(CONFIG, "dense"))
    return directory


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_checkpoint_from_disk(with_tokenizer, invoke, checkpoint, o200k_json, tokenizer, tmp_path) -> None:
    """Random weights: the prompts are those of the format, and whatever the model says is taken, shown and kept."""
    path = checkpoint
    if with_tokenizer:
        path = tmp_path / "with-tokenizer"
        shutil.copytree(checkpoint, path)
        shutil.copy(o200k_json / "tokenizer.json", path)
    new = ("--max-new-tokens", "40")
    outcome = chat(invoke, path, *new, lines=QUESTIONS[:2])
    assert outcome.code == 0, outcome.err
    (first, before), (second, after) = read_and_position(outcome.err)
    assert first == len([*opening(), *user_turn(QUESTIONS[0]), *REPLY])
    assert before == first + 39
    assert after == before + second + 39  # nothing was read again
    reply = json.loads(
        invoke("generate", "--model", path, "-p", QUESTIONS[0], "--temperature", "0", *new, "--json").out
    )
    assert reply["text"] == tokenizer.decode(reply["tokens"])
    assert outcome.out.startswith(f"{reply['text']}\n")
