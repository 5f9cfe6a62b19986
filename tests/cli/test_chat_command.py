"""`longburn chat`: a conversation that reads each token once."""

import signal

import pytest

from longburn.generation import GenerationConfig, generate
from longburn.generation.graph import DecodeStep
from longburn.models import load_model
from longburn.models.llama import Llama

GREEDY = ("--temperature", "0", "--max-new-tokens", "9")
QUESTIONS = ("Why is the sky blue?", "How far is the moon?", "Ça va? 🌙")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All token ids that the model was fed, in order, over all caches."""
    ids: list[int] = []
    forward, decode = Llama.forward_logits, DecodeStep.__call__
    within_step = False

    def spy(self, tokens, *arguments, **options):
        if not within_step:
            ids.extend(tokens.flatten().tolist())
        return forward(self, tokens, *arguments, **options)

    def spy_on_step(self, tokens):  # which may call forward_logits or not
        nonlocal within_step
        ids.extend(tokens.flatten().tolist())
        within_step = True
        try:
            return decode(self, tokens)
        finally:
            within_step = False

    monkeypatch.setattr(Llama, "forward_logits", spy)
    monkeypatch.setattr(DecodeStep, "__call__", spy_on_step)
    return ids


def lines(*turns: str) -> bytes:
    return "".join(f"{turn}\n" for turn in turns).encode()


def test_each_token_is_read_once(invoke, tiny, read) -> None:
    outcome = invoke("chat", "--model", tiny, *GREEDY, stdin=lines(*QUESTIONS))
    once = list(read)
    # The same conversation with everything read anew for each reply.
    loaded = load_model(tiny)
    said: list[int] = []
    replies = ""
    for question in QUESTIONS:
        end = "<|im_end|>\n" if said else ""
        turn = f"{end}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        said += loaded.tokenizer.encode(turn)
        config = GenerationConfig(max_new_tokens=9, stop_tokens=loaded.tokenizer.stop_tokens)
        events = list(generate(loaded.model, [said], config=config, tokenizer=loaded.tokenizer))
        said += [event.token for event in events]
        replies += "".join(event.text for event in events) + "\n"
    assert (outcome.code, outcome.out) == (0, replies)
    assert once == said[:-1]  # the last token made is not read yet
    assert outcome.err.splitlines()[-1].endswith(f"position {len(once)}")


def test_reset_forgets(invoke, tiny) -> None:
    once = invoke("chat", "--model", tiny, *GREEDY, stdin=lines(QUESTIONS[0]))
    twice = invoke("chat", "--model", tiny, *GREEDY, stdin=lines(QUESTIONS[0], "/reset", QUESTIONS[0]))
    assert twice.out == once.out * 2
    assert twice.err.splitlines()[-1].rpartition("cache")[2] == once.err.splitlines()[-1].rpartition("cache")[2]


def test_exit_ends_before_the_rest(invoke, tiny) -> None:
    once = invoke("chat", "--model", tiny, *GREEDY, stdin=lines(QUESTIONS[0]))
    ended = invoke("chat", "--model", tiny, *GREEDY, stdin=lines("", QUESTIONS[0], "  /exit ", QUESTIONS[1]))
    assert (ended.code, ended.out) == (0, once.out)


def test_an_unknown_command_is_said_not_sent(invoke, tiny) -> None:
    outcome = invoke("chat", "--model", tiny, *GREEDY, stdin=lines("/what now"))
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.startswith("no command /what: /reset")


def test_a_window_keeps_the_cache_small_over_turns(invoke, tiny) -> None:
    outcome = invoke("chat", "--model", tiny, *GREEDY, "--window", "16", stdin=lines(*QUESTIONS * 4))
    sizes = {line.partition("cache ")[2].partition(",")[0] for line in outcome.err.splitlines()}
    assert outcome.code == 0
    assert len(sizes) == 1


def test_a_base_model_cannot_chat(invoke, tiny_base) -> None:
    outcome = invoke("chat", "--model", tiny_base, stdin=b"hello\n")
    assert (outcome.code, outcome.out) == (1, "")
    assert "no chat template" in outcome.err


def test_interrupting_a_reply_keeps_the_conversation(invoke, tiny, read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after the third token: the reply ends there, the next turn goes on after it and reads nothing twice."""
    from longburn.cli import chat

    tokenizer = load_model(tiny).tokenizer
    made = []

    class Interrupting(chat.Screen):
        def __call__(self, piece) -> None:
            super().__call__(piece)
            made.append(piece.text)
            if len(made) == 3:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "Screen", Interrupting)
    outcome = invoke("chat", "--model", tiny, *GREEDY, stdin=lines(*QUESTIONS[:2]))
    assert outcome.code == 0
    text = tokenizer.decode(read, special=True)
    for question in QUESTIONS[:2]:
        assert text.count(question) == 1
    assert len(read) == int(outcome.err.split()[-1])
    first_reply = text.partition("assistant\n")[2].partition("<|im_end|>")[0]
    assert first_reply.startswith("".join(made[:2]))


def test_interrupting_at_the_prompt_ends_the_command(invoke, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    outcome = invoke("chat", "--model", tiny)
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
