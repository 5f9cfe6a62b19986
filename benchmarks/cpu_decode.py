"""Decode and prefill speed on the CPU beside transformers and llama.cpp: the same weights, dtype, tokens and threads.

Every measurement has a process of its own; the engines take turns, round after round, and medians are reported.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from machine import Parts, describe_machine, machine_line, write_json
from memory import MIB
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from longburn.weights import fetch

NAME = "cpu_decode"
ENGINES = ("longburn", "transformers", "llama.cpp")
MODULES = {"transformers": "transformers", "llama.cpp": "llama_cpp"}
DTYPES = ("float32", "bfloat16")
WINDOW, NEAR, FAR = 1024, 2048, 60_000
VOCABULARY = 49_152
WORKER = Path(__file__).with_name("cpu_engines.py")

Run = dict[str, Any]


def run_job(python: str, job: Mapping[str, Any]) -> Run:
    """The result of one measurement in a fresh process.

    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python, str(WORKER)], input=json.dumps(job), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{job['kind']} of {job.get('engine', 'longburn')} failed: {done.stderr.strip()[-2000:]}")
    result: Run = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def has_module(python: str, module: str) -> bool:
    """Whether that interpreter can import it."""
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def summary(runs: list[Run], bytes_per_second: float, kv_bytes: float, weights_bytes: int) -> Run:
    """Medians over the rounds of one engine, dtype and context, and what the memory's speed allows."""
    first = runs[0]
    speeds = sorted(1 / run["step_seconds"] for run in runs)
    return {
        "engine": first["engine"],
        "dtype": first["dtype"],
        "context": first["context"],
        "version": first["version"],
        "rounds": len(runs),
        "decode": median(speeds),
        "decode_range": [speeds[0], speeds[-1]],
        "prefill": median(first["context"] / run["prefill_seconds"] for run in runs),
        "floor": bytes_per_second / (weights_bytes + kv_bytes * first["context"]),
        "peak_mib": median(run["peak_bytes"] for run in runs) / MIB,
        "tokens": first["tokens"],
    }


def memory_limit(weights_bytes: int, cache_bytes: int) -> float:
    """MiB that the project allows itself: 1.2 x (weights + cache + 150 MiB)."""
    return 1.2 * ((weights_bytes + cache_bytes) / MIB + 150)


def summarise(parts: Mapping[str, Run], keys: list[str]) -> Run:
    """All of the result but the machine, out of the finished measurements."""
    done = [parts[key] for key in keys]
    reads = [run["bytes_per_second"] for run in done if run["kind"] == "bandwidth"]
    bytes_per_second = median(reads)
    groups: dict[tuple[str, int, str], list[Run]] = {}
    for run in done:
        if run["kind"] == "generation":
            groups.setdefault((run["dtype"], run["context"], run["engine"]), []).append(run)
    rows = []
    for (dtype, context, _), runs in groups.items():
        ours = groups[dtype, context, "longburn"][0]
        per_token = kv_bytes_per_token(ours)
        row = summary(runs, bytes_per_second, per_token, ours["weights_bytes"])
        if row["engine"] == "longburn":
            row["limit_mib"] = memory_limit(ours["weights_bytes"], ours["cache_bytes"])
        row["same_tokens"] = _common_prefix(row.pop("tokens"), ours["tokens"])
        rows.append(row)
    windows = [window_summary(run) for run in done if run["kind"] == "window"]
    return {"read_gb_s": bytes_per_second / 1e9, "generation": rows, "window": windows}


def kv_bytes_per_token(run: Run) -> float:
    """Keys and values of one position in all layers, from the bytes of a cache of known length."""
    return float(run["cache_bytes"] / (run["context"] + run["decode_tokens"] + 2))


def window_summary(run: Run) -> Run:
    """Speeds at both positions, and the median of their ratio, which was taken turn by turn."""
    near, far = run["step_seconds"]["near"], run["step_seconds"]["far"]
    return {
        "dtype": run["dtype"],
        "window": run["window"],
        "near": run["near"],
        "far": run["far"],
        "near_decode": 1 / median(near),
        "far_decode": 1 / median(far),
        "ratio": median(a / b for a, b in zip(near, far, strict=True)),
        "cache_mib": run["cache_bytes"] / MIB,
        "peak_mib": run["peak_bytes"] / MIB,
        "limit_mib": memory_limit(run["weights_bytes"], 2 * run["cache_bytes"]),
    }


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def generation_table(result: Run, dtype: str) -> Table:
    """Every engine and context of one dtype."""
    table = Table(title=f"SmolLM2-135M, {dtype}; reads at {result['read_gb_s']:.1f} GB/s")
    for name in ("context", "engine"):
        table.add_column(name)
    for name in ("decode tok/s", "/ transformers", "of floor", "prefill tok/s", "/ transformers", "peak MiB", "allowed"):
        table.add_column(name, justify="right")
    rows = {(row["context"], row["engine"]): row for row in result["generation"] if row["dtype"] == dtype}
    for (context, engine), row in rows.items():
        peer = rows.get((context, "transformers"))
        ratios = [f"{row[what] / peer[what]:.2f}x" if peer else "-" for what in ("decode", "prefill")]
        table.add_row(
            str(context),
            engine,
            f"{row['decode']:.1f}",
            ratios[0],
            f"{row['decode'] / row['floor']:.0%} of {row['floor']:.1f}",
            f"{row['prefill']:.0f}",
            ratios[1],
            f"{row['peak_mib']:.0f}",
            f"{row['limit_mib']:.0f}" if "limit_mib" in row else "",
            end_section=engine == ENGINES[-1],
        )
    return table


def window_table(result: Run) -> Table:
    """Decode speed along an endless stream."""
    table = Table(title=f"longburn, window {WINDOW} + 4 sink tokens, relative")
    for name in ("dtype", f"at {NEAR}", "far along", "ratio", "cache MiB", "peak MiB", "allowed"):
        table.add_column(name, justify="right")
    for row in result["window"]:
        table.add_row(
            row["dtype"],
            f"{row['near_decode']:.1f} tok/s",
            f"{row['far_decode']:.1f} tok/s at {row['far']:,}",
            f"{row['ratio']:.3f}",
            f"{row['cache_mib']:.1f}",
            f"{row['peak_mib']:.0f}",
            f"{row['limit_mib']:.0f}",
        )
    return table


def plan(
    engines: list[str], dtypes: list[str], contexts: list[int], rounds: int, with_window: bool, far: int, shared: Run
) -> dict[str, Run]:
    """Every measurement under its key, in the order in which they are made."""
    jobs: dict[str, Run] = {}
    for number in range(rounds):
        jobs[f"{number} bandwidth"] = {"kind": "bandwidth", **shared}
        for dtype in dtypes:
            for context in contexts:
                for engine in engines:
                    job = {"kind": "generation", "engine": engine, "dtype": dtype, "context": context, **shared}
                    jobs[f"{number} {dtype} {context} {engine}"] = job
    if with_window:
        for dtype in dtypes:
            job = {"kind": "window", "dtype": dtype, "window": WINDOW, "near": NEAR, "far": far, "rounds": 9, **shared}
            jobs[f"window {dtype}"] = job
    return jobs


def main(
    engines: Annotated[str, typer.Option(help="Comma-separated; longburn always runs.")] = ",".join(ENGINES),
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(DTYPES),
    contexts: Annotated[str, typer.Option(help="Tokens before the decode steps, comma-separated.")] = "512,4096,8192",
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each engine, dtype and context.")] = 5,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Timed steps in each.")] = 24,
    window: Annotated[bool, typer.Option(help="Also decode far along an endless stream.")] = True,
    far: Annotated[int, typer.Option(min=NEAR, help="How far.")] = FAR,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    peers_python: Annotated[str, typer.Option(help="Interpreter that has the other engines.")] = sys.executable,
    llama_kv: Annotated[str, typer.Option(help="llama.cpp's cache: float16, its default, or 'same' dtype.")] = "float16",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not take up a run that was cut short.")] = False,
    save: Annotated[bool, typer.Option(help="Write docs/assets/cpu_decode.json.")] = True,
) -> None:
    """Decode and prefill tokens/s and peak memory of SmolLM2-135M on the CPU, beside other engines."""
    console = Console(highlight=False)
    torch.set_num_threads(threads)
    wanted = [engine for engine in ENGINES if engine == "longburn" or engine in engines.split(",")]
    for engine in wanted[1:]:
        if not has_module(peers_python, MODULES[engine]):
            console.print(f"{engine}: {peers_python} has no {MODULES[engine]}; left out", soft_wrap=True)
    wanted = [engine for engine in wanted if engine == "longburn" or has_module(peers_python, MODULES[engine])]
    shared = {"threads": threads, "decode_tokens": decode_tokens, "vocab_size": VOCABULARY, "seed": 0}
    sizes = [int(context) for context in contexts.split(",")]
    jobs = plan(wanted, dtypes.split(","), sizes, rounds, window, far, shared)
    parts = Parts(NAME, {"jobs": jobs, "llama_kv": llama_kv, "python": peers_python, "machine": describe_machine()})
    if fresh:
        parts.clear()
    source = fetch("smollm2")
    with (
        tempfile.TemporaryDirectory(prefix="longburn-peers-") as scratch,
        Progress(
            TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)
        ) as progress,
    ):
        task = progress.add_task("weights", total=len(jobs))
        models = weights_for(wanted, dtypes.split(","), source, Path(scratch))
        for key, job in jobs.items():
            progress.update(task, description=key)
            if key not in parts:
                ours = job.get("engine", "longburn") == "longburn"
                full = {**job, "model": models.get((job.get("engine"), job.get("dtype")), str(source))}
                full["kv_dtype"] = job.get("dtype") if llama_kv == "same" else llama_kv
                parts[key] = {**job, **run_job(sys.executable if ours else peers_python, full)}
            progress.advance(task)
    result = {
        "machine": describe_machine(),
        "rounds": rounds,
        "llama_kv": llama_kv,
        **summarise(parts, list(jobs)),
    }
    for dtype in dtypes.split(","):
        console.print(generation_table(result, dtype))
    if window:
        console.print(window_table(result))
    console.print(machine_line(result["machine"]), soft_wrap=True)
    if save:
        console.print(f"wrote {write_json(NAME, result)}", soft_wrap=True)
    parts.clear()


def weights_for(engines: list[str], dtypes: list[str], source: Path, scratch: Path) -> dict[tuple[str, str], str]:
    """What each engine other than longburn reads, by engine and dtype; written to `scratch` in a process of its own."""
    writers = {
        "transformers": ("write_safetensors", "smollm2", "directory-"),
        "llama.cpp": ("write_gguf", str(source), "model.gguf-"),
    }
    models = {}
    for engine in engines:
        for dtype in dtypes:
            if engine in writers:
                function, model, stem = writers[engine]
                path = scratch / f"{stem}{dtype}"
                code = f"import peer_weights, pathlib as p; peer_weights.{function}({model!r}, {dtype!r}, p.Path({str(path)!r}))"
                subprocess.run([sys.executable, "-c", code], cwd=WORKER.parent, check=True, capture_output=True)
                models[engine, dtype] = str(path)
    return models


if __name__ == "__main__":
    typer.run(main)
