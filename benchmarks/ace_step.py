"""ACE-Step 1.5 on one GPU beside diffusers and transformers: the transformer by length, a whole piece of ten minutes,
and the 5 Hz language model.

Weights are random at the released sizes. Our transformer has diffusers' weights, and its velocity is held to diffusers'
own in fp32 in the same run: in bf16 it may be at most half as far again from it as diffusers' bf16 is. `--small` tries
the script anywhere; its times mean nothing.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from gpu_timing import distance
from longburn.diffusion import draw_noise, seeded
from longburn.models.ace_step.codecs import Oobleck, OobleckConfig
from longburn.models.ace_step.planner import Planner, SongPlan, SongRequest
from longburn.models.ace_step.v15 import AceStep15Config, AceStepDiT, diffusers_rules
from longburn.models.ace_step.v15.sampling import Turbo, sample
from longburn.models.ace_step.v15.small import small_tokenizer
from longburn.models.ace_step.v15.tasks import DiTVelocity, context_latents, recorded_passes
from longburn.models.qwen3 import Qwen3, Qwen3Config
from longburn.rope import RotaryEncoding
from longburn.weights import StateDictSource, load_checkpoint
from machine import describe_gpu, describe_machine, machine_line, write_json
from sheets import Sheet, console

NAME = "ace_step"
SECONDS = (60, 240, 600)
STEPS, RATE, CONDITIONS = 8, 25, 512
RUNS = 5
WORSE = 1.5
SMALL_CODEC = OobleckConfig(encoder_hidden_size=16, decoder_channels=8, channel_multiples=(1, 1, 2, 2, 2))
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
LM = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
PROMPT, CODES_MADE = 512, 500


def timed(work: Callable[[], object], device: str, runs: int = RUNS) -> float:
    """Median seconds of some work, the device's included, after two runs that are not counted."""
    taken = []
    for run in range(runs + 2):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        if run >= 2:
            taken.append(time.perf_counter() - began)
    return median(taken)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def transformers_of(config: AceStep15Config, device: str) -> tuple[nn.Module, AceStepDiT]:
    """Diffusers' transformer with random weights in bf16, and ours with the same ones."""
    from diffusers import AceStepTransformer1DModel

    names = [*SMALL, "head_dim", "num_hidden_layers", "in_channels", "audio_acoustic_hidden_dim", "patch_size"]
    with torch.device(device):
        theirs = AceStepTransformer1DModel(
            **{name: getattr(config, name) for name in names},
            encoder_hidden_size=config.encoder_hidden_size,
            sliding_window=config.sliding_window,
            is_turbo=True,
            model_version="turbo",
        ).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, device=device)
            spread = 1 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.02
            parameter.copy_(1 + 0.1 * drawn if "norm" in name else spread * drawn)
    with torch.device("meta"):
        ours = AceStepDiT(config, dtype=torch.bfloat16)
    load_checkpoint(ours, StateDictSource(theirs.state_dict()), diffusers_rules(config)["transformer"], device=device)
    return theirs.eval(), ours.eval()


@torch.no_grad()
def dit(config: AceStep15Config, seconds: tuple[int, ...], device: str) -> list[dict[str, Any]]:
    """Eight steps of a turbo model: ours with all that a piece costs, diffusers' as its pipeline calls it."""
    theirs, ours = transformers_of(config, device)
    channels = config.audio_acoustic_hidden_dim
    hidden = torch.randn(1, CONDITIONS, config.encoder_hidden_size, device=device, dtype=torch.bfloat16)
    records = [held_to_fp32(theirs, ours, config, hidden, device)]
    parameters = sum(p.numel() for p in ours.parameters())
    passes = recorded_passes(ours)
    for length in seconds:
        frames = length * RATE
        noise = draw_noise((1, frames, channels), seeded([1])).to(device)
        context = context_latents(torch.randn(1, frames, channels, device=device, dtype=torch.bfloat16))

        def ours_of(noise: Tensor = noise, context: Tensor = context) -> Tensor:
            return sample(DiTVelocity(ours, context, hidden, passes=passes), noise, Turbo())

        def pipeline(noise: Tensor = noise, context: Tensor = context) -> Tensor:
            x = noise.bfloat16()
            levels = Turbo().schedule()
            for t, after in itertools.pairwise(levels):
                at = torch.full((1,), t, device=device, dtype=torch.bfloat16)
                v = theirs(
                    hidden_states=x,
                    timestep=at,
                    timestep_r=at,
                    encoder_hidden_states=hidden,
                    context_latents=context,
                    return_dict=False,
                )[0]
                x = x + (after - t) * v
            return x

        tokens, layers = -(-frames // 2), config.num_hidden_layers
        seen = (
            tokens * tokens + tokens * min(tokens, 2 * (config.sliding_window or tokens) + 1) + 2 * tokens * CONDITIONS
        )
        width = config.num_attention_heads * config.head_dim
        flops = STEPS * (2 * parameters * tokens + layers / 2 * 4 * width * seen)
        records.append(
            {
                "case": f"{length} s of audio",
                "longburn": timed(ours_of, device),
                "diffusers": timed(pipeline, device, 3),
                "flops": flops,
                "bytes": STEPS * 2 * parameters,
            }
        )
    return records


@torch.no_grad()
def piece(config: AceStep15Config, codec: OobleckConfig, seconds: int, device: str) -> dict[str, Any]:
    """A whole piece, from noise to samples on the host, with transformer and codec in bf16: what it takes of memory."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.device(device):
        dit, decoder = AceStepDiT(config, dtype=torch.bfloat16).eval(), Oobleck(codec, dtype=torch.bfloat16).eval()
        hidden = torch.randn(1, CONDITIONS, config.encoder_hidden_size, dtype=torch.bfloat16)
    channels, frames = config.audio_acoustic_hidden_dim, seconds * RATE
    noise = draw_noise((1, frames, channels), seeded([1])).to(device)
    context = context_latents(torch.zeros(1, frames, channels, device=device, dtype=torch.bfloat16))
    passes, took = recorded_passes(dit), [0.0, 0.0]
    for _ in range(2):  # the first one compiles and records
        wait(device)
        began = time.perf_counter()
        latents = sample(DiTVelocity(dit, context, hidden, passes=passes), noise, Turbo())
        wait(device)
        between = time.perf_counter()
        samples = sum(part.float().cpu().shape[-1] for part in decoder.decode_stream(latents.mT.bfloat16()))
        took = [between - began, time.perf_counter() - between]
    if samples != seconds * codec.sampling_rate:
        raise RuntimeError(f"ace_step: {samples} samples for {seconds} s")
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"case": f"{seconds} s from noise to sound", "latents": took[0], "decoding": took[1], "peak_bytes": peak}


def held_to_fp32(
    theirs: nn.Module, ours: AceStepDiT, config: AceStep15Config, hidden: Tensor, device: str
) -> dict[str, Any]:
    """How far both are from diffusers' transformer in fp32, over 11 s of an odd number of frames."""
    frames, channels = 275, config.audio_acoustic_hidden_dim
    x, source = torch.randn(2, 1, frames, channels, device=device, dtype=torch.bfloat16)
    context, t = context_latents(source), torch.full((1,), 0.5, device=device)
    arguments = {"hidden_states": x, "encoder_hidden_states": hidden, "context_latents": context}

    def velocity(dtype: torch.dtype) -> Tensor:
        given = {name: value.to(dtype) for name, value in arguments.items()}
        return theirs.to(dtype)(timestep=t.to(dtype), timestep_r=t.to(dtype), return_dict=False, **given)[0]

    low, exact = velocity(torch.bfloat16), velocity(torch.float32).double()
    theirs.to(torch.bfloat16)
    mine = ours.forward(x, t, context, ours.conditions(hidden))
    errors = {"longburn": distance(mine, exact), "diffusers": distance(low, exact)}
    if not errors["longburn"] <= WORSE * errors["diffusers"]:
        raise RuntimeError(f"ace_step: the velocity is off by {errors}")
    return {"case": "error of a velocity", **errors}


@torch.no_grad()
def language_model(sizes: dict[str, int], codes: int, made: int, device: str) -> dict[str, Any]:
    """Codes of one guided song; transformers with its growing cache, greedy and without the sub-range head."""
    core = small_tokenizer(codes)
    vocabulary = max(core.get_vocab_size(), 217204 if codes > 1000 else 0)
    settings = {
        "model_type": "qwen3",
        "vocab_size": vocabulary,
        "num_key_value_heads": 8 if codes > 1000 else 2,
        "head_dim": 128 if codes > 1000 else 16,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
        **sizes,
    }
    with torch.device(device):
        model = Qwen3(Qwen3Config.from_hf(settings), dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else 0.02)
    planner = Planner(model, tokenizer_of(core), codes=codes)
    song = (SongRequest("x", "la " * (PROMPT // 3 - 40), duration=120), SongPlan(duration=120))
    took = 0.0
    for _ in range(2):  # the first one compiles and records
        steps = planner.stream_codes([song])
        for _ in range(20):
            next(steps)
        wait(device)
        began = time.perf_counter()
        for _ in range(made):
            next(steps)
        took = time.perf_counter() - began
        steps.close()
    layers = sum(p.numel() for p in model.layers.parameters())
    read = 2 * (layers + (codes + 1) * settings["hidden_size"])
    record = {"case": "5 Hz language model, guided pair", "longburn": made / took, "bytes": read}
    del planner, model
    return record | {"transformers": transformers_steps(settings, made, device)}


def transformers_steps(settings: dict[str, Any], made: int, device: str) -> float:
    """Steps a second of a batch of two after a prompt of 512 tokens."""
    from transformers import Qwen3Config as TheirConfig
    from transformers import Qwen3ForCausalLM

    own = {name: value for name, value in settings.items() if name != "model_type"}
    with torch.device(device):
        model = Qwen3ForCausalLM(TheirConfig(**own)).to(torch.bfloat16).eval()
    out = model(torch.randint(0, min(1000, settings["vocab_size"]), (2, PROMPT), device=device), use_cache=True)
    few = min(made, 40)
    for step in range(few + 5):
        if step == 5:
            wait(device)
            began = time.perf_counter()
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    wait(device)
    return few / (time.perf_counter() - began)


def tokenizer_of(core: Any) -> Any:
    import tempfile
    from pathlib import Path

    from longburn.text import Tokenizer

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "tokenizer.json"
        core.save(str(file))
        return Tokenizer.from_file(file)


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """The tables."""
    rows = []
    for record in result["dit"]:
        if "flops" in record:
            floor = max(record["flops"] / result["flops"], record["bytes"] / result["read"])
            times = [f"{1e3 * record[name]:.1f} ms" for name in ("longburn", "diffusers")]
            ratio = record["diffusers"] / record["longburn"]
            rows.append([record["case"], *times, f"{ratio:.1f}x", f"{1e3 * floor:.1f} ms"])
    found = [Sheet("ACE-Step 1.5, 2B, 8 steps", ("length", "longburn", "diffusers", "ratio", "floor"), rows)]
    whole = result["piece"]
    peak = "-" if whole["peak_bytes"] is None else f"{whole['peak_bytes'] / 2**30:.2f} GiB"
    line = [whole["case"], f"{whole['latents']:.2f} s", f"{whole['decoding']:.2f} s", peak]
    found.append(Sheet("A whole piece, batch 1", ("", "latents", "decoding", "device memory"), [line]))
    lm = result["language model"]
    line = [lm["case"], f"{lm['longburn']:.0f}", f"{lm['transformers']:.1f}", f"{result['read'] / lm['bytes']:.0f}"]
    return [*found, Sheet("Steps a second", ("", "longburn", "transformers", "floor"), [line])]


def main(
    small: Annotated[bool, typer.Option(help="Small sizes, on any machine: only to try the script.")] = False,
    seconds: Annotated[list[int] | None, typer.Option(help="Lengths; default 60, 240 and 600.")] = None,
) -> None:
    """Measure, check, print a table, and write docs/assets/ace_step.json (not with --small)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not small and device == "cpu":
        raise typer.BadParameter("no CUDA device: --small tries the script without one")
    config = AceStep15Config.released("turbo")
    lengths = tuple(seconds or ((10,) if small else SECONDS))
    ceilings = {"read": 3.0e12, "matmul": 6.9e14}
    codec = OobleckConfig()
    if small:
        codec = SMALL_CODEC
        encoder = {f"encoder_{name}": value for name, value in SMALL.items()}
        layers = {
            "rope": RotaryEncoding(16, theta=1e6),
            "head_dim": 16,
            "num_hidden_layers": 4,
            "num_lyric_encoder_hidden_layers": 4,
        }
        config = replace(config, layer_types=config.layer_types[:4], **SMALL, **encoder, **layers)
    else:
        from gpu_timing import ceilings as measured

        ceilings = measured()
    result: dict[str, Any] = {"machine": describe_machine() | describe_gpu(), "settings": asdict(Turbo())}
    result |= {"read": ceilings["read"], "flops": ceilings["matmul"]}
    result["dit"] = dit(config, lengths, device)
    result["piece"] = piece(config, codec, lengths[-1], device)
    sizes = {**SMALL, "num_hidden_layers": 2} if small else LM
    sizes.pop("num_key_value_heads", None)
    result["language model"] = language_model(sizes, 64 if small else 64000, 30 if small else CODES_MADE, device)
    for sheet in sheets(result):
        console().print(sheet.rich())
    console().print(machine_line(result["machine"]))
    if small:
        console().print(json.dumps(result["dit"][0]))
    else:
        write_json(NAME, result)


if __name__ == "__main__":
    typer.run(main)
