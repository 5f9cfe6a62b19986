"""Does a bias that depends on the data do something? Small equal models, with and without forgetting attention.

    python examples/train_forgetting.py                      a rehearsal of seconds; its figures say nothing
    python examples/train_forgetting.py small --out results  minutes on two CPU cores
    python examples/train_forgetting.py full --out results   under five minutes on one GPU

The stream. Among noise stand facts (one token: this key now has this value), questions (one token: which value has this
key?) and, now and then, a token that makes all facts before it void. The answer is the newest value of the key, or
"none" if it has none since the last such token. Only answers count in the loss.

The models differ in how attention knows what comes after what, in nothing else: not at all ("none"), by RoPE, by ALiBi
(a bias, but the same for all data), by forgetting gates (FoX, `ForgetBias`). They start with the same weights, are
trained on the same short streams, and are tested on streams up to eight times as long, and on streams with up to four
times as much noise between two events. Tests go through caches in chunks, as a stream would.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from longburn.attention import Attention
from longburn.bias import Alibi, ForgetBias
from longburn.cache import RollingKVCache, Step
from longburn.models.decoder import Decoder
from longburn.nn import RMSNorm, SwiGLU
from longburn.rope import RotaryEncoding

KEYS, VALUES, NOISES = 6, 8, 16
FACT, VOID, QUESTION, NOISE = 0, KEYS * VALUES, KEYS * VALUES + 1, KEYS * VALUES + 1 + KEYS  # first token of each kind
ANSWER = NOISE + NOISES  # VALUES tokens, which stand in no stream
NONE = ANSWER + VALUES
VOCABULARY = NONE + 1
CHUNK = 200  # tokens of a test stream read at a time

Name = Literal["none", "rope", "alibi", "fox"]
NAMES: tuple[Name, ...] = ("none", "rope", "alibi", "fox")


@dataclass(frozen=True)
class Rates:
    """How often what stands in a stream; the rest is noise."""

    fact: float = 0.24
    question: float = 0.24
    void: float = 0.02

    def thinned(self, times: float) -> "Rates":
        """The same events with more noise in between."""
        return Rates(self.fact / times, self.question / times, self.void / times)


@dataclass(frozen=True)
class Recipe:
    """Sizes of model and training."""

    steps: int
    batch: int = 32
    length: int = 128
    dim: int = 64
    heads: int = 4
    layers: int = 2
    learning_rate: float = 3e-3
    warmup: float = 0.1
    seeds: int = 1
    test_streams: int = 32


RECIPES = {
    "rehearsal": Recipe(steps=3, batch=4, length=24, dim=32, test_streams=2),
    "small": Recipe(steps=500, batch=16, length=64, seeds=2, test_streams=64),
    "full": Recipe(steps=1500, batch=64, dim=128, seeds=2, test_streams=128),
}


class Streams(NamedTuple):
    """Tokens `[B, T]`, and what is to be answered at each: a token, or -100 where nothing is asked."""

    tokens: Tensor
    answers: Tensor


def draw(batch: int, length: int, rates: Rates, generator: torch.Generator) -> Streams:
    """Random streams. The same on every device: drawn on the CPU."""
    shape = (batch, length)
    kind = torch.rand(shape, generator=generator)
    key = torch.randint(KEYS, shape, generator=generator)
    value = torch.randint(VALUES, shape, generator=generator)
    noise = torch.randint(NOISES, shape, generator=generator)
    is_fact = kind < rates.fact
    is_question = (kind >= rates.fact) & (kind < rates.fact + rates.question)
    is_void = kind >= 1 - rates.void
    tokens = torch.where(is_fact, FACT + key * VALUES + value, NOISE + noise)
    tokens = torch.where(is_question, QUESTION + key, tokens).masked_fill(is_void, VOID)
    # One more than where each key got a value last, and where everything became void last; 0 for never.
    now = torch.arange(1, length + 1).expand(shape)
    marked = is_fact[..., None] & (key[..., None] == torch.arange(KEYS))
    last = torch.where(marked, now[..., None], 0).cummax(1).values.gather(2, key[..., None])[..., 0]
    void = torch.where(is_void, now, 0).cummax(1).values
    newest = ANSWER + value.gather(1, (last - 1).clamp_min(0))
    answers = torch.where(last > void, newest, NONE)
    return Streams(tokens, torch.where(is_question, answers, -100))


class Block(nn.Module):
    """Attention and feed-forward, each behind an RMSNorm and added to the stream."""

    def __init__(self, name: Name, recipe: Recipe) -> None:
        super().__init__()
        M, H = recipe.dim, recipe.heads
        self.attention_norm, self.mlp_norm = RMSNorm(M), RMSNorm(M)
        rope = RotaryEncoding(M // H) if name == "rope" else None
        bias = Alibi(H) if name == "alibi" else ForgetBias(M, H) if name == "fox" else None
        self.attention = Attention(M, H, rope=rope, bias=bias)
        self.mlp = SwiGLU(M, 2 * M)

    def forward(self, x: Tensor, step: Step, cache: RollingKVCache | None) -> Tensor:
        x = self.attention(self.attention_norm(x), step, cache=cache, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)


def fresh(name: Name, recipe: Recipe, seed: int) -> Decoder:
    """An untrained model; what all have starts with the same weights."""
    model = untrained(name, recipe, seed)
    model.load_state_dict(untrained("none", recipe, seed).state_dict(), strict=False)
    return model


def untrained(name: Name, recipe: Recipe, seed: int) -> Decoder:
    torch.manual_seed(seed)
    layers = [Block(name, recipe) for _ in range(recipe.layers)]
    model = Decoder(VOCABULARY, recipe.dim, layers, RMSNorm(recipe.dim), dtype=torch.float32)
    nn.init.normal_(model.embed.weight)
    nn.init.normal_(model.head.weight, std=recipe.dim**-0.5)
    return model


def train(model: Decoder, recipe: Recipe, seed: int, device: torch.device) -> list[tuple[int, float]]:
    """Steps and losses in nats an answer, each the mean since the one before; every model sees the same streams."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warm = max(1, round(recipe.warmup * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min((n + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, n - warm) / (recipe.steps - warm + 1))),
    )
    every = max(1, recipe.steps // 30)
    curve, total = [], torch.zeros((), device=device)
    for n in range(1, recipe.steps + 1):
        tokens, answers = (x.to(device) for x in draw(recipe.batch, recipe.length, Rates(), generator))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), answers.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.detach()
        if n % every == 0 or n == recipe.steps:
            since = n - (curve[-1][0] if curve else 0)
            curve.append((n, round(float(total) / since, 5)))
            total.zero_()
    return curve


@torch.no_grad()
def measure(model: Decoder, streams: Streams, device: torch.device) -> dict[str, float]:
    """Loss and share of right answers over streams that go through caches in chunks, and the best blind guess."""
    cache = model.init_cache(streams.tokens.shape[0])
    loss = torch.zeros((), dtype=torch.float64, device=device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    for tokens, answers in zip(*(x.to(device).split(CHUNK, 1) for x in streams), strict=True):
        logits = model.forward_logits(tokens, cache, all_positions=True)
        loss += F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="sum")
        right += (logits.argmax(-1) == answers).sum()
    asked = streams.answers[streams.answers >= 0]
    return {
        "loss": round(float(loss) / len(asked), 5),
        "accuracy": round(int(right) / len(asked), 5),
        "most_frequent_answer": round(float(asked.bincount().max()) / len(asked), 5),
        "questions": len(asked),
    }


def unseen_streams(recipe: Recipe) -> Iterator[tuple[str, Streams]]:
    """Streams that no model was trained on, the same for all of them."""
    generator = torch.Generator().manual_seed(1_000_003)
    for times in (1, 2, 4, 8):
        yield f"{times} x length", draw(recipe.test_streams, times * recipe.length, Rates(), generator)
    for times in (1, 2, 4):
        streams = draw(recipe.test_streams, times * recipe.length, Rates().thinned(times), generator)
        if times > 1:
            yield f"{times} x noise", streams


def run(recipe: Recipe, device: torch.device, names: tuple[Name, ...] = NAMES) -> dict[str, Any]:
    """Train and test every model with every seed."""
    tests = dict(unseen_streams(recipe))
    models: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names:
        for seed in range(recipe.seeds):
            model = fresh(name, recipe, seed).to(device)
            began = time.perf_counter()
            curve = train(model, recipe, seed, device)
            seconds = time.perf_counter() - began
            results = {title: measure(model, streams, device) for title, streams in tests.items()}
            models[name].append(
                {
                    "seed": seed,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "training_seconds": round(seconds, 1),
                    "training_loss": curve,
                    "test": results,
                }
            )
            shown = ", ".join(f"{title} {r['loss']:.3f} ({r['accuracy']:.1%})" for title, r in results.items())
            print(f"{name:5} seed {seed}: trained to {curve[-1][1]:.4f} in {seconds:.0f} s; {shown}", flush=True)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"
    return {"device": where, "torch": torch.__version__, "recipe": asdict(recipe), "models": models}


def plot(result: dict[str, Any], path: Path) -> None:
    """Training losses, and losses of the tests; a line is the mean over seeds, a dot one seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {"none": "#7a7a7a", "rope": "#c77a00", "alibi": "#b3262e", "fox": "#1f5fbf"}
    for name, runs in result["models"].items():
        for run_ in runs:
            left.plot(*zip(*run_["training_loss"], strict=True), color=colors[name], label=name * (run_ is runs[0]))
        losses = {title: [run_["test"][title]["loss"] for run_ in runs] for title in runs[0]["test"]}
        for ending in ("length", "noise"):
            titles = [title for title in losses if title.endswith(ending)]
            right.plot(titles, [sum(losses[title]) / len(runs) for title in titles], color=colors[name])
        for title, values in losses.items():
            right.plot([title] * len(values), values, ".", color=colors[name])
    left.set(title="training", xlabel="step", ylabel="nats an answer")
    right.set(title="streams not seen in training", ylabel="nats an answer")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=120)


def main(
    size: Annotated[Literal["rehearsal", "small", "full"], typer.Argument(help="See above.")] = "rehearsal",
    out: Annotated[Path | None, typer.Option(help="A folder for forgetting.json and forgetting.png.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: a GPU for `full`, else the CPU.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
) -> None:
    """Train small models with and without forgetting attention, and report what they lose."""
    recipe = RECIPES[size]
    if steps is not None:
        recipe = Recipe(**{**asdict(recipe), "steps": steps})
    torch.set_num_threads(1)  # models this small gain nothing from more, and so give the same figures on every CPU
    began = time.perf_counter()
    result = run(recipe, torch.device(device or ("cuda" if size == "full" else "cpu")))
    result["seconds"] = round(time.perf_counter() - began, 1)
    print(f"{result['device']}: {result['seconds']:.0f} s in all")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "forgetting.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        plot(result, out / "forgetting.png")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=__doc__)(main)
    app()
