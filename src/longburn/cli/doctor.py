"""`longburn doctor`: what this machine has, and which implementation computes a layer's operations on it, and why."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longburn.cli.options import Debug, torch_device
from longburn.cli.sizes import show_size

if TYPE_CHECKING:
    from longburn.kernels.registry import Explanation

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Shape:
    """One call of one layer: sizes as the options name them."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    sink_tokens: int
    sinks: bool
    dim: int
    experts: int
    experts_per_token: int
    dtype: str
    fp8: bool
    device: str


def doctor(
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    queries: Annotated[int, typer.Option(min=1, help="New tokens of a row.")] = 1,
    keys: Annotated[int, typer.Option(min=1, help="Tokens of a row so far, the new ones included.")] = 8192,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 64,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=2, help="Size of a head.")] = 64,
    window: Annotated[
        int | None, typer.Option(min=1, help="Keys that a query sees. Default: all.", show_default=False)
    ] = None,
    sink_tokens: Annotated[
        int, typer.Option(min=0, help="With --window: first tokens kept, at relative positions.")
    ] = 0,
    sinks: Annotated[bool, typer.Option(help="A learned sink logit for every head.")] = True,
    dim: Annotated[int, typer.Option(min=32, help="Size of the model; a multiple of 32.")] = 2880,
    experts: Annotated[int, typer.Option(min=1, help="Experts of a layer, in MXFP4.")] = 32,
    experts_per_token: Annotated[int, typer.Option(min=1, help="Experts that a token takes.")] = 4,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Of weights, activations and cache.")] = "bf16",
    kv_cache: Annotated[
        Literal["model", "fp8"], typer.Option(help="Keys and values in that type, or in fp8.")
    ] = "model",
    device: Annotated[
        str | None, typer.Option(help="Default: cuda if there is one, else cpu.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Show devices and versions, and which implementation computes each operation of a layer, and why not the others.

    The sizes are a layer of gpt-oss-20b unless options say otherwise. Of the operations nothing is computed.
    """
    check(queries <= keys, f"{queries} queries of {keys} keys: the new tokens are among the keys")
    check(heads % kv_heads == 0, f"{heads} heads on {kv_heads} kv heads: wanted a multiple")
    check(dim % 32 == 0, f"dim {dim}: wanted a multiple of 32, the block of MXFP4")
    check(experts_per_token <= experts, f"{experts_per_token} of {experts} experts: wanted at most all of them")
    check(window is not None or not sink_tokens, "sink tokens without --window: all tokens are kept")
    shape = Shape(
        batch, queries, keys, heads, kv_heads, head_dim, window, sink_tokens, sinks, dim, experts, experts_per_token,
        DTYPES[dtype], kv_cache == "fp8", str(torch_device(device or "auto")),
    )  # fmt: skip
    answers = explanations(shape)
    if as_json:
        found = {
            "versions": versions(),
            "devices": devices(),
            "shape": asdict(shape),
            "operations": {name: as_dict(answer) for name, answer in answers.items()},
        }
        typer.echo(json.dumps(found))
        return
    for name, value in versions().items():
        typer.echo(f"{name}: {value}")
    typer.echo("")
    for entry in devices():
        typer.echo(f"{entry['device']}: {entry['name']}, {show_size(entry['memory'])}{entry['more']}")
    typer.echo(f"\n{described(shape)}")
    show(answers)


def check(fine: bool, problem: str) -> None:
    if not fine:
        raise typer.BadParameter(problem)


def versions() -> dict[str, str]:
    """What runs, by name; what is missing says why."""
    import torch

    from longburn.kernels import native
    from longburn.kernels.native.build import compiler

    kernels = native.unavailable()
    return {
        "longburn": version("longburn"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda or "none: this PyTorch is built for the CPU",
        "triton": installed("triton") or "not installed",
        "native kernels": f"none: {kernels}" if kernels else f"compiled by {compiler()}",
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    """Each with its name, its memory in bytes and whatever else there is to say of it."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    simd = torch.backends.cpu.get_cpu_capability()
    found = [{"device": "cpu", "name": f"{os.cpu_count()} cores", "memory": memory, "more": f", {simd}"}]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        more = f" ({show_size(free)} free), capability {card.major}.{card.minor}, {card.multi_processor_count} SMs"
        found.append({"device": f"cuda:{index}", "name": card.name, "memory": card.total_memory, "more": more})
    return found


def described(shape: Shape) -> str:
    """The shape in one line."""
    sees = "all keys" if shape.window is None else f"a window of {shape.window}"
    kept = f" and {shape.sink_tokens} sink tokens" if shape.sink_tokens else ""
    learned = ", learned sinks" if shape.sinks else ""
    new = f"{shape.queries:,} new of {shape.keys:,} tokens, batch {shape.batch}"
    split = f"{shape.heads} heads on {shape.kv_heads} of size {shape.head_dim}"
    cache = ", cache in fp8" if shape.fp8 else ""
    return f"one layer on {shape.device} in {shape.dtype}: {new}, {split}, {sees}{kept}{learned}{cache}"


def explanations(shape: Shape) -> "dict[str, Explanation | str]":
    """By operation what its implementations say, or why they could not be asked."""
    import torch

    from longburn.kernels.registry import explain

    found: dict[str, Explanation | str] = {}
    with torch.no_grad():
        for operation, compute in computations(shape):
            try:
                found[operation] = explain(operation, compute)
            except (RuntimeError, ValueError, OSError) as error:  # other operations may yet be well
                found[operation] = f"could not be asked: {' '.join(str(error).split())[:300]}"
    return found


def computations(shape: Shape) -> Iterator[tuple[str, Callable[[], object]]]:
    """For every operation of a layer something that calls it as the layer does."""
    import torch

    from longburn.attention import Attention
    from longburn.cache import AttnWindow, CacheManager
    from longburn.kernels.experts import experts
    from longburn.kernels.linear import linear
    from longburn.kernels.mxfp4 import BLOCK, Mxfp4
    from longburn.kernels.norm import rms_norm
    from longburn.kernels.route import route
    from longburn.rope import RotaryEncoding

    like = {"dtype": getattr(torch, shape.dtype), "device": shape.device}
    rows, dim, count = shape.batch * shape.queries, shape.dim, shape.experts
    window = AttnWindow(shape.window, sink_tokens=shape.sink_tokens, relative_sinks=shape.sink_tokens > 0)

    def attention() -> object:
        small = 2 * BLOCK  # of the model: attention's own operations do not depend on it
        layer = Attention(
            small,
            shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            window=window,
            rope=RotaryEncoding(shape.head_dim),
            sinks=shape.sinks,
        ).to(**like)
        manager = CacheManager.for_layers([layer], shape.batch, max_length=shape.keys, packed=shape.fp8)
        if past := shape.keys - shape.queries:
            step = manager.positions(past)
            zeros = torch.zeros(shape.batch, shape.kv_heads, past, shape.head_dim, **like)
            manager[0].update(zeros, zeros, step)
            manager.advance(step)
        x = torch.zeros(shape.batch, shape.queries, small, **like)
        return layer(x, manager.positions(shape.queries), cache=manager[0])

    def packed(out: int, size: int) -> Mxfp4:
        blocks = torch.empty(count, out, size // BLOCK, BLOCK // 2, dtype=torch.uint8, device=shape.device)
        return Mxfp4(blocks, torch.empty(blocks.shape[:-1], dtype=torch.uint8, device=shape.device))

    def mixture() -> object:
        chosen = torch.zeros(rows, shape.experts_per_token, dtype=torch.int64, device=shape.device)
        weights = torch.zeros(chosen.shape, dtype=torch.float32, device=shape.device)
        biases = torch.empty(count, 2 * dim, **like), torch.empty(count, dim, **like)
        up, down = packed(2 * dim, dim), packed(dim, dim)
        x = torch.empty(rows, dim, **like)
        return experts(x, chosen, weights, up, biases[0], down, biases[1], alpha=1.702, limit=7.0)

    x = torch.empty(shape.batch, shape.queries, dim, **like)
    yield "attend", attention
    yield "append", attention
    yield "angles", attention
    yield "linear", lambda: linear(x, torch.empty(shape.heads * shape.head_dim, dim, **like))
    yield "rms_norm", lambda: rms_norm(x, torch.empty(dim, **like), 1e-5, round_last=True)
    yield "route", lambda: route(torch.empty(rows, count, **like), shape.experts_per_token)
    yield "experts", mixture


def show(answers: "Mapping[str, Explanation | str]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("operation", "implementation", "", box=None, pad_edge=False)
    for operation, answer in answers.items():
        if isinstance(answer, str):
            table.add_row(operation, "", answer)
            continue
        for number, (name, reason) in enumerate(answer.reasons.items()):
            verdict = "taken" if name == answer.taken else f"no: {reason}" if reason else "could, comes later"
            table.add_row(operation if number == 0 else "", name, verdict)
    table.columns[2].overflow = "fold"
    Console(width=None if sys.stdout.isatty() else 1000, markup=False, highlight=False).print(table)


def as_dict(answer: "Explanation | str") -> dict[str, Any]:
    return {"error": answer} if isinstance(answer, str) else {"taken": answer.taken, "reasons": answer.reasons}
