"""`longburn generate`: one prompt, one streamed answer."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longburn.cli.conversation import Conversation
from longburn.cli.display import Screen, note
from longburn.cli.options import RunOptions, takes

if TYPE_CHECKING:
    from longburn.models import LoadedModel

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
            help="Send the prompt as a user's turn through the model's chat template, or as it stands. "
            "Default: --chat if the model has a template.",
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
    ids = encode(stream.loaded, text, chat)
    with Screen(silent=as_json) as show:
        reply = stream.reply(ids, show)
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


def encode(loaded: "LoadedModel", text: str, chat: bool | None) -> list[int]:
    """Token ids of the prompt: through the chat template, as it stands (False), or whichever suits the model (None)."""
    if chat is None:
        chat = loaded.tokenizer.chat_template is not None
    if chat:
        return Conversation(loaded).ask(text)
    tokenizer = loaded.tokenizer
    begin = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    return begin + tokenizer.encode(text)


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
