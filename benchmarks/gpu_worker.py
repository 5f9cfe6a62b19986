"""One section of the GPU benchmark in a process of its own: a job as JSON on stdin, records as JSON lines on stdout."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_attention
import gpu_model
import gpu_timing

SECTIONS: dict[str, Callable[[dict[str, Any]], Iterator[dict[str, Any]]]] = {
    "ceilings": lambda job: iter([gpu_timing.ceilings()]),
    "decode attention": lambda job: gpu_attention.decode(),
    "prefill attention": lambda job: gpu_attention.prefill(),
    "flex": lambda job: gpu_attention.flex(),
    "model": lambda job: gpu_model.model(Path(job["checkpoint"])),
    "warm model": lambda job: gpu_model.warm("plain"),
    "warm packed": lambda job: gpu_model.warm("packed"),
    "warm prompts": lambda job: gpu_model.warm("prompts"),
    "transformers": lambda job: gpu_model.transformers(Path(job["checkpoint"])),
}


def main() -> None:
    """Print every record as soon as it is there."""
    job = json.load(sys.stdin)
    for record in SECTIONS[job["section"]](job):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
