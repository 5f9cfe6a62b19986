"""A GPT-OSS checkpoint of random weights in OpenAI's format, at the sizes of the released 20b: to measure speed with.

Every number is drawn: MXFP4 codes uniformly, all else from a normal distribution. Scales are those of a model before
its training: activations stay near 1, a layer adds little to its stream, every expert is chosen about equally often. So
what rounding does to the logits stays small, and mistakes show. The numbers of a tensor depend on the seed, its name
and its size alone. It goes through the library's own writer, one tensor at a time.

    python benchmarks/synthetic_gpt_oss.py /tmp/synthetic-20b
    python benchmarks/synthetic_gpt_oss.py /tmp/small --layers 4 --hidden 256 --intermediate 256 --vocab 1000
"""

import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from longburn.kernels.mxfp4 import BIAS, BLOCK, MAGNITUDES
from longburn.models.gpt_oss import GptOss, GptOssConfig, original_rules
from longburn.weights import TensorInfo, TensorSource, in_their_names, write_shards

PIECE = 1 << 20  # numbers drawn by one generator
THREADS = min(16, os.cpu_count() or 1)
BRANCH = 1 / 8  # how much a layer's two branches weigh beside the stream that they are added to
SCALES = 4  # powers of two in a row that occur as scales
RELEASED = GptOssConfig.gpt_oss_20b()


class RandomSource:
    """Tensors under the model's names, each drawn when it is read."""

    def __init__(self, tensors: Mapping[str, TensorInfo], seed: int) -> None:
        self.tensors, self.seed = tensors, seed

    def read(self, name: str) -> Tensor:
        """The tensor `name`."""
        info = self.tensors[name]
        values = torch.empty(info.shape, dtype=info.dtype)
        bits = torch.uint8 if info.dtype == torch.uint8 else torch.uint16
        draw(values.view(bits).view(-1).numpy(), numbers(name, info), [self.seed, zlib.crc32(name.encode())])
        return values


def numbers(name: str, info: TensorInfo) -> NDArray[np.unsignedinteger] | None:
    """The bits of the numbers that a tensor holds, all equally likely; None if any bits will do."""
    if name.endswith(".blocks"):
        return None
    if name.endswith(".scales"):
        size = info.shape[-1] * BLOCK
        code = math.sqrt(sum(m * m for m in MAGNITUDES) / len(MAGNITUDES))
        power = math.sqrt(sum(4.0**n for n in range(SCALES)) / SCALES)
        spread = size**-0.5 * (BRANCH if name.endswith("down.scales") else 1.0)
        first = BIAS + round(math.log2(spread / (code * power)))
        return np.tile(np.arange(first, first + SCALES, dtype=np.uint8), 256 // SCALES)
    mean, spread = 0.0, info.shape[-1] ** -0.5  # of a linear map: its output is as large as its input
    if name.endswith("norm.weight"):
        mean, spread = 1.0, 0.1
    elif name.endswith("out.weight"):
        spread *= BRANCH
    elif name.endswith("router.weight"):
        spread *= 3  # a token's last expert then counts little, and so does which one rounding makes it
    elif name.endswith("bias"):
        spread = 0.1 * BRANCH
    elif name.endswith(("sinks", "embed.weight")):
        spread = 1.0
    quantiles = torch.special.ndtri((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16))
    return (mean + spread * quantiles).to(torch.bfloat16).view(torch.uint16).numpy()


def draw(out: NDArray[np.unsignedinteger], table: NDArray[np.unsignedinteger] | None, key: list[int]) -> None:
    """Fill `out` with random bits, or with the entries of `table` that they number."""

    def piece(start: int) -> None:
        part = out[start : start + PIECE]
        generator = np.random.Generator(np.random.SFC64([*key, start // PIECE]))
        words = generator.integers(0, 2**64 - 1, -(-part.nbytes // 8), np.uint64, endpoint=True)
        bits = words.view(out.dtype)[: part.size]
        if table is None:
            part[:] = bits
        else:
            np.take(table, bits, out=part, mode="wrap")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(piece, range(0, out.size, PIECE)))


def source(config: GptOssConfig, seed: int) -> TensorSource:
    """The checkpoint in OpenAI's names, with MXFP4 experts; all else in bf16."""
    with torch.device("meta"):
        model = GptOss(config, experts="mxfp4", dtype=torch.bfloat16)
    tensors = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    return in_their_names(RandomSource(tensors, seed), original_rules(config, "mxfp4"))


def write(
    target: Path,
    config: GptOssConfig,
    *,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write `config.json` and `model.safetensors` into the directory `target`; returns the bytes of all tensors.

    The host holds one tensor at a time. `config.json` comes last: a directory that has one is complete.

    Raises:
        FileExistsError: there is a checkpoint, or a part of one, and no `force`.
        OSError: too little room on the disk.
    """
    files = [target / "config.json", target / "model.safetensors"]
    if there := [file.name for file in files if file.exists()]:
        if not force:
            raise FileExistsError(f"{target} holds {' and '.join(there)} already: choose another place, or --force")
        for name in there:
            (target / name).unlink()
    target.mkdir(parents=True, exist_ok=True)
    random = source(config, seed)
    size = sum(math.prod(info.shape) * info.dtype.itemsize for info in random.tensors.values())
    if (free := shutil.disk_usage(target).free) < size:
        raise OSError(f"{target}: the checkpoint takes {size:,} bytes, the disk has {free:,} left")
    write_shards(target, random, progress=progress)
    files[0].write_text(json.dumps(config.to_original(), indent=2) + "\n", encoding="utf-8")
    return size


def main(
    target: Annotated[Path, typer.Argument(help="Directory to write; it may exist.")],
    layers: Annotated[int, typer.Option(min=1)] = RELEASED.num_hidden_layers,
    hidden: Annotated[int, typer.Option(min=32, help="A multiple of 32.")] = RELEASED.hidden_size,
    intermediate: Annotated[int, typer.Option(min=32, help="A multiple of 32.")] = RELEASED.intermediate_size,
    heads: Annotated[int, typer.Option(min=1)] = RELEASED.num_attention_heads,
    kv_heads: Annotated[int, typer.Option(min=1)] = RELEASED.num_key_value_heads,
    experts: Annotated[int, typer.Option(min=1)] = RELEASED.num_experts,
    experts_per_token: Annotated[int, typer.Option(min=1)] = RELEASED.experts_per_token,
    vocab: Annotated[int, typer.Option(min=1)] = RELEASED.vocab_size,
    window: Annotated[int, typer.Option(min=1)] = RELEASED.sliding_window,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Write a GPT-OSS checkpoint of random weights; by default as large as gpt-oss-20b, 13.8 GB."""
    config = replace(
        RELEASED,
        num_hidden_layers=layers,
        layer_types=None,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_experts=experts,
        experts_per_token=experts_per_token,
        vocab_size=vocab,
        sliding_window=window,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    began = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("random weights", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        size = write(target, config, seed=seed, force=force, progress=progress)
    seconds = time.perf_counter() - began
    typer.echo(f"{target}: {size:,} bytes of tensors in {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s")


if __name__ == "__main__":
    typer.run(main)
