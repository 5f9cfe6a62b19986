"""`longburn inspect`: what a checkpoint holds, and what of it would not load."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longburn.cli.options import Debug
from longburn.cli.sizes import show_size

if TYPE_CHECKING:
    from longburn.models.inspection import Inspection


def inspect(
    path: Annotated[
        str,
        typer.Argument(help="A safetensors file or directory, a .gguf file, or a name from 'longburn models'."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with every tensor.")] = False,
    debug: Debug = False,
) -> None:
    """Show a checkpoint's architecture, sizes and tensors, and what would not load and why. Reads no weights."""
    from longburn.models.inspection import inspect_checkpoint
    from longburn.weights import locate

    found = inspect_checkpoint(path if Path(path).exists() else locate(path))
    if as_json:
        typer.echo(json.dumps(as_dict(found), ensure_ascii=False))
    else:
        show(found)
    if found.problems:
        raise typer.Exit(1)


def show(found: "Inspection") -> None:
    from rich.console import Console
    from rich.table import Table

    from longburn.models.inspection import group_tensors

    typer.echo(f"{found.path}: {found.architecture or 'unknown model'}")
    for key, value in flat(found.config):
        typer.echo(f"  {key}: {brief(value)}")
    if found.tensors:
        table = Table("tensors", "shape", "type", "count", "size", box=None, pad_edge=False)
        for group in group_tensors(found.tensors):
            size = show_size(group.nbytes)
            table.add_row(group.name, str(list(group.shape)), group.kind, str(group.copies), size)
        for column in table.columns:
            column.overflow = "fold"
        typer.echo("")
        # Into a pipe one group is one line, whatever the width of the terminal.
        Console(width=None if sys.stdout.isatty() else 1000, markup=False, highlight=False).print(table)
        total = sum(tensor.nbytes for tensor in found.tensors)
        counted = f", {found.parameters:,} parameters" if found.parameters else ""
        typer.echo(f"\n{len(found.tensors)} tensors, {show_size(total)} ({total:,} bytes){counted}")
    if not found.problems:
        typer.echo("would load: every tensor is there, whole and in shape")
        return
    typer.echo(f"would not load: {len(found.problems)} problem{'s' * (len(found.problems) > 1)}")
    for problem in found.problems:
        typer.echo(f"  {problem}")


def flat(config: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    """Each setting; those of RoPE as `rope.theta`, `rope.scaling.factor`, ..."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def brief(value: object) -> str:
    """Sequences that repeat themselves, such as one entry for each layer, are shown by their period."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, tuple | list) or len(value) < 3:
        return str(value)
    period = next(n for n in range(1, len(value) + 1) if all(v == value[i % n] for i, v in enumerate(value)))
    shown = ", ".join(map(str, value[:period]))
    return shown if period == len(value) else f"{shown}, ... ({len(value)} in all)"


def as_dict(found: "Inspection") -> dict[str, object]:
    return {
        "path": str(found.path),
        "architecture": found.architecture,
        "config": dict(found.config),
        "parameters": found.parameters,
        "bytes": sum(tensor.nbytes for tensor in found.tensors),
        "tensors": [{**tensor._asdict(), "shape": list(tensor.shape)} for tensor in found.tensors],
        "problems": list(found.problems),
    }
