"""`longburn convert`: a GPT-OSS checkpoint in the other format, or with its experts stored the other way."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from longburn.cli.display import progress
from longburn.cli.options import Debug
from longburn.cli.sizes import parse_size, show_size


def convert(
    source: Annotated[Path, typer.Argument(help="A GPT-OSS model directory: config.json and safetensors.")],
    target: Annotated[Path, typer.Argument(help="The directory to write.")],
    format: Annotated[
        Literal["original", "hf"] | None,
        typer.Option(help="OpenAI's format or Hugging Face's. Default: as it is.", show_default=False),
    ] = None,
    experts: Annotated[
        Literal["mxfp4", "bf16"] | None,
        typer.Option(help="How expert weights are stored. Default: as they are.", show_default=False),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Bytes of tensors in one file.")] = "5GB",
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model directory at TARGET once the new one is complete.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a GPT-OSS checkpoint in the other format, or with experts in MXFP4 or bf16, one tensor at a time."""
    if format is None and experts is None:
        raise typer.BadParameter("nothing to convert: give --format, --experts or both")
    most = parse_size(max_shard_size)
    from longburn.models.gpt_oss.convert import convert_checkpoint

    with progress(f"converting {source}", count="bytes") as on_progress:
        try:
            convert_checkpoint(
                source,
                target,
                format=format,
                experts=experts,
                max_shard_size=most,
                replace=force,
                progress=on_progress,
            )
        except FileExistsError as error:
            raise FileExistsError(
                f"{error} (--force replaces a model directory)" if not force else str(error)
            ) from error
    files = sorted(target.iterdir())
    typer.echo(f"{target}: {len(files)} files, {show_size(sum(file.stat().st_size for file in files))}")
