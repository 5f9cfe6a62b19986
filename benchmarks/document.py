"""Puts the figures of `docs/assets/*.json` between the marks of `docs/benchmarks.md`, so that none is typed by hand."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import typer

import ace_step
import constant_memory
import cpu_decode
import cpu_summary
import gpu
import gpu_summary
import matrix_game_2
import minigrid_models
import streaming_perplexity
import tiny_gpt_oss
from machine import ASSETS, machine_line

PAGE = ASSETS.parent / "benchmarks.md"


def perplexity(result: Mapping[str, Any]) -> str:
    """Plot, table, largest gap, what was read."""
    image = f"![Perplexity along the book](assets/{streaming_perplexity.NAME}.png)"
    gap = f"The largest difference of relative sinks from recomputing is {result['largest_gap']:+.2%} in any bucket."
    book = result["book"]
    source = f"{book['title']} ({book['origin']}, sha256 `{book['sha256'][:16]}`)"
    read = f"Read: the first {result['tokens']:,} of {book['tokens']:,} tokens of {source}."
    return "\n\n".join([image, streaming_perplexity.sheet(result).markdown(), gap, read])


def decode(result: Mapping[str, Any]) -> str:
    """Tables, the versions of the peers, and whether they say the same."""
    versions = {row["engine"]: row["version"] for row in result["generation"]}
    named = ", ".join(f"{engine} ({version})" for engine, version in versions.items())
    rounds = max(row["rounds"] for row in result["generation"])
    same: dict[str, int] = {}
    for row in result["generation"]:
        same[row["dtype"]] = min(same.get(row["dtype"], row["same_greedy_tokens"]), row["same_greedy_tokens"])
    agreement = ", ".join(f"{count} in {dtype}" for dtype, count in same.items())
    notes = (
        f"Medians of {rounds} rounds. Engines: {named}; llama.cpp's cache is {result['llama_kv']}. "
        f"A process that has only imported torch takes {result['torch_mib']:.0f} MiB. "
        f"Of {result['decode_tokens'] + 1} greedy tokens, so many from the first on are the same in all engines and "
        f"contexts: {agreement}. {cpu_summary.quiet(result)}"
    )
    return "\n\n".join([*(sheet.markdown() for sheet in cpu_summary.sheets(result)), notes])


def memory(result: Mapping[str, Any]) -> str:
    """The series, and what it shows."""
    return "\n\n".join([constant_memory.sheet(result).markdown(), constant_memory.finding(result)])


def small_model(result: Mapping[str, Any]) -> str:
    """Tables, plots, what was written beyond the trained length."""
    variants, chunkings, positions = (sheet.markdown() for sheet in tiny_gpt_oss.sheets(result))
    images = {
        "positions": "Bits per byte along the book, far beyond the trained length",
        "sinks": "Share of attention that each head's learned sink takes",
    }
    along, shares = (f"![{title}](assets/{tiny_gpt_oss.NAME}_{kind}.png)" for kind, title in images.items())
    text = f"Text: {result['book']}."
    return "\n\n".join([variants, chunkings, shares, along, positions, tiny_gpt_oss.finding(result), text])


def one_gpu(result: Mapping[str, Any]) -> str:
    """Tables, and under them what they rest on."""
    return "\n\n".join([*(sheet.markdown() for sheet in gpu_summary.sheets(result)), *gpu_summary.notes(result)])


def music(result: Mapping[str, Any]) -> str:
    """Tables, and how far the transformer was from fp32."""
    errors = result["dit"][0]
    check = (
        f"Check in the same run: a velocity in bf16 is {errors['longburn']:.2%} off diffusers' in fp32, "
        f"diffusers' own in bf16 {errors['diffusers']:.2%}. Floors: FLOP at {result['flops'] / 1e12:.0f} TFLOP/s or "
        f"bytes at {result['read'] / 1e12:.2f} TB/s, whichever takes longer."
    )
    return "\n\n".join([*(sheet.markdown() for sheet in ace_step.sheets(result)), check])


def played(result: Mapping[str, Any]) -> str:
    """The table, and what it rests on."""
    return "\n\n".join([*(sheet.markdown() for sheet in matrix_game_2.sheets(result)), matrix_game_2.finding(result)])


def small_worlds(result: Mapping[str, Any]) -> str:
    """Tables, and what they show."""
    return "\n\n".join(
        [*(sheet.markdown() for sheet in minigrid_models.sheets(result)), minigrid_models.finding(result)]
    )


SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    streaming_perplexity.NAME: perplexity,
    cpu_decode.NAME: decode,
    constant_memory.NAME: memory,
    tiny_gpt_oss.NAME: small_model,
    gpu.NAME: one_gpu,
    ace_step.NAME: music,
    matrix_game_2.NAME: played,
    minigrid_models.NAME: small_worlds,
}


def fill(page: str, name: str, content: str) -> str:
    """The page with `content` between the two marks of `name`.

    Raises:
        ValueError: the page has no such marks.
    """
    marks = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(re.escape(marks[0]) + ".*?" + re.escape(marks[1]), re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{PAGE}: no marks {marks[0]} ... {marks[1]}")
    return pattern.sub(lambda _: f"{marks[0]}\n{content}\n{marks[1]}", page)


def main() -> None:
    """Fill docs/benchmarks.md from the result files that are there."""
    page = PAGE.read_text(encoding="utf-8")
    for name, section in SECTIONS.items():
        path = ASSETS / f"{name}.json"
        if not path.is_file():
            typer.echo(f"{name}: no {path}; its section stays as it is")
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        machines = result["machines"] if "machines" in result else [machine_line(result["machine"])]
        page = fill(page, name, f"{section(result)}\n\nMeasured on: {'; '.join(machines)}.")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
