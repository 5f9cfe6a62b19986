"""Matrix-Game 2 on one GPU: blocks of 12 pictures a second, beside the same transformer in plain PyTorch.

Weights are random at the released size (universal mode, 352 x 640). In the same run both are held to the plain one in
fp32, over the same noise and actions: in bf16 ours may be at most half as far again from it as the plain one is.
`--small` tries the script anywhere; its times mean nothing.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from gpu_timing import ceilings, distance
from longburn.models.matrix_game_2 import ActionConfig, MatrixGame2, MatrixGame2Config, Rollout, RolloutSettings
from longburn.models.matrix_game_2.config import CLIP_SIZE, CLIP_TOKENS, LATENT_SIZE, MASK_CHANNELS, PATCH, STEPS
from longburn.models.matrix_game_2.names import rules
from longburn.models.matrix_game_2.sampler import TIMESTEPS, BlockNoise, noise_levels
from longburn.models.matrix_game_2.vae import WanDecoder
from longburn.models.matrix_game_2.vae_memory import FrameMemory, StreamedDecoder
from longburn.models.matrix_game_2.vae_recorded import RecordedDecoder
from longburn.models.matrix_game_2.vae_tiny import TinyDecoder
from longburn.weights import StateDictSource, in_their_names
from machine import describe_gpu, describe_machine, machine_line, write_json
from matrix_game_2_peer import Peer
from sheets import Sheet, console

NAME = "matrix_game_2"
BLOCKS, PEER_BLOCKS, CHECKED, ENDLESS = 60, 6, 5, 2000
HEADER = ("", "FPS", "p50", "p99", "FPS in a row", "GB of tensors", "GB reserved")
MORE = {"fps_ahead": 1, "peak_gb": 2, "reserved_gb": 2}  # columns, and their digits
PICTURES = 12  # of a block after the first
WORSE = 1.5
SMALL_SIZES = {"dim": 96, "ffn_dim": 192, "num_heads": 4, "num_layers": 3}
SMALL_ACTION = {"heads_num": 2, "hidden_size": 16, "img_hidden_size": 96}


def small(config: MatrixGame2Config) -> MatrixGame2Config:
    action = ActionConfig(blocks=(0, 1), keyboard_hidden_dim=128, mouse_hidden_dim=128, **SMALL_ACTION)  # type: ignore[arg-type]
    return replace(config, action_config=action, **SMALL_SIZES)  # type: ignore[arg-type]


@torch.no_grad()
def random_model(config: MatrixGame2Config, dtype: torch.dtype, device: str) -> MatrixGame2:
    """Weights that keep the size of what goes through them, biases small, norms near 1."""
    with torch.device("meta"):
        model = MatrixGame2(config, dtype=dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, device=device)
        is_norm = "norm" in name and name.endswith("weight")
        if name.endswith("table"):
            parameter.copy_(0.3 * drawn)
        elif parameter.dim() == 1:
            parameter.copy_(1 + 0.1 * drawn if is_norm else 0.02 * drawn)
        else:
            parameter.copy_(drawn / math.sqrt(parameter.shape[1]))
    return model.eval()


def released_names(model: MatrixGame2) -> dict[str, Tensor]:
    """The model's weights under their released names; hardly one is copied."""
    source = in_their_names(StateDictSource(model.state_dict()), rules(model.config, prefix=""))
    return {name: source.read(name) for name in source.tensors}


def image_of(config: MatrixGame2Config, size: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    """CLIP tokens and latents of a start image."""
    generator = torch.Generator().manual_seed(1)
    clip = torch.randn(1, CLIP_TOKENS, CLIP_SIZE, generator=generator)
    return clip.to(device), torch.randn(1, config.out_dim, 4, *size, generator=generator).to(device)


def actions(block: int) -> tuple[list[float], list[float]]:
    """Keys and mouse of a block."""
    return [float(block % 2), 0.0, float(block % 3 == 1), 0.0], [0.0, 0.1 * (block % 3 - 1)]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def latencies(step: Callable[[int], object], blocks: range, device: str) -> list[float]:
    """Seconds of each block, from the action to its latents."""
    taken = []
    for block in blocks:
        wait(device)
        began = time.perf_counter()
        step(block)
        wait(device)
        taken.append(time.perf_counter() - began)
    return taken


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> dict[str, float]:
    """GB at most, weights among them: of tensors, and of all that the process has reserved, graphs' memory included."""
    if device != "cuda":
        return {}
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9, "reserved_gb": torch.cuda.max_memory_reserved() / 1e9}


def figures(taken: list[float]) -> dict[str, float]:
    return {
        "fps": PICTURES / median(taken),
        "p50": median(taken),
        "p99": quantiles(taken, n=100, method="inclusive")[98] if len(taken) > 1 else taken[0],
    }


def block_flops(config: MatrixGame2Config, size: tuple[int, int]) -> float:
    """FLOP of a block in the middle of a stream: products with weights, and attention, of four whole passes."""
    with torch.device("meta"):
        weights = MatrixGame2(config).state_dict()
    places = size[0] * size[1] // PATCH**2
    tokens, seen, width = 3 * places, config.local_attn_size, config.action_config.mouse_hidden_dim
    once = ("table", "time", "image.fc", "image.kv", "signal", "embed", "keyboard.kv", "condition")
    per_token = sum(w.numel() for name, w in weights.items() if w.dim() > 1 and not any(part in name for part in once))
    keys = config.num_layers * config.dim * (seen * places + CLIP_TOKENS)
    keys += len(config.action_config.blocks) * (width + config.action_config.keyboard_hidden_dim) * seen
    return (len(STEPS["universal"]) + 1) * tokens * (2.0 * per_token + 4.0 * keys)


class PeerRollout:
    """The released loop around the plain transformer."""

    def __init__(
        self, weights: Mapping[str, Tensor], config: MatrixGame2Config, clip: Tensor, start: Tensor, dtype: torch.dtype
    ) -> None:
        action = config.action_config
        settings = {name: getattr(config, name) for name in ("num_heads", "num_layers", "freq_dim", "eps")}
        settings["action_config"] = {name: getattr(action, name) for name in ("heads_num", "blocks")}
        settings["action_config"] |= {"rope_dim_list": action.rope_dim_list, "rope_theta": action.rope_theta}
        self.peer = Peer(weights, settings, window=config.local_attn_size)
        self.clip, self.start, self.dtype = clip.to(dtype), start.to(dtype), dtype
        self.levels = noise_levels(STEPS["universal"])
        shape = (1, config.out_dim, 3, *start.shape[3:])
        self.noise = BlockNoise(shape, len(self.levels) - 1, [0], start.device)
        self.first, self.fresh = start.new_zeros(shape), start.new_zeros(len(self.levels) - 1, *shape)
        self.tracks: list[list[list[float]]] = [[], []]
        self.frames = 0

    def step(self, block: int) -> Tensor:
        count = PICTURES if self.frames else PICTURES - 3
        for track, signal in zip(self.tracks, actions(block), strict=True):
            track.extend([signal] * count)
        heard = [self._heard(track) for track in self.tracks]
        self.noise.send(self.first, self.fresh)
        x = self.first.clone()
        for i, (level, after) in enumerate(zip(self.levels, self.levels[1:], strict=False)):
            clean = x - level * self._velocity(x, level, *heard).to(x.dtype)
            x = (1 - after) * clean + after * self.fresh[i]
        self._velocity(x, 0.0, *heard)
        self.frames += 3
        return x

    def _velocity(self, x: Tensor, level: float, keyboard: Tensor, mouse: Tensor) -> Tensor:
        t = torch.full((1, 3), level * TIMESTEPS, device=x.device)
        given = (self.clip, self._condition(), mouse, keyboard, self.frames)
        return self.peer.forward(x.to(self.dtype), t, *given)

    def _condition(self) -> Tensor:
        at = [min(self.frames + i, self.start.shape[2] - 1) for i in range(3)]
        mask = self.start.new_zeros(1, MASK_CHANNELS, 3, *self.start.shape[3:])
        mask[:, :, 0] = float(self.frames == 0)
        return torch.cat([mask, self.start[:, :, at]], 1)

    def _heard(self, track: list[list[float]]) -> Tensor:
        rows = [[track[max(4 * frame - 12 + i, 0)] for i in range(12)] for frame in range(self.frames, self.frames + 3)]
        return torch.tensor([rows], device=self.start.device, dtype=self.dtype)


@torch.no_grad()
def held_to_fp32(
    model: MatrixGame2, weights: Mapping[str, Tensor], clip: Tensor, start: Tensor, settings: RolloutSettings
) -> dict[str, Any]:
    """How far blocks of ours and of the plain model in bf16 are from the plain one's in fp32, the farthest of them."""
    wide = {name: tensor.float() for name, tensor in weights.items()}
    exact = PeerRollout(wide, model.config, clip, start.float(), torch.float32)
    plain = PeerRollout(weights, model.config, clip, start.float(), model.dtype)
    ours = Rollout(model, clip, start, settings=settings)
    errors = {"longburn": 0.0, "plain": 0.0}
    for block in range(CHECKED):
        truth = exact.step(block).double()
        for name, x in (("longburn", ours.step(*actions(block))), ("plain", plain.step(block))):
            errors[name] = max(errors[name], distance(x, truth))
    if not errors["longburn"] <= WORSE * errors["plain"]:
        raise RuntimeError(f"matrix_game_2: blocks are off by {errors}")
    return {**errors, "recorded": ours.recorded}


@torch.no_grad()
def dit(model: MatrixGame2, clip: Tensor, start: Tensor, settings: RolloutSettings, blocks: int) -> dict[str, Any]:
    """The transformer alone: every block waited for, and all of them in a row."""
    device = model.device.type
    forget_peak(device)
    rollout = Rollout(model, clip, start, settings=settings)
    for block in range(5):  # the window fills, kernels are compiled, graphs recorded
        rollout.step(*actions(block))
    taken = latencies(lambda block: rollout.step(*actions(block)), range(5, 5 + blocks), device)
    wait(device)
    began = time.perf_counter()
    for block in range(blocks):
        rollout.step(*actions(block))
    wait(device)
    ahead = (time.perf_counter() - began) / blocks
    found = {**figures(taken), "fps_ahead": PICTURES / ahead, "recorded": rollout.recorded, **peak(device)}
    return found | {"why_not": rollout.why_not, "caches_gb": rollout.nbytes / 1e9}


@torch.no_grad()
def with_decoder(
    model: MatrixGame2, decoder: StreamedDecoder, clip: Tensor, start: Tensor, settings: RolloutSettings, blocks: int
) -> dict[str, Any]:
    """From action to pictures; what decodes a block runs beside what remembers it, and beside the next one."""
    device = model.device.type
    forget_peak(device)
    rollout, recorded, memory = Rollout(model, clip, start, settings=settings), RecordedDecoder(decoder), FrameMemory()
    recorded.prepare(memory, batch=1, height=start.shape[3], width=start.shape[4])
    side = torch.cuda.Stream() if device == "cuda" else None

    def step(block: int) -> object:
        latents = rollout.step(*actions(block))
        if side is None or rollout.ready is None:
            return recorded.decode(latents.to(decoder.like.dtype), memory)
        side.wait_event(rollout.ready)
        with torch.cuda.stream(side):
            latents.record_stream(side)
            return recorded.decode(latents.to(decoder.like.dtype), memory)

    for block in range(5):
        step(block)
    taken = latencies(step, range(5, 5 + blocks), device)
    wait(device)
    began = time.perf_counter()
    for block in range(blocks):
        step(block)
    wait(device)
    ahead = (time.perf_counter() - began) / blocks
    return {**figures(taken), "fps_ahead": PICTURES / ahead, **peak(device)}


@torch.no_grad()
def endless(device: str, blocks: int) -> dict[str, Any]:
    """A small model over many blocks, upstream's end (341) far behind: memory, and how large its numbers become."""
    config = small(MatrixGame2Config.released("universal"))
    model = random_model(config, torch.float32, device)
    clip, start = image_of(config, (8, 12), device)
    rollout = Rollout(model, clip, start, settings=RolloutSettings(latent_size=(8, 12), steps=(1000, 500)))
    allocated, largest = [], 0.0
    for block in range(blocks):
        latents = rollout.step(*actions(block))
        if block % 50 == 49:
            largest = max(largest, float(latents.abs().max()))
            allocated.append(torch.cuda.memory_allocated() if device == "cuda" else rollout.nbytes)
    grown = allocated[-1] - allocated[min(1, len(allocated) - 1)]
    if grown > 0 or not largest < 100:
        raise RuntimeError(f"matrix_game_2: {blocks} blocks grew by {grown} bytes, largest number {largest}")
    return {"blocks": blocks, "frames": rollout.frames, "grown_bytes": grown, "largest": largest}


@torch.no_grad()
def plain(weights: Mapping[str, Tensor], model: MatrixGame2, clip: Tensor, start: Tensor) -> dict[str, float]:
    """The plain transformer, every block waited for."""
    peer = PeerRollout(weights, model.config, clip, start.float(), model.dtype)
    for block in range(4):
        peer.step(block)
    return figures(latencies(peer.step, range(4, 4 + PEER_BLOCKS), model.device.type))


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """The table."""
    rows = []
    for name in ("longburn", "plain", *(name for name in result if name.startswith("with "))):
        found = result[name]
        milliseconds = [f"{1e3 * found[key]:.1f} ms" for key in ("p50", "p99")]
        more = [f"{found[key]:.{digits}f}" if key in found else "-" for key, digits in MORE.items()]
        rows.append([name, f"{found['fps']:.1f}", *milliseconds, *more])
    return [Sheet("Matrix-Game 2, universal, 352 x 640", HEADER, rows)]


def finding(result: Mapping[str, Any]) -> str:
    """What the table rests on."""
    errors, endless, speed = result["errors"], result["endless"], result["flops"]
    floor = result["block_flops"] / speed
    return (
        f"Floor of the transformer: {result['block_flops'] / 1e12:.1f} TFLOP a block at {speed / 1e12:.0f} TFLOP/s are "
        f"{1e3 * floor:.1f} ms, {PICTURES / floor:.0f} FPS. Check in the same run: blocks in bf16 are at most "
        f"{errors['longburn']:.2%} off the plain transformer's in fp32, the plain one's own {errors['plain']:.2%}. A "
        f"small model made {endless['blocks']:,} blocks, {endless['frames']:,} latent frames: memory grew by "
        f"{endless['grown_bytes']} bytes, and no number was larger than {endless['largest']:.1f}."
    )


def main(
    small_sizes: Annotated[bool, typer.Option("--small", help="Small sizes, on any machine: to try it.")] = False,
    blocks: Annotated[int, typer.Option(help="Blocks that are timed.")] = BLOCKS,
    check: Annotated[bool, typer.Option(help="Hold both to fp32 first.")] = True,
) -> None:
    """Measure, check, print a table, and write docs/assets/matrix_game_2.json (not with --small)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not small_sizes and device == "cpu":
        raise typer.BadParameter("no CUDA device: --small tries the script without one")
    config = MatrixGame2Config.released("universal")
    config, size = (small(config), (8, 12)) if small_sizes else (config, LATENT_SIZE)
    settings = RolloutSettings(latent_size=size)
    model = random_model(config, torch.bfloat16, device)
    clip, start = image_of(config, size, device)
    result: dict[str, Any] = {"machine": describe_machine() | describe_gpu()}
    count = 4 if small_sizes else blocks
    result["longburn"] = dit(model, clip, start, settings, count)
    decoders = {"Wan VAE": WanDecoder(dtype=torch.float16), "tiny decoder": TinyDecoder(dtype=torch.float16)}
    if small_sizes:
        decoders = {"tiny decoder": TinyDecoder()}
    for name, decoder in decoders.items():
        result[f"with {name}"] = with_decoder(model, decoder.to(device).eval(), clip, start, settings, count)
    result["endless"] = endless(device, 100 if small_sizes else ENDLESS)
    weights = released_names(model)
    result["plain"] = plain(weights, model, clip, start)
    if check:
        result["errors"] = held_to_fp32(model, weights, clip, start, settings)
    # Last, for it leaves gaps in the allocator's memory.
    result |= {"block_flops": block_flops(config, size), "flops": ceilings()["matmul"] if device == "cuda" else 1e11}
    for sheet in sheets(result):
        console().print(sheet.rich())
    console().print(machine_line(result["machine"]))
    console().print(finding(result))
    if not small_sizes:
        write_json(NAME, result)


if __name__ == "__main__":
    typer.run(main)
