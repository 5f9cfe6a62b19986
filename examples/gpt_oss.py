"""GPT-OSS over rolling caches: continue a text, then show what each layer's cache holds.

    python examples/gpt_oss.py --prompt "It was a dark night" --window 64 --full-window 512 --sink-tokens 4

The default checkpoint is the small one that longburn ships; any directory with a GPT-OSS checkpoint will do.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from longburn.cache import AttnWindow, CacheManager
from longburn.generation import GenerationConfig, generate
from longburn.models import data
from longburn.models.gpt_oss import GptOss, GptOssConfig
from longburn.models.settings import read_settings
from longburn.rope import YarnScaling
from longburn.sampling import SamplerConfig
from longburn.text import Tokenizer

PROMPT = "It was late in the evening when the carriage stopped at last before the old house, and"
SHIPPED = Path(data.__path__[0]) / "tiny_gpt_oss"


def load(
    checkpoint: Path,
    window: int | None = None,
    full: AttnWindow | None = None,
    *,
    sinks: bool = True,
    yarn: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> GptOss:
    """The model of a checkpoint directory, changed as asked.

    Args:
        window: of the layers that have one, in tokens; None: as trained.
        full: window of the layers that see all keys as trained; None: all keys.
        sinks: False takes the learned sinks out of every softmax.
        yarn: how many times longer than the initial context positions may become; None: as trained.
        dtype: of what is not MXFP4, and of the cache.
    """
    config = GptOssConfig.from_config(read_settings(checkpoint))
    windows = config if window is None else replace(config, sliding_window=window)
    model = GptOss.from_checkpoint(checkpoint, dtype=dtype, policy=windows.policy(full))
    for attention in model.attentions:
        if not sinks:
            assert attention.sinks is not None
            torch.nn.init.constant_(attention.sinks, -torch.inf)
        if yarn is not None:
            assert isinstance(config.rope.scaling, YarnScaling)
            attention.rope = replace(config.rope, scaling=replace(config.rope.scaling, factor=yarn))
    return model


def caches(model: GptOss, cache: CacheManager) -> Table:
    """One row a layer: its window, and which positions stand in its cache."""
    table = Table(title=f"caches at position {cache.position:,}: {cache.nbytes:,} bytes", title_justify="left")
    for name in ("layer", "window", "sink tokens", "slots", "filled", "positions", "bytes"):
        table.add_column(name, justify="right")
    for layer, (held, attention) in enumerate(zip(cache, model.attentions, strict=True)):
        window = attention.window
        filled = held.positions[held.positions >= 0].sort().values.tolist()
        row = [layer, window.size or "all", window.sink_tokens, held.slots, len(filled), spans(filled), held.nbytes]
        table.add_row(*(f"{value:,}" if isinstance(value, int) else value for value in row))
    return table


def spans(positions: list[int]) -> str:
    """Ascending numbers as stretches: 0-3, 500-627."""
    stretches: list[list[int]] = []
    for position in positions:
        if stretches and position == stretches[-1][1] + 1:
            stretches[-1][1] = position
        else:
            stretches.append([position, position])
    return ", ".join(f"{first}-{last}" for first, last in stretches)


def main(
    checkpoint: Annotated[Path, typer.Option(help="A directory: config.json, safetensors, tokenizer.json.")] = SHIPPED,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = PROMPT,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    window: Annotated[int | None, typer.Option(min=1, help="Of the windowed layers; default as trained.")] = None,
    full_window: Annotated[int | None, typer.Option(min=1, help="Of the other layers; default all keys.")] = None,
    sink_tokens: Annotated[int, typer.Option(min=0, help="First tokens that --full-window keeps.")] = 4,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens a call; changes speed, not the result.")] = 512,
    sinks: Annotated[bool, typer.Option(help="Keep the learned sinks, or take them out of every softmax.")] = True,
    yarn_factor: Annotated[float | None, typer.Option(min=1.0, help="Default as trained.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16: of what is not MXFP4, and of the cache.")
    ] = "float32",
) -> None:
    """Continue a text with a GPT-OSS model, and show what each layer's cache holds."""
    full = full_window and AttnWindow(full_window, sink_tokens=sink_tokens, relative_sinks=sink_tokens > 0)
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"--dtype {dtype}: wanted float32 or bfloat16")
    model = load(checkpoint, window, full or None, sinks=sinks, yarn=yarn_factor, dtype=getattr(torch, dtype))
    tokenizer = Tokenizer.from_file(checkpoint)
    sampler = SamplerConfig(temperature, top_k, top_p, min_p, repetition_penalty, seed=seed)
    ids = tokenizer.encode(prompt)
    cache = model.init_cache(1, max_length=len(ids) + max_new_tokens)
    settings = GenerationConfig(max_new_tokens, chunk_size=chunk, stop_tokens=tokenizer.stop_tokens)
    print(prompt, end="", flush=True)
    began, made = time.perf_counter(), 0
    with torch.no_grad():
        for event in generate(model, [ids], config=settings, sampler=sampler, tokenizer=tokenizer, cache=cache):
            print(event.text, end="", flush=True)
            made += 1
    print(f"\n\n{made} tokens, {made / (time.perf_counter() - began):.0f} a second")
    Console(width=120, highlight=False).print(caches(model, cache))


if __name__ == "__main__":
    typer.run(main)
