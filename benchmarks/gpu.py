"""Attention and GPT-OSS on one GPU beside PyTorch's own kernels and transformers: one run, one table, under 9 minutes.

Every section has a process and a time limit of its own; what is done by then counts. Each figure stands beside the time
in which the device could have moved its bytes or computed its FLOP at best, at the speeds measured in the same run, and
is given only if the result was right in the same run.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gpu_summary import notes, sheets
from machine import describe_gpu, describe_machine, machine_line, write_json
from sheets import console

NAME = "gpu"
WORKER = Path(__file__).with_name("gpu_worker.py")
WRITER = Path(__file__).with_name("synthetic_gpt_oss.py")
LIMITS = {  # seconds, by section in the order of the run
    "ceilings": 60,
    "decode attention": 120,
    "model": 180,
    "prefill attention": 120,
    "flex": 120,
    "transformers": 120,
}
WARM = {  # what makes a section's compilers do their work, side by side with the others'
    "decode attention": ["decode attention"],
    "prefill attention": ["prefill attention"],
    "flex": ["flex"],
    "model": ["warm model", "warm packed", "warm prompts"],
}
WARM_SECONDS = 45
UNASKED = [section for section in LIMITS if section != "transformers"]
FROM_CHECKPOINT = {"model", "transformers"}


def warm_up(sections: Sequence[str]) -> float:
    """Run the work of these sections once, all at the same time, and forget the results; seconds that it took.

    Compiled kernels stay in the caches on disk, so that a section's own time goes into measuring.
    """
    began = time.monotonic()
    processes = []
    for section in chain.from_iterable(WARM.get(name, ()) for name in sections):
        process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({"section": section}).encode())
        process.stdin.close()
        processes.append(process)
    for process in processes:
        try:
            process.wait(max(0.0, began + WARM_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return time.monotonic() - began


def run_section(section: str, job: Mapping[str, Any], limit: float, keep: Callable[[Any], None]) -> str | None:
    """Hand every record of a section to `keep` as it comes, for `limit` seconds; says why there are not more."""
    process = subprocess.Popen(
        [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    late = threading.Event()
    timer = threading.Timer(max(limit, 1), lambda: (late.set(), process.kill()))
    timer.start()
    try:
        process.stdin.write(json.dumps({"section": section, **job}))
        process.stdin.close()
        for line in process.stdout:
            if line.startswith("{"):
                keep(json.loads(line))
        code = process.wait()
    finally:
        timer.cancel()
    reader.join(5)
    if late.is_set():
        return f"stopped after {limit:.0f} s"
    return f"failed: {' '.join(''.join(errors).split())[-400:]}" if code else None


def main(
    only: Annotated[str, typer.Option(help=f"Sections to run, comma-separated, of {', '.join(LIMITS)}.")] = ",".join(
        UNASKED
    ),
    checkpoint: Annotated[
        Path | None, typer.Option(help="A GPT-OSS in OpenAI's format. Default: a random one is written and removed.")
    ] = None,
    scratch: Annotated[Path | None, typer.Option(help="Where that one is written; it takes 13.8 GB.")] = None,
    warm: Annotated[bool, typer.Option(help="Run everything once side by side first, for the compilers.")] = True,
    minutes: Annotated[float, typer.Option(min=0.1, help="For everything.")] = 9.0,
    save: Annotated[bool, typer.Option(help="Write docs/assets/gpu.json.")] = True,
) -> None:
    """Attention and GPT-OSS-20B's shape on one GPU, beside peers and floors."""
    out = console()
    wanted = only.split(",")
    if unknown := set(wanted) - LIMITS.keys():
        raise typer.BadParameter(f"no section {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here")
    began = time.monotonic()
    result: dict[str, Any] = {"machine": describe_machine() | describe_gpu(), "sections": {}, "cut": {}}
    with ExitStack() as stack:
        writer = None
        if checkpoint is None and FROM_CHECKPOINT.intersection(wanted):
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="longburn-20b-", dir=scratch))
            checkpoint = Path(directory)
            # The other sections compute on the device alone, so it may be written meanwhile.
            writer = subprocess.Popen([sys.executable, str(WRITER), str(checkpoint)], stdout=subprocess.PIPE, text=True)
        if warm:
            out.print(f"compilers: {warm_up(wanted):.0f} s")
        for section, limit in LIMITS.items():
            if section not in wanted:
                continue
            if section in FROM_CHECKPOINT and writer is not None:
                result["written"] = writer.communicate()[0].strip()
                if writer.returncode:
                    result["cut"]["checkpoint"] = f"{WRITER.name} failed with code {writer.returncode}"
                writer = None
            left = 60 * minutes - (time.monotonic() - began)
            started = time.monotonic()
            records = result["sections"].setdefault(section, [])

            def keep(record: Any, records: list[Any] = records) -> None:
                records.append(record)
                if save:
                    write_json(NAME, result)

            if cut := run_section(section, {"checkpoint": str(checkpoint)}, min(limit, left), keep):
                result["cut"][section] = cut
            took = f"{time.monotonic() - started:.0f} s"
            out.print(f"{section}: {len(records)} records in {took}{f', {cut}' if cut else ''}")
    if save:
        write_json(NAME, result)
    for sheet in sheets(result):
        out.print(sheet.rich())
    for note in notes(result):
        out.print(note)
    out.print(machine_line(result["machine"]))


if __name__ == "__main__":
    typer.run(main)
