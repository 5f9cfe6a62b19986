"""A long stream through a small cache: its bytes equal the formula after every call, and the process stops growing.

The formula is written out here from the model's sizes, independently of the cache that it checks.
"""

import random
from collections.abc import Mapping
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from longburn.cache import AttnWindow
from longburn.models import load_model
from longburn.models.llama import LlamaConfig
from longburn.weights import fetch
from machine import describe_machine, machine_line, write_json
from memory import MIB, memory_bytes
from sheets import Sheet, console

NAME = "constant_memory"
WINDOW = AttnWindow(1024, sink_tokens=4, relative_sinks=True)


def cache_formula(config: LlamaConfig, window: AttnWindow, itemsize: int) -> int:
    """Bytes of all layers' caches for one row: keys and values of every slot, and each slot's position (int64).

    Slots: the window, the sink tokens, and one that takes what is written nowhere.
    """
    assert window.size is not None
    slots = window.size + window.sink_tokens + 1
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim * itemsize
    return config.num_hidden_layers * slots * (keys_and_values + 8)


def stream(tokens: int, chunk: int, every: int, dtype: torch.dtype, progress: Progress) -> dict[str, Any]:
    """The series: at every `every` tokens the position, the cache's bytes and the process's, resident and peak.

    Raises:
        RuntimeError: the cache's bytes differ from the formula after some call.
    """
    model = load_model(fetch("smollm2"), dtype=dtype, window=WINDOW).model
    wanted = cache_formula(model.config, WINDOW, dtype.itemsize)
    cache = model.init_cache(1)
    draw = random.Random(0)
    task = progress.add_task("tokens", total=tokens)
    series, calls = [], 0
    with torch.no_grad():
        while cache.position < tokens:
            count = min(chunk, tokens - cache.position)
            model.forward_logits(torch.tensor([[draw.randrange(model.vocab_size) for _ in range(count)]]), cache)
            calls += 1
            if cache.nbytes != wanted:
                raise RuntimeError(f"at position {cache.position} the cache has {cache.nbytes} bytes, wanted {wanted}")
            progress.advance(task, count)
            if cache.position // every > (cache.position - count) // every:
                resident, peak = memory_bytes()
                series.append({"position": cache.position, "cache": cache.nbytes, "resident": resident, "peak": peak})
    return {"tokens": tokens, "chunk": chunk, "calls": calls, "formula": wanted, "series": series}


def sheet(result: Mapping[str, Any]) -> Sheet:
    """The series, in MiB."""
    rows = [
        [f"{at['position']:,}", *(f"{at[what] / MIB:.1f}" for what in ("cache", "resident", "peak"))]
        for at in result["series"]
    ]
    title = (
        f"{result['tokens']:,} tokens in {result['calls']} calls, {result['dtype']}; formula {result['formula']:,} B"
    )
    return Sheet(title, ("position", "cache MiB", "resident MiB", "peak MiB"), rows)


def finding(result: Mapping[str, Any]) -> str:
    """What the series shows; `stream` would not have come to its end had one cache differed from the formula."""
    first, last = result["series"][0], result["series"][-1]
    grown = (last["peak"] - first["peak"]) / MIB
    return (
        f"The cache's bytes equal the formula after each of {result['calls']} calls. "
        f"Peak memory grew by {grown:.1f} MiB from position {first['position']:,} to {last['position']:,}."
    )


def main(
    tokens: Annotated[int, typer.Option(min=WINDOW.size or 1, help="How long the stream is.")] = 100_000,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens a call.")] = 512,
    every: Annotated[int, typer.Option(min=1, help="A row of the table each so many tokens.")] = 10_000,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    save: Annotated[bool, typer.Option(help="Write docs/assets/constant_memory.json.")] = True,
) -> None:
    """Cache bytes and process memory along a stream through a window of 1024 tokens and 4 sink tokens."""
    torch.set_num_threads(threads)
    out = console()
    with Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)
    ) as progress:
        measured = stream(tokens, chunk, every, getattr(torch, dtype), progress)
    result = {"machine": describe_machine(), "dtype": dtype, **measured}
    out.print(sheet(result).rich())
    out.print(finding(result))
    out.print(machine_line(result["machine"]))
    if save:
        out.print(f"wrote {write_json(NAME, result)}")


if __name__ == "__main__":
    typer.run(main)
