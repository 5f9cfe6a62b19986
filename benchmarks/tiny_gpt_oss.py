"""What the small GPT-OSS is worth: held-out loss with and without its parts, and far beyond its trained length.

The checkpoint is the shipped one, its experts in MXFP4; `--bf16` names the directory of the same weights before their
experts were rounded (`train_tiny_gpt_oss.py train` writes it). The text is Emma, which the model never saw, cleaned as
its training texts were.
"""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import longburn.attention.attention as attention_module
from books import load_book
from longburn.attention.core import attend_with_lse
from longburn.cache import AttnWindow, WindowPolicy
from longburn.generation import GenerationConfig, generate
from longburn.models import data
from longburn.models.gpt_oss import GptOss, GptOssConfig
from longburn.models.settings import read_settings
from longburn.sampling import SamplerConfig
from longburn.text import Tokenizer
from machine import ASSETS, Parts, describe_machine, machine_line, write_json
from memory import MIB, memory_bytes
from sheets import Sheet, console

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from tiny_training.texts import prose

NAME = "tiny_gpt_oss"
SHIPPED = Path(data.__path__[0]) / "tiny_gpt_oss"
ROWS = 16  # stretches read at once
CHUNKS = (1, 7, 127, 128, 129, 500)  # beside whole stretches
CHUNKED = 8  # stretches that are read in every chunking
BUCKET = 2048
ROLLING = AttnWindow(1020, sink_tokens=4, relative_sinks=True)  # of the layers that see all keys as trained
EVERY = 5000  # tokens between two readings of the memory

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Scheme:
    """A window for the layers that see all keys as trained; the others keep theirs."""

    title: str
    window: AttnWindow
    color: str
    width: float = 1.5


SCHEMES = {
    "dense": Scheme("all keys", AttnWindow(), "#7a7a7a"),
    "no_sinks": Scheme("window 1024, no kept tokens", AttnWindow(1024), "#c77a00"),
    "absolute": Scheme("window 1020 + 4 kept, absolute", AttnWindow(1020, sink_tokens=4), "#b3262e"),
    "relative": Scheme("window 1020 + 4 kept, relative", ROLLING, "#1f5fbf", 2.6),
}


@dataclass(frozen=True)
class Text:
    """Held-out tokens `[n]`, and how many bytes each stands for, `[n]`."""

    tokens: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer) -> "Text":
        ids = torch.tensor([tokenizer.eos, *tokenizer.encode(text, special=False)])
        return cls(ids, torch.tensor([len(tokenizer.token_bytes(id)) for id in ids.tolist()]))

    def bits_per_byte(self, nll: Tensor, first: int = 1) -> float:
        """Of the losses `[m]` of tokens `first .. first + m - 1`, in nats."""
        return nll.sum().item() / math.log(2) / int(self.sizes[first : first + len(nll)].sum())


def load(
    checkpoint: Path, *, sinks: bool = True, widen: int = 1, full: AttnWindow | None = None, dtype: str = "float32"
) -> GptOss:
    """The model; without learned sinks, with windows `widen` times as wide, or with a window on the full layers."""
    config = GptOssConfig.from_config(read_settings(checkpoint))
    policy: WindowPolicy = replace(config, sliding_window=widen * config.sliding_window).policy(full)
    model = GptOss.from_checkpoint(checkpoint, dtype=getattr(torch, dtype), policy=policy)
    if not sinks:
        for attention in model.attentions:
            assert attention.sinks is not None
            torch.nn.init.constant_(attention.sinks, -torch.inf)
    return model


@torch.no_grad()
def stretch_nll(model: GptOss, tokens: Tensor, context: int, chunk: int | None, advance: Advance) -> Tensor:
    """Losses of `tokens[1:]` up to a whole number of stretches, each predicted from its own stretch of `context` alone.

    With `chunk` the stretches are streamed through caches, so many tokens a call; else they are whole forwards.
    """
    whole = (len(tokens) - 1) // context
    x, y = tokens[: whole * context].view(-1, context), tokens[1 : whole * context + 1].view(-1, context)
    parts = []
    for start in range(0, whole, ROWS):
        rows = slice(start, start + ROWS)
        parts.append(_nll(_logits(model, x[rows], chunk), y[rows]))
        advance(len(parts[-1]))
    return torch.cat(parts)


def _logits(model: GptOss, x: Tensor, chunk: int | None) -> Tensor:
    if chunk is None:
        return model(x)
    cache = model.init_cache(len(x), max_length=x.shape[1])
    return torch.cat([model.forward_logits(part, cache, all_positions=True) for part in x.split(chunk, 1)], 1)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").double()


def variants(bf16: Path | None) -> dict[str, tuple[str, Path, dict[str, Any]]]:
    """What is compared: its title, checkpoint and settings."""
    found: dict[str, tuple[str, Path, dict[str, Any]]] = {
        "mxfp4": ("as shipped: experts MXFP4, computed in fp32", SHIPPED, {}),
        "mxfp4_in_bf16": ("as shipped, computed in bf16", SHIPPED, {"dtype": "bfloat16"}),
        "no_sinks": ("learned sinks off", SHIPPED, {"sinks": False}),
        "wide": ("windows doubled", SHIPPED, {"widen": 2}),
    }
    if bf16 is not None:
        found["bf16"] = ("experts bf16, computed in fp32", bf16, {})
        found["bf16_in_bf16"] = ("experts bf16, computed in bf16", bf16, {"dtype": "bfloat16"})
    return found


@torch.no_grad()
def streamed(model: GptOss, text: Text, advance: Advance) -> list[float]:
    """Bits per byte of each BUCKET of positions, the whole text one stream through the model's own caches."""
    cache = model.init_cache(1, max_length=len(text.tokens))
    parts = []
    for start in range(0, len(text.tokens) - 1, 256):
        stop = min(start + 256, len(text.tokens) - 1)
        logits = model.forward_logits(text.tokens[None, start:stop], cache, all_positions=True)
        parts.append(_nll(logits, text.tokens[None, start + 1 : stop + 1]))
        advance(stop - start)
    nll = torch.cat(parts)
    return [text.bits_per_byte(part, 1 + at * BUCKET) for at, part in enumerate(nll.split(BUCKET))]


@torch.no_grad()
def written(tokenizer: Tokenizer, tokens: int, advance: Advance) -> dict[str, Any]:
    """So many tokens written by the model through rolling caches on every layer, and the memory as it goes on."""
    model = load(SHIPPED, full=ROLLING)
    cache = model.init_cache(1)
    sampler = SamplerConfig(temperature=0.8, top_p=0.95, seed=1)
    prompt = tokenizer.encode("It was late in the evening when")
    series, pieces, began = [], [], time.perf_counter()
    banned = replace(sampler, banned_tokens=tuple(tokenizer.stop_tokens))  # one text, without an end
    events = generate(
        model, [prompt], config=GenerationConfig(tokens), sampler=banned, tokenizer=tokenizer, cache=cache
    )
    for made, event in enumerate(events, 1):
        pieces.append(event.text)
        advance(1)
        if made % EVERY == 0:
            resident, peak = memory_bytes()
            series.append({"tokens": made, "cache": cache.nbytes, "resident": resident, "peak": peak})
    text = "".join(pieces)
    return {
        "tokens": tokens,
        "seconds": round(time.perf_counter() - began, 1),
        "series": series,
        "bytes": len(text.encode()),
        "excerpts": [{"at": at, "text": text[at : at + 400]} for at in (0, len(text) // 2, len(text) - 400)],
    }


@torch.no_grad()
def sink_shares(model: GptOss, x: Tensor) -> list[list[float]]:
    """For each layer and head, the part of the softmax that its learned sink takes, averaged over x `[B, T]`."""
    shares: list[list[float]] = []
    plain = attention_module.attend

    def watched(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        out, lse = attend_with_lse(q, k, v, **settings)  # of scores and sink together
        shares.append((settings["sinks"].float()[None, :, None] - lse).exp().mean((0, 2)).tolist())
        return out

    attention_module.attend = watched  # type: ignore[assignment]
    try:
        model(x)
    finally:
        attention_module.attend = plain
    return shares


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """The table of variants, of chunkings, and of positions."""
    base = result["variants"]["mxfp4"]["bits_per_byte"]
    rows = [
        [row["title"], f"{row['bits_per_byte']:.4f}", f"{row['bits_per_byte'] - base:+.4f}"]
        for row in result["variants"].values()
    ]
    first = result["chunkings"]["whole"]
    cuts = [
        [name if name == "whole" else f"{name} a call", f"{nll:.7f}", f"{abs(nll - first):.1e}"]
        for name, nll in result["chunkings"].items()
    ]
    places = max(len(row["bits_per_byte"]) for row in result["positions"].values())
    streams = [
        [row["title"], *(f"{b:.2f}" for b in row["bits_per_byte"]), *["-"] * (places - len(row["bits_per_byte"]))]
        for row in result["positions"].values()
    ]
    context = result["context"]
    return [
        Sheet(f"Bits per byte of {result['tokens']:,} held-out tokens", ["model", "bits per byte", "more"], rows),
        Sheet(f"Loss of {CHUNKED} stretches of {context} tokens, in nats a token", ["cut", "loss", "apart"], cuts),
        Sheet(
            f"Bits per byte by bucket of {BUCKET} positions; trained on {context}",
            ["cache of the full layers", *(f"{(n + 1) * BUCKET // 1024}k" for n in range(places))],
            streams,
        ),
    ]


def finding(result: Mapping[str, Any]) -> str:
    """What was written beyond the trained length."""
    made, series = result["written"], result["written"]["series"]
    sizes = " or ".join(f"{size:,}" for size in sorted({at["cache"] for at in series}))
    grown = (series[-1]["resident"] - series[0]["resident"]) / MIB
    speed = made["tokens"] / made["seconds"]
    return (
        f"{made['tokens']:,} tokens written ({made['bytes']:,} bytes), {speed:.0f} a second. "
        f"The caches hold {sizes} bytes at every reading; resident memory changes by {grown:+.1f} MiB from token "
        f"{series[0]['tokens']:,} to {series[-1]['tokens']:,}."
    )


def plot_positions(result: Mapping[str, Any], path: Path) -> None:
    """Bits per byte along the book."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8.5, 4.4), layout="constrained")
    axes.axvline(result["context"], color="#bbbbbb", linewidth=1, zorder=0)
    axes.text(result["context"], 0.99, " trained", color="#777777", va="top", transform=axes.get_xaxis_transform())
    for key, row in result["positions"].items():
        style = SCHEMES[key]
        middles = [(n + 0.5) * BUCKET for n in range(len(row["bits_per_byte"]))]
        axes.plot(
            middles,
            row["bits_per_byte"],
            color=style.color,
            linewidth=style.width,
            label=style.title,
            zorder=10 - style.width,
        )  # a thin line shows on a thick one that it runs along with
    axes.set_xlabel("position in the book (tokens)")
    axes.set_ylabel("bits per byte")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k" if x else "0")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def plot_sinks(result: Mapping[str, Any], path: Path) -> None:
    """The share of every head's sink, one row a layer."""
    plt = _pyplot()
    shares = result["sink_shares"]
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for layer, row in enumerate(shares):
        for head, share in enumerate(row):
            color = "white" if share > 0.55 else "#222222"
            axes.text(head, layer, f"{share:.2f}", ha="center", va="center", fontsize=8, color=color)
    kinds = [f"{n} {'window' if kind.startswith('sliding') else 'full'}" for n, kind in enumerate(result["layers"])]
    axes.set_yticks(range(len(shares)), kinds)
    axes.set_xticks(range(len(shares[0])))
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    figure.colorbar(image, label="share of attention that the learned sink takes")
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "savefig.dpi": 160})
    return plt


def main(
    tokens: Annotated[int, typer.Option(min=16 * 1024, help="How much of the book the variants read.")] = 65_536,
    positions: Annotated[int, typer.Option(min=BUCKET, help="How much of it is one stream.")] = 51_200,
    dense: Annotated[int, typer.Option(min=BUCKET, help="How far `all keys`, whose cost grows, goes.")] = 16_384,
    write: Annotated[int, typer.Option(min=2 * EVERY, help="Tokens to write.")] = 50_000,
    bf16: Annotated[Path | None, typer.Option(help="The checkpoint before its experts were rounded.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not take up a run that was cut short.")] = False,
    save: Annotated[bool, typer.Option(help="Write docs/assets/tiny_gpt_oss.json and the plots.")] = True,
) -> None:
    """Held-out loss of the small GPT-OSS, with and without its parts, and far beyond its trained length."""
    torch.set_num_threads(threads)
    config = GptOssConfig.from_config(read_settings(SHIPPED))
    context = config.max_position_embeddings
    tokenizer = Tokenizer.from_file(SHIPPED)
    book = load_book("emma")
    text = Text.of(prose(book.text), tokenizer)
    tokens = min(tokens, len(text.tokens) - 1) // context * context
    settings = [tokens, positions, dense, write, str(bf16), _digest(SHIPPED / "model.safetensors")]
    parts = Parts(NAME, {"settings": settings})
    if fresh:
        parts.clear()
    with Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)
    ) as progress:
        for key, title, total, measure in _jobs(text, tokenizer, config, tokens, positions, dense, write, bf16):
            if key not in parts:
                parts[key] = measure(partial(progress.advance, progress.add_task(title, total=total)))
    result = {
        "machine": describe_machine(),
        "book": book.provenance,
        "context": context,
        "tokens": tokens,
        "layers": list(config.layer_types or ()),
        "variants": {key: parts[f"variant {key}"] for key in variants(bf16)},
        "chunkings": {"whole": parts["chunk None"], **{str(chunk): parts[f"chunk {chunk}"] for chunk in CHUNKS}},
        "positions": {key: parts[f"positions {key}"] for key in SCHEMES},
        "written": parts["written"],
        "sink_shares": parts["sinks"],
    }
    out = console()
    for sheet in sheets(result):
        out.print(sheet.rich())
    out.print(finding(result))
    out.print(machine_line(result["machine"]))
    if save:
        out.print(f"wrote {write_json(NAME, result)}")
        plot_positions(result, ASSETS / f"{NAME}_positions.png")
        plot_sinks(result, ASSETS / f"{NAME}_sinks.png")
        parts.clear()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _jobs(
    text: Text,
    tokenizer: Tokenizer,
    config: GptOssConfig,
    tokens: int,
    positions: int,
    dense: int,
    write: int,
    bf16: Path | None,
) -> Iterator[tuple[str, str, int, Callable[[Advance], Any]]]:
    """Every part of the measurement: its key, title, number of tokens, and what measures it."""
    context = config.max_position_embeddings
    for key, (title, checkpoint, settings) in variants(bf16).items():

        def variant(
            advance: Advance, title: str = title, checkpoint: Path = checkpoint, settings: Any = settings
        ) -> Any:
            nll = stretch_nll(load(checkpoint, **settings), text.tokens[: tokens + 1], context, None, advance)
            return {"title": title, "bits_per_byte": text.bits_per_byte(nll)}

        yield f"variant {key}", title, tokens, variant
    few = text.tokens[: CHUNKED * context + 1]
    for chunk in (None, *CHUNKS):

        def chunked(advance: Advance, chunk: int | None = chunk) -> float:
            return stretch_nll(load(SHIPPED), few, context, chunk, advance).mean().item()

        yield f"chunk {chunk}", f"{chunk or 'all'} tokens a call", len(few) - 1, chunked
    for key, scheme in SCHEMES.items():
        length = min(positions, dense) if key == "dense" else positions
        part = Text(text.tokens[: length + 1], text.sizes[: length + 1])

        def along(advance: Advance, scheme: Scheme = scheme, part: Text = part) -> Any:
            return {"title": scheme.title, "bits_per_byte": streamed(load(SHIPPED, full=scheme.window), part, advance)}

        yield f"positions {key}", scheme.title, length, along
    yield "written", "writing", write, lambda advance: written(tokenizer, write, advance)
    x = text.tokens[: CHUNKED * context].view(-1, context)
    yield "sinks", "share of the sinks", 0, lambda _: sink_shares(load(SHIPPED), x)


if __name__ == "__main__":
    typer.run(main)
