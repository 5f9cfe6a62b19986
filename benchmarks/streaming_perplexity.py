"""How well a model predicts a whole book that streams through a small cache (the StreamingLLM experiment,
arXiv 2309.17453), under each way of keeping a window.

Every scheme predicts the same tokens, each from what its cache still holds. `recompute` is the expensive truth that a
rolling cache stands in for: the last 768 to 1023 tokens, encoded again from scratch for every 256 predictions.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from books import load_book
from longburn.cache import AttnWindow
from longburn.models import load_model
from longburn.models.llama import Llama
from longburn.text import Tokenizer
from longburn.weights import GgufFile, fetch
from machine import ASSETS, Parts, describe_machine, machine_line, write_json
from sheets import Sheet, console

NAME = "streaming_perplexity"
MODEL = "smollm2"
BUCKET = 2048
CHUNK = 256  # tokens a forward call: the logits of one are 256 x 49152 floats, 48 MiB
CACHE = 1024
SINKS = 4

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Scheme:
    """A way of keeping a window.

    Attributes:
        window: of every layer, over one cache for the whole stream; None to encode each window from scratch.
        color, width, dash: of its line in the plot.
    """

    title: str
    window: AttnWindow | None
    color: str
    width: float = 1.5
    dash: str = "-"


SCHEMES = {
    "dense": Scheme("all keys", AttnWindow(), "#7a7a7a"),
    "no_sinks": Scheme("window 1024, no sinks", AttnWindow(CACHE), "#c77a00"),
    "absolute": Scheme("window 1020 + 4 sinks, absolute", AttnWindow(CACHE - SINKS, sink_tokens=SINKS), "#b3262e"),
    "relative": Scheme(
        "window 1020 + 4 sinks, relative",
        AttnWindow(CACHE - SINKS, sink_tokens=SINKS, relative_sinks=True),
        "#1f5fbf",
        width=3.0,
    ),
    "recompute": Scheme("recompute the window", None, "#111111", 1.2, "--"),
}


def streamed_nll(model: Llama, tokens: Tensor, advance: Advance) -> Iterator[Tensor]:
    """Negative log-likelihood of `tokens[1:]`, a chunk at a time, each token predicted from the rolling cache."""
    cache = model.init_cache(1, max_length=len(tokens))
    for start in range(0, len(tokens) - 1, CHUNK):
        stop = min(start + CHUNK, len(tokens) - 1)
        yield _nll(
            model.forward_logits(tokens[None, start:stop], cache, all_positions=True), tokens[start + 1 : stop + 1]
        )
        advance(stop - start)


def recomputed_nll(model: Llama, tokens: Tensor, advance: Advance) -> Iterator[Tensor]:
    """The same from fresh encodings: CHUNK targets from 3 x CHUNK to 4 x CHUNK - 1 tokens before each of them."""
    for start in range(0, len(tokens) - 1, CHUNK):
        stop = min(start + CHUNK, len(tokens) - 1)
        first = max(0, start + 1 - (CACHE - CHUNK))
        cache = model.init_cache(1, max_length=stop - first)
        if first < start:
            model.forward_logits(tokens[None, first:start], cache)
        yield _nll(
            model.forward_logits(tokens[None, start:stop], cache, all_positions=True), tokens[start + 1 : stop + 1]
        )
        advance(stop - start)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits[0].float(), targets, reduction="none").double()


def bucket_perplexities(nll: Tensor) -> list[float]:
    """Perplexity of each BUCKET of positions; `nll[i]` is of the token at position i + 1."""
    positions = torch.arange(1, len(nll) + 1)
    return [
        math.exp(nll[positions // BUCKET == bucket].mean().item()) for bucket in range(int(positions[-1]) // BUCKET + 1)
    ]


def measure(scheme: Scheme, tokens: Tensor, advance: Advance) -> dict[str, Any]:
    """Perplexity of each bucket and over the whole text, the time it took and where."""
    model = load_model(MODEL, window=scheme.window).model
    began = time.perf_counter()
    predict = recomputed_nll if scheme.window is None else streamed_nll
    with torch.no_grad():
        nll = torch.cat(list(predict(model, tokens, advance)))
    return {
        "title": scheme.title,
        "tokens": len(tokens),
        "perplexity": [round(p, 4) for p in bucket_perplexities(nll)],
        "overall": round(math.exp(nll.mean().item()), 4),
        "seconds": round(time.perf_counter() - began, 1),
        "machine": describe_machine(),
    }


def largest_gap(schemes: Mapping[str, Mapping[str, Any]]) -> tuple[float, int]:
    """The largest relative difference of relative sinks from recompute over the buckets, signed, and its bucket."""
    pairs = zip(schemes["relative"]["perplexity"], schemes["recompute"]["perplexity"], strict=True)
    gaps = [ours / truth - 1 for ours, truth in pairs]
    worst = max(range(len(gaps)), key=lambda bucket: abs(gaps[bucket]))
    return gaps[worst], worst


def sheet(result: Mapping[str, Any]) -> Sheet:
    """One row a scheme, one column a bucket."""
    buckets = math.ceil(result["tokens"] / BUCKET)
    rows = []
    for scheme in result["schemes"].values():
        values = [f"{p:.1f}" if p < 100 else f"{p:.0f}" for p in scheme["perplexity"]]
        rows.append([scheme["title"], *values, *["-"] * (buckets - len(values))])
    title = f"Perplexity by bucket of {BUCKET} tokens: {result['model']} on {result['book']['title']}"
    return Sheet(title, ["cache", *(f"{(b + 1) * BUCKET // 1024}k" for b in range(buckets))], rows)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Perplexity along the book, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "savefig.dpi": 160})
    figure, axes = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    trained = result["trained_context"]
    if result["tokens"] > trained:
        axes.axvline(trained, color="#bbbbbb", linewidth=1, zorder=0)
        axes.text(
            trained,
            0.99,
            " trained context",
            color="#777777",
            va="top",
            fontsize=9,
            transform=axes.get_xaxis_transform(),
        )
    for key, scheme in result["schemes"].items():
        style = SCHEMES[key]
        ends = [min((bucket + 1) * BUCKET, scheme["tokens"]) for bucket in range(len(scheme["perplexity"]))]
        middles = [(bucket * BUCKET + end) / 2 for bucket, end in enumerate(ends)]
        cut = f" (first {scheme['tokens']:,})" if scheme["tokens"] < result["tokens"] else ""
        marker = "o" if style.dash == "-" else ""
        axes.plot(
            middles,
            scheme["perplexity"],
            style.dash,
            color=style.color,
            linewidth=style.width,
            marker=marker,
            markersize=2.5 + style.width,
            label=scheme["title"] + cut,
        )
    axes.set_yscale("log")
    axes.set_xlim(0, result["tokens"])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:.0f}k" if x else "0")
    axes.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(4 * BUCKET if result["tokens"] > 16384 else 1024))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if str(int(y))[0] in "235" else "")
    axes.set_xlabel("position in the book (tokens)")
    axes.set_ylabel("perplexity")
    axes.grid(axis="y", which="both", color="#e6e6e6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{result['model']} reads {result['book']['title'].split(' (')[0]} through a cache of {CACHE} tokens",
        fontsize=11,
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def main(
    tokens: Annotated[int, typer.Option(min=2 * CACHE, help="How much of the book is read.")] = 40_960,
    dense_tokens: Annotated[int, typer.Option(min=2 * CACHE, help="How far `dense`, whose cost grows, goes.")] = 8192,
    schemes: Annotated[str, typer.Option(help="Which to measure, comma-separated.")] = ",".join(SCHEMES),
    book: Annotated[str | None, typer.Option(help="emma or paradise-lost; default the first to be had.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not take up a run that was cut short.")] = False,
    save: Annotated[bool, typer.Option(help="Write docs/assets/streaming_perplexity.json and .png.")] = True,
) -> None:
    """Perplexity of SmolLM2-135M-Instruct along a book streamed through a cache of 1024 tokens."""
    if unknown := set(wanted := schemes.split(",")) - set(SCHEMES):
        raise typer.BadParameter(f"--schemes: no {', '.join(sorted(unknown))}; there are {', '.join(SCHEMES)}")
    torch.set_num_threads(threads)
    out = console()
    text = load_book(book)
    out.print(text.provenance)
    path = fetch(MODEL)
    metadata = GgufFile(path).metadata
    ids = torch.tensor(Tokenizer.from_gguf(metadata).encode(text.text, special=False))
    if len(ids) < tokens:
        raise typer.BadParameter(f"--tokens {tokens}: the book has {len(ids)}")
    settings = {
        "book": text.sha256,
        "model": path.name,
        "tokens": tokens,
        "dense": dense_tokens,
        "chunk": CHUNK,
        "cache": CACHE,
        "sinks": SINKS,
        "longburn": version("longburn"),
    }
    parts = Parts(NAME, settings)
    if fresh:
        parts.clear()
    with Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)
    ) as progress:
        for key in wanted:
            if key in parts:
                continue
            length = min(tokens, dense_tokens) if key == "dense" else tokens
            task = progress.add_task(SCHEMES[key].title, total=length - 1)
            parts[key] = measure(SCHEMES[key], ids[:length], partial(progress.advance, task))
    measured = {key: parts[key] for key in SCHEMES if key in parts}
    result: dict[str, Any] = {
        "machines": list(dict.fromkeys(machine_line(scheme["machine"]) for scheme in measured.values())),
        "model": "SmolLM2-135M-Instruct",
        "trained_context": metadata["llama.context_length"],
        "book": {"title": text.title, "origin": text.origin, "sha256": text.sha256, "tokens": len(ids)},
        "tokens": tokens,
        "schemes": measured,
    }
    out.print(sheet(result).rich())
    if {"relative", "recompute"} <= set(result["schemes"]):
        gap, bucket = largest_gap(result["schemes"])
        result["largest_gap"] = round(gap, 5)
        out.print(
            f"relative sinks against recompute: at most {gap:+.2%} in any bucket ({(bucket + 1) * 2}k); target 3 %"
        )
    out.print("\n".join(result["machines"]))
    if save:
        written = write_json(NAME, result)
        plot(result, ASSETS / f"{NAME}.png")
        out.print(f"wrote {written} and {NAME}.png")
    parts.clear()


if __name__ == "__main__":
    typer.run(main)
