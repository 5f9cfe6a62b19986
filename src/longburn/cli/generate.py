"""`longburn generate`: one prompt, one streamed answer."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longburn.cli.conversation import converse
from longburn.cli.display import Screen, note
from longburn.cli.options import RunOptions, takes
from longburn.cli.reading import PlainReading, Reading

if TYPE_CHECKING:
    from longburn.cli.stream import Stream

STDIN = "-"


@takes(RunOptions)
def generate(
    options: RunOptions,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt; - reads stdin.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", "-f", help="A UTF-8 text file with the prompt; - reads stdin.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Send the prompt as a user's turn in the model's chat format, or as it stands. "
            "Default: --chat if the model was tuned for it.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end instead of streaming text.")
    ] = False,
) -> None:
    """Generate text from a prompt: --prompt, --prompt-file, or whatever is piped into stdin."""
    text = read_prompt(prompt, prompt_file)
    stream = options.start()
    ids, reading = encode(stream, options, text, chat)
    with Screen(silent=as_json) as show:
        reply = stream.reply(ids, reading, show)
    if as_json:
        typer.echo(json.dumps({"model": options.model, **asdict(reply)}, ensure_ascii=False))
    note(str(reply.stats))
    if reply.finish == "cancelled":
        raise typer.Exit(130)


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from the one source that was named, else from stdin if that is not a terminal.

    One newline at the end of a file or of stdin is the file's, not the prompt's, and is left out.
    """
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("--prompt and --prompt-file both given: wanted one source of the prompt")
    if prompt is not None and prompt != STDIN:
        source, text = "--prompt", prompt
    elif prompt_file is not None and prompt_file != STDIN:
        source, text = prompt_file, read_text(Path(prompt_file))
    elif STDIN in (prompt, prompt_file) or not sys.stdin.isatty():
        source, text = "stdin", decode(sys.stdin.buffer.read(), "stdin")
    else:
        raise typer.BadParameter("no prompt: give --prompt or --prompt-file, or pipe text into stdin")
    if not text:
        raise typer.BadParameter(f"the prompt from {source} is empty: wanted at least one character")
    return text


def encode(stream: "Stream", options: RunOptions, text: str, chat: bool | None) -> tuple[list[int], Reading]:
    """Token ids of the prompt, as a turn of chat, as it stands (False), or as suits the model (None), and what reads
    the reply."""
    from longburn.text import speaks_harmony

    tokenizer = stream.loaded.tokenizer
    if chat is None:
        chat = tokenizer.chat_template is not None or speaks_harmony(tokenizer)
    if chat:
        conversation = converse(stream, options)
        return conversation.ask(text), conversation.reading()
    for name, value in (("--system", options.system), ("--reasoning", options.reasoning)):
        if value is not None:
            raise ValueError(f"{name} belongs to a turn of chat, and this prompt is sent as it stands: leave it out")
    begin = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    return begin + tokenizer.encode(text), PlainReading(stream.config, tokenizer)


def read_text(path: Path) -> str:
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        raise OSError(f"prompt file {path}: {error.strerror}") from error


def decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}") from error
