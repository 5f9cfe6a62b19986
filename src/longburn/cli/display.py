"""What the command shows: text on stdout as it is made, and beside it, on stderr, bars and notes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal

import typer

from longburn.cli.reading import Piece


@contextmanager
def progress(
    label: str, *, count: Literal["number", "bytes", "share"] = "number"
) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (done, total) that moves a bar on stderr, if that is a terminal. It is gone at the end."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    counts = {"number": MofNCompleteColumn, "bytes": DownloadColumn, "share": TaskProgressColumn}
    columns = (TextColumn("{task.description}"), BarColumn(), counts[count](), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Screen:
    """Writes text as it comes, and a last newline however it ends: the answer to stdout, all else to stderr.

    What is not the answer stands below its label; on a terminal it is dim.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self.open_line = False
        self.label: str | None = None

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end_line()

    def __call__(self, piece: Piece) -> None:
        """Shows a piece of text at once."""
        if self.silent:
            return
        if piece.label != self.label:
            self.end_line()
            self.label = piece.label
            if piece.label is not None:
                self.write(f"[{piece.label}]\n")
        self.write(piece.text)

    def end_line(self) -> None:
        if self.open_line:
            self.write("\n")

    def write(self, text: str) -> None:
        aside = self.label is not None
        typer.echo(typer.style(text, dim=True) if aside else text, nl=False, err=aside)
        (sys.stderr if aside else sys.stdout).flush()
        self.open_line = not text.endswith("\n")


def note(text: str) -> None:
    """A line on stderr, beside the text itself."""
    typer.echo(text, err=True)
