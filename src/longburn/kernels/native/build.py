"""Compiling `rows.c` for this machine, and loading it beside PyTorch."""

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

SOURCE = Path(__file__).with_name("rows.c")
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
    """The compiled library, or why there is none. The first call on a machine compiles for about a second."""
    if os.environ.get("LONGBURN_NATIVE") == "0":
        return "LONGBURN_NATIVE=0 turns it off"
    if sys.platform != "linux":
        return f"is built on Linux only, not on {sys.platform}"
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return "needs a C compiler (cc, or the one that CC names)"
    runtime = _openmp_runtime()
    if runtime is None:
        return "finds no OpenMP runtime in this PyTorch, whose threads it must share"
    try:
        built = ctypes.CDLL(str(_built(compiler, runtime)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return f"could not be compiled by {compiler}: {' '.join(detail.split())[:300]}"
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    built.longburn_linear.argtypes = [pointer, pointer, pointer, pointer, integer, integer, ctypes.c_int]
    built.longburn_swiglu.argtypes = [*[pointer] * 6, *[integer] * 3, ctypes.c_int]
    built.longburn_rms_norm.argtypes = [pointer, pointer, pointer, integer, integer, ctypes.c_float, ctypes.c_int]
    built.longburn_attend.argtypes = [pointer]
    for function in (built.longburn_linear, built.longburn_swiglu, built.longburn_rms_norm, built.longburn_attend):
        function.restype = None
    return built


def _built(compiler: str, runtime: Path) -> Path:
    """The shared library for this source, compiler, processor and PyTorch; compiled if it is not there yet."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    identity = "\n".join([SOURCE.read_text(), version, str(FLAGS), _processor(), str(runtime)])
    directory = Path(os.environ.get("LONGBURN_CACHE") or platformdirs.user_cache_dir("longburn")) / "native"
    target = directory / f"rows-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        compiled, linked = Path(scratch, "rows.o"), Path(scratch, "rows.so")
        for command in (
            [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
            # Linked with the very runtime that PyTorch has loaded: two pools of threads would wait for each other's
            # cores.
            [compiler, "-shared", "-Wl,--no-undefined", str(compiled), str(runtime), "-lm", "-o", str(linked)],
        ):
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        os.replace(linked, target)  # whole or not at all, also when two processes compile at once
    return target


def _openmp_runtime() -> Path | None:
    return next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)


def _processor() -> str:
    """What `-march=native` looks at, so that a cache shared by different machines holds a build for each."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
