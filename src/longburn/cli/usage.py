"""Wrong usage, as the command line tells it."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def wrong_usage() -> Iterator[None]:
    """A value that the library refuses is wrong usage."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
