"""`longburn chat`: a conversation that keeps its cache, so that each turn reads only what is new."""

import sys

import typer

from longburn.cli.conversation import converse
from longburn.cli.display import Screen, note
from longburn.cli.options import RunOptions, takes

COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops a reply"


@takes(RunOptions)
def chat(options: RunOptions) -> None:
    """Talk with a model. Each line is one turn; /reset starts anew, /exit or Ctrl-D ends, Ctrl-C stops a reply."""
    stream = options.start()
    conversation = converse(stream, options)
    if sys.stdin.isatty():
        note(f"{stream.loaded.name}: {COMMANDS}.")
    while (line := ask()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                stream.cache.reset()
                conversation = converse(stream, options)
            case command if command.startswith("/"):
                note(f"no command {command.split()[0]}: {COMMANDS}")
            case question:
                prompt = conversation.ask(question)
                with Screen() as show:
                    reply = stream.reply(prompt, conversation.reading(), show)
                conversation.said(reply)
                note(str(reply.stats))


def ask() -> str | None:
    """One line from the terminal or from stdin; None at its end."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        import readline  # noqa: F401  # gives input() line editing and history
    try:
        return input("> " if on_terminal else "")
    except EOFError:
        if on_terminal:
            typer.echo()
        return None
