"""Compiling the C files beside this one for this machine, and loading them beside PyTorch."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import platformdirs
import torch

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fPIC",
    "-fopenmp",
    "-std=gnu11",
    "-Werror=implicit-function-declaration",
)


@cache
def library() -> "ctypes.CDLL | str":
    """The compiled library, or why there is none. The first call on a machine compiles for a few seconds."""
    if os.environ.get("LONGBURN_NATIVE") == "0":
        return "LONGBURN_NATIVE=0 turns it off"
    if sys.platform != "linux":
        return f"is built on Linux only, not on {sys.platform}"
    found = compiler()
    if found is None:
        return "needs a C compiler (cc, or the one that CC names)"
    runtime = _openmp_runtime()
    if runtime is None:
        return "finds no OpenMP runtime in this PyTorch, whose threads it must share"
    try:
        return ctypes.CDLL(str(_built(found, runtime)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return f"could not be compiled by {found}: {' '.join(detail.split())[:300]}"


def compiler() -> str | None:
    """The path of the machine's C compiler."""
    return shutil.which(os.environ.get("CC") or "cc")


def _built(compiler: str, runtime: Path) -> Path:
    """The shared library for this source, compiler, processor and PyTorch; compiled if it is not there yet."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    identity = "\n".join([*(source.read_text() for source in SOURCES), version, str(FLAGS), _processor(), str(runtime)])
    directory = Path(os.environ.get("LONGBURN_CACHE") or platformdirs.user_cache_dir("longburn")) / "native"
    target = directory / f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        linked = Path(scratch, "kernels.so")
        objects = []
        for source in (source for source in SOURCES if source.suffix == ".c"):
            objects.append(str(Path(scratch, source.stem + ".o")))
            _compile(compiler, *FLAGS, "-c", str(source), "-o", objects[-1])
        # Linked with the very runtime that PyTorch has loaded: two pools of threads would wait for each other's cores.
        _compile(compiler, "-shared", "-Wl,--no-undefined", *objects, str(runtime), "-lm", "-o", str(linked))
        os.replace(linked, target)  # whole or not at all, also when two processes compile at once
    return target


def _compile(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def _openmp_runtime() -> Path | None:
    return next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)


def _processor() -> str:
    """What `-march=native` looks at, so that a cache shared by different machines holds a build for each."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
