"""Decode and prefill speed on the CPU beside transformers and llama.cpp: the same weights, dtype, tokens and threads.

Every measurement has a process of its own; the engines take turns, round after round, and medians are reported.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cpu_summary import Run, quiet, sheets, summarise
from longburn.weights import fetch
from machine import Parts, busy_seconds, describe_machine, machine_line, write_json
from peer_weights import write_gguf, write_safetensors
from sheets import console

NAME = "cpu_decode"
MODEL, VOCABULARY = "smollm2", 49_152
MODULES = {"longburn": "longburn", "transformers": "transformers", "llama.cpp": "llama_cpp"}  # by engine
DTYPES = ("float32", "bfloat16")
WINDOW, NEAR, FAR = 1024, 2048, 60_000
TURNS = 9  # at each of the two positions of the window measurement
WORKER = Path(__file__).with_name("cpu_engines.py")


def plan(
    engines: Sequence[str], dtypes: Sequence[str], contexts: Sequence[int], rounds: int, far: int | None
) -> dict[str, Run]:
    """Every measurement under its key, in the order in which they are made; `far` None for none over a window."""
    jobs: dict[str, Run] = {}
    for number in range(rounds):
        jobs[f"{number} bandwidth"] = {"kind": "bandwidth"}
        for dtype in dtypes:
            for context in contexts:
                for engine in engines:
                    job = {"kind": "generation", "engine": engine, "dtype": dtype, "context": context}
                    jobs[f"{number} {dtype} {context} {engine}"] = job
    for dtype in dtypes if far is not None else ():
        jobs[f"window {dtype}"] = {
            "kind": "window", "dtype": dtype, "window": WINDOW, "near": NEAR, "far": far, "turns": TURNS
        }  # fmt: skip
    return jobs


def run_job(python: str, job: Mapping[str, Any]) -> Run:
    """The result of one measurement in a fresh process, with the job that it answers.

    `other_cores` says how many cores were busy with anything else meanwhile, on average.

    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    began, busy, own = time.perf_counter(), busy_seconds(), cpu_seconds()
    done = subprocess.run(
        [python, str(WORKER)], input=json.dumps(job), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{job['kind']} of {job.get('engine', 'longburn')} failed: {done.stderr.strip()[-2000:]}")
    after = busy_seconds()
    others = None
    if busy is not None and after is not None:
        others = (after - busy - (cpu_seconds() - own)) / (time.perf_counter() - began)
    return {**job, "other_cores": others, **json.loads(done.stdout.strip().splitlines()[-1])}


def cpu_seconds() -> float:
    """Core-seconds of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def has_module(python: str, module: str) -> bool:
    """Whether that interpreter can import it."""
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def weights_of(engine: str, dtype: str, scratch: Path) -> str:
    """What the engine reads, written to `scratch` where it is not longburn's own file."""
    if engine == "transformers":
        return str(write_safetensors(fetch(MODEL), dtype, scratch / f"safetensors-{dtype}"))
    if engine == "llama.cpp":
        return str(write_gguf(fetch(MODEL), dtype, scratch / f"{dtype}.gguf"))
    return str(fetch(MODEL))


def main(
    engines: Annotated[str, typer.Option(help="Comma-separated; longburn always runs.")] = ",".join(MODULES),
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(DTYPES),
    contexts: Annotated[str, typer.Option(help="Tokens before the decode steps, comma-separated.")] = "512,4096,8192",
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each engine, dtype and context.")] = 5,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Timed steps in each.")] = 24,
    window: Annotated[bool, typer.Option(help="Also decode far along an endless stream.")] = True,
    far: Annotated[int, typer.Option(min=NEAR, help="How far.")] = FAR,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    peers_python: Annotated[str, typer.Option(help="Interpreter that has the other engines.")] = sys.executable,
    llama_kv: Annotated[
        Literal["float16", "same"], typer.Option(help="llama.cpp's cache: its default float16, or the weights' dtype.")
    ] = "float16",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not take up a run that was cut short.")] = False,
    save: Annotated[bool, typer.Option(help="Write docs/assets/cpu_decode.json.")] = True,
) -> None:
    """Decode and prefill tokens/s and peak memory of SmolLM2-135M on the CPU, beside other engines."""
    out = console()
    torch.set_num_threads(threads)
    pythons = {engine: sys.executable if engine == "longburn" else peers_python for engine in MODULES}
    wanted = []
    for engine in MODULES:
        if engine != "longburn" and engine not in engines.split(","):
            continue
        if has_module(pythons[engine], MODULES[engine]):
            wanted.append(engine)
        else:
            out.print(f"{engine} is left out: {pythons[engine]} has no module {MODULES[engine]}")
    sizes = [int(context) for context in contexts.split(",")]
    jobs = plan(wanted, dtypes.split(","), sizes, rounds, far if window else None)
    shared = {"threads": threads, "decode_tokens": decode_tokens, "vocab_size": VOCABULARY, "seed": 0}
    parts = Parts(NAME, {"jobs": jobs, "shared": shared, "llama_kv": llama_kv, "python": peers_python})
    if fresh:
        parts.clear()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="longburn-peers-") as scratch,
        Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress,
    ):
        task = progress.add_task("weights", total=len(jobs))
        models = {(e, d): weights_of(e, d, Path(scratch)) for e in wanted for d in dtypes.split(",")}
        for key, job in jobs.items():
            progress.update(task, description=key, refresh=True)
            if key not in parts:
                engine, dtype = job.get("engine", "longburn"), job.get("dtype", DTYPES[0])
                kv_dtype = dtype if llama_kv == "same" else llama_kv
                where = {"model": models[engine, dtype], "kv_dtype": kv_dtype}
                parts[key] = run_job(pythons[engine], {**job, **shared, **where})
            progress.advance(task)
    result = {
        "machine": describe_machine(),
        "llama_kv": llama_kv,
        "decode_tokens": decode_tokens,
        **summarise([parts[key] for key in jobs]),
    }
    for sheet in sheets(result):
        out.print(sheet.rich())
    out.print(quiet(result))
    out.print(machine_line(result["machine"]))
    if save:
        out.print(f"wrote {write_json(NAME, result)}")
    parts.clear()


if __name__ == "__main__":
    typer.run(main)
