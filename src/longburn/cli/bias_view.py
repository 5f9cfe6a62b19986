"""`longburn bias-view`: pictures of how an additive attention bias changes with the context."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from longburn.cli.bias_drawing import PAGE_NUMBERS, draw, need_matplotlib, page
from longburn.cli.bias_policies import KINDS, Layer, PolicyName
from longburn.cli.options import DEFAULT_SINK_TOKENS, Debug
from longburn.cli.sizes import show_size

if TYPE_CHECKING:
    from torch import Tensor

    from longburn.attention import Attention
    from longburn.bias.picture import BiasPicture

EMBEDDING = "tiny-gpt-oss"
CHUNK = 256
PERIOD = 24  # tokens after which `--input repeat` starts again


@dataclass(frozen=True)
class Input:
    """What the layer reads: x `[1, T, M]`, what that is, and the text of every token, if it has any."""

    x: "Tensor"
    what: str
    labels: tuple[str, ...] = ()


def bias_view(
    policy: Annotated[PolicyName, typer.Argument(help="Which bias.", show_default=False)],
    html: Annotated[
        Path | None, typer.Option(help="Write the page here. Default: both files, bias-POLICY.*", show_default=False)
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write the PNG here.", show_default=False)] = None,
    heads: Annotated[int, typer.Option(min=1, max=64, help="Query heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=2, max=256, help="Size of a head.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, max=65536, help="Length of the stream.")] = 256,
    window: Annotated[int, typer.Option(min=1, max=16384, help="Keys that are kept, the newest included.")] = 64,
    sink_tokens: Annotated[int, typer.Option(min=0, max=64, help="First tokens that stay.")] = DEFAULT_SINK_TOKENS,
    source: Annotated[
        Literal["random", "repeat"],
        typer.Option("--input", help=f"Random tokens, or {PERIOD} of them again and again."),
    ] = "random",
    text: Annotated[
        str | None, typer.Option(help=f"Read this text through the embedding of {EMBEDDING}.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the input.")] = 0,
    debug: Debug = False,
) -> None:
    """Draw how an attention bias changes with context: per head, per query, and over a stream."""
    if html is None and png is None:
        html, png = Path(f"bias-{policy}.html"), Path(f"bias-{policy}.png")
    for path in (html, png):
        if path is not None and not path.absolute().parent.is_dir():
            raise OSError(f"{path}: there is no directory {path.absolute().parent}")
    if png is not None:
        need_matplotlib()
    given = read_text(text, tokens) if text is not None else make_input(source, tokens, heads * head_dim, seed)
    layer = Layer(given.x.shape[2], heads, head_dim, window, sink_tokens)
    picture = look(policy, layer, given, seed)
    if html is not None:
        content = page(picture)
        html.write_text(content, encoding="utf-8")
        tell(html, picture)
    if png is not None:
        draw(picture, png)
        tell(png, picture)


def tell(path: Path, picture: "BiasPicture") -> None:
    rows, heads = len(picture.rows), picture.heads
    typer.echo(f"{path}: {rows} queries, {heads} head{'s' * (heads > 1)}, {show_size(path.stat().st_size)}")


def make_input(kind: Literal["random", "repeat"], tokens: int, dim: int, seed: int) -> Input:
    """Numbers drawn from N(0, 1) for every token, or for the tokens of one period."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    if kind == "random":
        return Input(torch.randn(1, tokens, dim, generator=generator), f"random tokens (seed {seed})")
    period = torch.randn(1, PERIOD, dim, generator=generator)
    x = period.repeat(1, -(-tokens // PERIOD), 1)[:, :tokens]
    return Input(x, f"{PERIOD} random tokens (seed {seed}), repeated")


def read_text(text: str, most: int) -> Input:
    """The first tokens of a text, each as its row of the embedding, scaled to a root mean square of 1."""
    import torch

    from longburn.models import load_model

    loaded = load_model(EMBEDDING)
    ids = loaded.tokenizer.encode(text)[:most]
    if not ids:
        raise ValueError("--text: the text is empty, wanted at least one token")
    with torch.no_grad():
        x = loaded.model.embed.weight[torch.tensor(ids)].float()
    x = x * x.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
    labels = tuple(loaded.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids)
    start = " ".join(text.split())
    shown = start if len(start) <= 60 else start[:57] + "..."
    return Input(x[None], f'"{shown}" through the embedding of {EMBEDDING}', labels)


def look(name: PolicyName, layer: Layer, given: Input, seed: int) -> "BiasPicture":
    """What the policy adds while one layer reads the input through a rolling cache."""
    import torch

    from longburn.bias.picture import BiasPicture, record_bias
    from longburn.cache import CacheManager

    tokens = given.x.shape[1]
    step = every(tokens, layer)
    attention = fresh_layer(name, layer, seed)
    assert attention.bias is not None
    cache = CacheManager.for_layers([attention], 1)
    kept = range((tokens - 1) % step, tokens, step)
    with torch.no_grad(), record_bias(attention.bias, positions=kept) as rows:
        start = 0
        for newest in kept:  # what lies between two drawn queries is read in few calls
            for chunk in torch.split(given.x[:, start : newest + 1], CHUNK, 1):
                now = cache.positions(chunk.shape[1])
                attention(chunk, now, cache=cache[0])
                cache.advance(now)
            start = newest + 1
    notes = (
        f"input: {given.what}; {tokens} tokens, streamed{f'; every {step}th query is drawn' * (step > 1)}",
        f"layer: {layer.heads} heads of size {layer.head_dim} with random weights (seed {seed}); a window of "
        f"{layer.window}, {layer.sink_tokens} kept sink tokens",
        f"parameters of the bias: {KINDS[name].parameters}",
    )
    return BiasPicture(KINDS[name].title, notes, tuple(rows), layer.sink_tokens, given.labels)


def fresh_layer(name: PolicyName, layer: Layer, seed: int) -> "Attention":
    """An untrained layer with this bias and no other positions; its queries and keys spread by 1."""
    import torch

    from longburn.attention import Attention
    from longburn.cache import AttnWindow

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attention = Attention(
            layer.dim,
            layer.heads,
            head_dim=layer.head_dim,
            window=AttnWindow(layer.window, sink_tokens=layer.sink_tokens),
            bias=KINDS[name].build(layer),
        )
        torch.nn.init.normal_(attention.qkv.weight, std=layer.dim**-0.5)
    return attention


def every(tokens: int, layer: Layer) -> int:
    """Which queries to keep, so that the page stays within its bound.

    Raises:
        ValueError: not even two queries would.
    """
    row = (layer.heads + 1) * min(tokens, layer.window + layer.sink_tokens)
    if 2 * row > PAGE_NUMBERS:
        raise ValueError(
            f"bias-view: one query of {layer.heads} heads and {row // (layer.heads + 1):,} keys is {row:,} numbers, "
            f"and the page holds {PAGE_NUMBERS:,}; give fewer --heads or a smaller --window"
        )
    return -(-tokens // (PAGE_NUMBERS // row))
