"""A small random Llama in Hugging Face layout, written by transformers, and a way to run the command on it."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# One of ChatML's simplest forms, with no default system line.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The sea was calm. Why is the sky blue? A curious child asks: how far is the moon, and who has been there?"
] * 8


def write_model(directory: Path, *, chat_template: str | None) -> Path:
    """A two-layer Llama with random weights and a tokenizer of some 300 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,  # wide enough that greedy text is not one token for ever
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[config.eos_token_id] = 0  # never the likeliest: greedy text goes on for ever
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a small chat model."""
    return str(write_model(tmp_path_factory.mktemp("tiny"), chat_template=TEMPLATE))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same without a chat template."""
    return str(write_model(tmp_path_factory.mktemp("tiny-base"), chat_template=None))


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Invoke = Callable[..., Outcome]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs the command in this process: `invoke("generate", "--prompt", "x", stdin=b"...", terminal=False)`."""
    from longburn.cli.main import execute

    class Input(io.TextIOWrapper):
        terminal = False

        def isatty(self) -> bool:
            return self.terminal

    def run(*arguments: object, stdin: bytes = b"", terminal: bool = False) -> Outcome:
        monkeypatch.setattr(sys, "stdin", Input(io.BytesIO(stdin), encoding="utf-8"))
        sys.stdin.terminal = terminal
        capsys.readouterr()
        code = execute([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def command() -> list[str]:
    """The start of a command line that runs longburn in a process of its own."""
    return [sys.executable, "-c", "from longburn.cli.main import run; run()"]


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"PYTHONUNBUFFERED": "", "COLUMNS": "100", "TERM": "xterm"}


@pytest.fixture(autouse=True)
def hangups_are_heard() -> Iterator[None]:
    """Even if the tests run under nohup, which would leave SIGHUP ignored here and in every process begun here."""
    before = signal.getsignal(signal.SIGHUP)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
