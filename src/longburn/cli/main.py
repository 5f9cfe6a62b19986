"""The command's entry point: what every subcommand shares, and how each way to fail is told."""

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from longburn.cli import bias_view, chat, convert, doctor, generate, inspect, models, music, plan, play
from longburn.cli.options import Debug, Session

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

app = typer.Typer(
    name="longburn",
    help="Long-context streaming inference: generate, chat, and the models to do it with.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("plan")(plan.plan)
app.command("doctor")(doctor.doctor)
app.command("music")(music.music)
app.command("play")(play.play)
app.command("bias-view")(bias_view.bias_view)
app.add_typer(models.app, name="models")


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longburn {version('longburn')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Debug = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    else:
        context.obj.command = f"longburn {context.invoked_subcommand}"


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    sys.exit(execute(arguments))


def execute(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code. Each failure is one line on stderr.

    Raises:
        Exception: what made the command fail, with `--debug` alone.
    """
    session = Session()
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="longburn", standalone_mode=False, obj=session)
    except typer.TyperException as error:
        return fail(f"{describe_usage(error)} (see '{session.command} --help')", error.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if session.debug:
            raise
        return fail(describe(error), 1)
    return code if isinstance(code, int) else 0


def describe_usage(error: typer.TyperException) -> str:
    """Typer's message, and what came, which only the validation error behind it tells."""
    message = error.format_message().rstrip(".")
    errors: Callable[[], list[dict[str, object]]] = getattr(error.__cause__, "errors", list)
    came = [repr(cause["input"]) for cause in errors()]
    return ", got ".join([message, *(value for value in came if value not in message)])


def describe(error: Exception) -> str:
    """The message of an error a user can act on; anything else also says what it is and how to see more."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | OSError | ImportError | RuntimeError) and str(error):
        return str(error)
    return f"unexpected {type(error).__name__} (--debug shows where): {error}"


def fail(message: str, code: int) -> int:
    """One line on stderr: of a list (of a checkpoint's misfits, say) the head and the first entry."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    more = f" (and {len(lines) - 2} more; --debug shows all)" if len(lines) > 2 else ""
    typer.echo(f"longburn: error: {': '.join(lines[:2])}{more}", err=True)
    return code
