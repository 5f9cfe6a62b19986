"""`longburn chat`: a conversation that keeps its cache, so that each turn reads only what is new."""

import sys

import typer

from longburn.cli.conversation import Conversation
from longburn.cli.display import Screen, note
from longburn.cli.options import RunOptions, takes

COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops a reply"


@takes(RunOptions)
def chat(options: RunOptions) -> None:
    """Talk with a model. Each line is one turn; /reset starts anew, /exit or Ctrl-D ends, Ctrl-C stops a reply."""
    stream = options.start()
    loaded, cache = stream.loaded, stream.cache
    conversation = Conversation(loaded)
    if sys.stdin.isatty():
        note(f"{loaded.name}: {COMMANDS}.")
    while (line := ask()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                cache.reset()
                conversation = Conversation(loaded)
            case command if command.startswith("/"):
                note(f"no command {command.split()[0]}: {COMMANDS}")
            case question:
                prompt, before = conversation.ask(question), cache.position
                with Screen() as show:
                    reply = stream.reply(prompt, show)
                conversation.said(prompt, reply.tokens, read=cache.position - before)
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
