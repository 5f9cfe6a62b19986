"""ACE-Step, as it was asked for and as it is.

    python examples/ace_step.py                                     # small random weights: all steps, and noise
    python examples/ace_step.py --checkpoint ./Ace-Step1.5 --caption "a calm piano" --duration 60
    python examples/ace_step.py --plot bias.html                    # a learned, data-dependent bias over a stream

The first two are the released ACE-Step 1.5 from caption to WAV file. The last is the mechanism that no released
ACE-Step has in one place, but the library does: streaming attention with RoPE, a sliding window and a bias that the
tokens decide.
"""

import math
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from longburn.attention import Attention
from longburn.bias import ForgetBias
from longburn.bias.picture import BiasPicture, record_bias
from longburn.cache import RollingKVCache, Step, WindowPolicy
from longburn.cli.bias_drawing import PAGE_NUMBERS, draw, need_matplotlib, page
from longburn.cli.music import check_output
from longburn.generation import GenerationConfig, generate
from longburn.models.ace_step.codecs import write_wav
from longburn.models.ace_step.planner import PlannerSampling, SongPlan, SongRequest
from longburn.models.ace_step.v15.checkpoint import load_music_maker
from longburn.models.ace_step.v15.small import small_music_maker
from longburn.models.decoder import Decoder
from longburn.nn import RMSNorm, SwiGLU
from longburn.rope import RotaryEncoding
from longburn.sampling import SamplerConfig

DIM, HEADS, VOCABULARY = 64, 4, 256
PROMPT, QUERIES = 32, 128  # tokens before the stream, and at most so many queries in a picture


class Block(nn.Module):
    """One layer: attention whose bias is learned from the tokens, and a feed-forward."""

    def __init__(self, policy: WindowPolicy, layer: int) -> None:
        super().__init__()
        self.attention = Attention(
            DIM,
            HEADS,
            kv_heads=2,
            window=policy.of_layer(layer),
            rope=RotaryEncoding(DIM // HEADS),
            bias=ForgetBias(DIM, HEADS),
        )
        self.norm, self.mlp_norm, self.mlp = RMSNorm(DIM), RMSNorm(DIM), SwiGLU(DIM, 2 * DIM)

    def forward(self, x: Tensor, step: Step, cache: RollingKVCache | None) -> Tensor:
        x = x + self.attention(self.norm(x), step, cache=cache)
        return x + self.mlp(self.mlp_norm(x))


def drawn_queries(length: int, window: int, sink_tokens: int) -> range:
    """Evenly spaced positions of queries whose biases, with the positions of their keys, fit into one page."""
    numbers = (HEADS + 1) * min(length, window + sink_tokens)  # of one query
    if numbers > PAGE_NUMBERS:
        raise typer.BadParameter(
            f"--window {window}: {numbers:,} numbers for a single query, wanted at most {PAGE_NUMBERS:,}; take less"
        )
    return range(0, length, math.ceil(length / min(QUERIES, PAGE_NUMBERS // numbers)))


def check_plot(plot: Path) -> None:
    """Refuse a picture that could not be written, before there is anything to draw."""
    if plot.suffix not in (".png", ".html"):
        raise typer.BadParameter(f"--plot {plot}: wanted a name that ends in .png or .html")
    check_output(plot, "--plot")
    if plot.suffix == ".png":
        need_matplotlib()


def stream(plot: Path, tokens: int, window: int, sink_tokens: int, seed: int) -> None:
    """Generate over rolling caches, and draw what the first layer's bias adds to each query's scores."""
    check_plot(plot)
    every = drawn_queries(PROMPT + tokens, window, sink_tokens)
    torch.manual_seed(seed)
    policy = WindowPolicy.fixed(window, sink_tokens=sink_tokens)
    model = Decoder(
        VOCABULARY, DIM, (Block(policy, layer) for layer in range(2)), RMSNorm(DIM), dtype=torch.float32
    ).eval()
    bias = model.attentions[0].bias
    assert isinstance(bias, ForgetBias)
    cache = model.init_cache(1)
    config, sampler = GenerationConfig(tokens, chunk_size=16), SamplerConfig(seed=seed)
    with torch.no_grad(), record_bias(bias, positions=every) as rows:
        made = [
            event.token for event in generate(model, [list(range(PROMPT))], config=config, sampler=sampler, cache=cache)
        ]
    title = "Forgetting attention over a stream"
    notes = (f"{len(made)} sampled tokens; window {window}, {sink_tokens} kept sink tokens; random weights ({seed})",)
    picture = BiasPicture(title, notes, tuple(rows), sink_tokens)
    if plot.suffix == ".html":
        plot.write_text(page(picture), encoding="utf-8")
    else:
        draw(picture, plot)
    print(f"{plot}: the bias of {len(rows)} queries; the caches hold {cache.nbytes:,} bytes, however long the stream")


def main(
    checkpoint: Annotated[Path | None, typer.Option(help="Directory of ACE-Step 1.5; none: random weights.")] = None,
    caption: Annotated[str, typer.Option()] = "a calm piano in the rain",
    lyrics: Annotated[str, typer.Option()] = "[Instrumental]",
    duration: Annotated[float, typer.Option(help="Seconds, 10 to 600.")] = 10.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("song.wav"),
    plot: Annotated[Path | None, typer.Option(help="Draw a bias over a stream instead: PNG or HTML.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="With --plot: to generate.")] = 256,
    window: Annotated[int, typer.Option(min=1, help="With --plot.")] = 64,
    sink_tokens: Annotated[int, typer.Option(min=0, help="With --plot.")] = 4,
) -> None:
    """From a caption to a WAV file, or from a stream to a picture of its bias."""
    if plot is not None:
        return stream(plot, tokens, window, sink_tokens, seed)
    check_output(output)
    if checkpoint is None:
        print("no --checkpoint: small random weights, so the sound is noise")
        maker = small_music_maker(seed)
    else:
        maker = load_music_maker(checkpoint, device=device)
    request = SongRequest(caption, lyrics, duration=duration)
    began = time.perf_counter()
    plan, codes = SongPlan(), None
    if maker.planner is not None:
        plan, codes = maker.plan(request, PlannerSampling(seed=seed), caption=checkpoint is not None)
        print(f"plan: {plan}; {len(codes)} codes")
    latents = maker.latents(request, plan=plan, codes=codes, seed=seed)
    written = write_wav(output, maker.audio(latents))
    seconds, work = written.samples / maker.codec.config.sampling_rate, time.perf_counter() - began
    print(f"{output}: {seconds:.1f} s of audio in {work:.1f} s, {seconds / work:.1f} s a second")
    return None


if __name__ == "__main__":
    typer.run(main)
