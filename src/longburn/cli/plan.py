"""`longburn plan`: the memory that a model needs at a length and a batch, and what fits into what there is."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longburn.cli.options import DEFAULT_SINK_TOKENS, Debug
from longburn.cli.sizes import parse_size, show_size

if TYPE_CHECKING:
    from longburn.models.gpt_oss import GptOssConfig
    from longburn.models.llama import LlamaConfig
    from longburn.models.planning import Plan
    from longburn.nn import ExpertStorage

ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
MOST = {"context": 2**40, "batch": 2**20}  # where a search ends: beyond any memory


def plan(
    config: Annotated[
        str,
        typer.Argument(help="A config.json, a model directory, a .gguf file, or gpt-oss-20b, gpt-oss-120b, smollm2."),
    ],
    context: Annotated[int, typer.Option(min=1, help="Positions of a row: prompt and answer.")] = 131072,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Of dense weights and the cache.")] = "bf16",
    experts: Annotated[
        Literal["mxfp4", "dense"] | None,
        typer.Option(
            help="How expert weights are held. Default: as the model was released or says.", show_default=False
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="A window for layers that see all keys; theirs otherwise.", show_default=False),
    ] = None,
    sink_tokens: Annotated[int, typer.Option(min=0, help="With --window: first tokens kept.")] = DEFAULT_SINK_TOKENS,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens of a prompt read at a time.")] = 1024,
    memory: Annotated[
        str | None, typer.Option(help="Say what fits into this much, such as 80GiB.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, in bytes.")] = False,
    debug: Debug = False,
) -> None:
    """Show the memory of weights, caches and activations, and what fits into a given memory."""
    there = None if memory is None else parse_size(memory)
    from longburn.cache import AttnWindow
    from longburn.models.planning import Sizes, largest, plan_memory

    known, storage = read_config(config)
    storage = experts or storage
    sizes = Sizes.of(known, None if window is None else AttnWindow(window, sink_tokens=sink_tokens))

    def at(context: int, batch: int) -> "Plan":
        return plan_memory(sizes, context, batch, itemsize=ITEMSIZES[dtype], experts=storage, chunk=chunk_size)

    found = at(context, batch)
    fits: dict[str, int] = {}
    if there is not None:
        fits["context"] = largest(lambda n: at(n, batch).total <= there, MOST["context"])
        fits["batch"] = largest(lambda n: at(context, n).total <= there, MOST["batch"])
    if as_json:
        typer.echo(json.dumps(as_dict(found) | {"memory": there, "largest": fits}))
        return
    typer.echo(f"{config}: {context:,} positions, batch {batch}, {dtype}, prompts read {chunk_size} tokens at a time")
    show(found)
    if there is None:
        return
    verdict = "fits" if found.total <= there else "does not fit"
    typer.echo(f"\n{verdict} into {show_size(there)} ({show_size(found.total)} needed)")
    typer.echo(f"  largest context at batch {batch}: {limit(fits, 'context')}")
    typer.echo(f"  largest batch at context {context:,}: {limit(fits, 'batch')}")
    trained = known.max_position_embeddings
    if fits["context"] > trained and window is None:
        typer.echo(f"  (the model was made for {trained:,} positions)")


def read_config(config: str) -> "tuple[LlamaConfig | GptOssConfig, ExpertStorage]":
    """The configuration, and how experts are held by default: dense where a Hugging Face config names no MXFP4."""
    from longburn.models.family import read_family
    from longburn.models.gpt_oss import GptOssConfig, is_gpt_oss
    from longburn.models.llama import LlamaConfig
    from longburn.models.settings import read_settings
    from longburn.weights import GgufFile, StoreError, locate

    released = {"gpt-oss-20b": GptOssConfig.gpt_oss_20b, "gpt-oss-120b": GptOssConfig.gpt_oss_120b}
    path = Path(config)
    if not path.exists():
        if config in released:
            return released[config](), "mxfp4"
        try:
            path = locate(config)
        except StoreError as error:
            raise ValueError(f"{error}; sizes alone are known of {', '.join(released)}") from error
    if path.is_dir() or path.suffix == ".json":
        if path.is_file() and path.name != "config.json":
            raise ValueError(f"{path}: wanted a config.json or the directory that holds it")
        settings = read_settings(path if path.is_dir() else path.parent)
        if not is_gpt_oss(settings):
            return read_family(settings), "dense"
        quantised = settings.get("quantization_config") or {}
        packed = "rope_ntk_alpha" in settings or quantised.get("quant_method") == "mxfp4"
        return GptOssConfig.from_config(settings), "mxfp4" if packed else "dense"
    file = GgufFile(path)
    return LlamaConfig.from_gguf(file.metadata, tied="output.weight" not in file.tensors), "dense"


def show(found: "Plan") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "size", "bytes", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, size: int) -> None:
        table.add_row(name, show_size(size), f"{size:,}")

    row("weights", sum(found.weights.values()))
    for name, size in found.weights.items():
        row(f"  {name}", size)
    row("cache", sum(size for _, size in found.caches.values()))
    for kind, (layers, size) in found.caches.items():
        row(f"  {layers} layers, {kind}", size)
    row("activations, at most", found.activations)
    row("total", found.total)
    Console(width=None if sys.stdout.isatty() else 1000, markup=False, highlight=False).print(table)


def limit(fits: dict[str, int], what: str) -> str:
    size = fits[what]
    return "none" if size == 0 else "any" if size == MOST[what] else f"{size:,}"


def as_dict(found: "Plan") -> dict[str, Any]:
    return {
        "weights": dict(found.weights),
        "cache": {kind: {"layers": layers, "bytes": size} for kind, (layers, size) in found.caches.items()},
        "activations": found.activations,
        "total": found.total,
    }
