"""GPT-OSS at the released sizes on a GPU, from a checkpoint of random weights: loading, prompts, decoding."""

import copy
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_timing import DEVICE, distance
from longburn import CacheManager, GenerationConfig, generate, use_impl
from longburn.models.gpt_oss import GptOss, GptOssConfig
from longburn.models.gpt_oss.config import SLIDING
from longburn.nn import Mxfp4Weight
from memory import memory_bytes

Record = dict[str, Any]

DECODE = [(1, 2048), (1, 8192), (1, 32768), (1, 131072), (32, 8192)]  # rows, tokens before
PACKED = [(1, 131072)]
PREFILL = [8192, 32768]
PEER_PROMPTS = [2048, 8192]
SKIPPED, STEPS = 16, 128  # tokens that are not timed (the step is recorded meanwhile), and that are
FILL = 8192  # random keys written at a time
CHECKED, CHECKED_STEPS, CHECKED_LAYERS = 160, 8, 4  # tokens in all, of which the last are decoded one by one
SLACK = 1.5  # how much farther from the fp32 model than the plain bf16 one


def model(checkpoint: Path) -> Iterator[Record]:
    """Loading; whether the model computes what it should; decoding and reading prompts."""
    torch.zeros(1, device=DEVICE)  # the context of the device is none of the loader's memory
    for cold in (True, False):
        if cold:
            forget(checkpoint)
        before = memory_bytes()
        began = time.perf_counter()
        ours = GptOss.from_checkpoint(checkpoint, device=DEVICE)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        sizes = [tensor.nbytes for tensor in ours.state_dict().values()]
        yield {
            "case": "load",
            "cold": cold,
            "seconds": seconds,
            "bytes": sum(sizes),
            "largest_tensor": max(sizes),
            "resident_before": before[0],
            "peak_resident": memory_bytes()[1],
            "device_bytes": torch.cuda.max_memory_allocated(),
        }
        if cold:
            del ours
            torch.cuda.empty_cache()
    for packed, lengths in ((False, DECODE), (True, PACKED)):
        record = check(ours, packed)
        yield record
        torch.cuda.empty_cache()
        for rows, length in lengths:
            yield guarded(ours, rows, length, packed, record.get("failed"))
        for length in PREFILL if not packed else ():
            yield prompt(ours, length, record.get("failed"))


def warm(part: str) -> Iterator[Record]:
    """A part of the same calls on a model of two layers in memory, so that kernels are compiled when they are timed."""
    config = replace(GptOssConfig.gpt_oss_20b(), num_hidden_layers=2, layer_types=None)
    with torch.device(DEVICE):
        small = GptOss(config, experts="mxfp4", dtype=torch.bfloat16).eval()
    if part == "prompts":
        for length in PREFILL:
            yield prompt(small, length, None)
        yield guarded(small, *DECODE[-1], False, None)
        return
    yield check(small, part == "packed")
    for rows, length in PACKED if part == "packed" else DECODE:
        yield guarded(small, rows, length, part == "packed", None)


def forget(directory: Path) -> None:
    """Take the files of a directory out of the system's memory, so that they are read from the disk."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- is it right? ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def check(ours: GptOss, packed: bool) -> Record:
    """The last logits of a short stream beside the same weights in fp32, where plain bf16 operations are measured too.

    The fast model may be `SLACK` times as far off. For this it is cut down to its first layers, which hold every kind,
    because the plain operations are slow. Then the whole model generates, and its recorded decode step must choose
    what the step that is launched from Python chooses.
    """
    tokens = torch.randint(ours.vocab_size, (1, CHECKED), generator=torch.Generator().manual_seed(1))
    short = first_layers(ours, CHECKED_LAYERS)
    with use_impl("reference"):
        plain = streamed(short, tokens, packed=packed)
        truth = streamed(copy.deepcopy(short).float(), tokens, packed=False).double()
    error, plain_error = distance(streamed(short, tokens, packed=packed), truth), distance(plain, truth)
    same = agreeing(ours, tokens[0].tolist(), packed=packed)
    record = {"case": "check", "packed": packed, "error": error, "plain_error": plain_error, "same_tokens": same}
    if not error <= SLACK * plain_error:
        return record | {"failed": f"logits off by {error:.3g}, those of plain operations by {plain_error:.3g}"}
    if same < STEPS:
        return record | {"failed": f"generated token {same} is another than without the recorded step"}
    return record


def first_layers(of: GptOss, count: int) -> GptOss:
    """The model without its later layers; it shares the weights."""
    short = copy.copy(of)
    short._modules = of._modules.copy()
    short.layers = of.layers[:count]
    return short


def streamed(of: GptOss, tokens: Tensor, *, packed: bool) -> Tensor:
    """Logits `[steps, V]` of the last tokens, read one by one after a prompt of all others."""
    cache = of.init_cache(1, max_length=CHECKED, packed=packed)
    head = CHECKED - CHECKED_STEPS
    out = [of.forward_logits(tokens[:, :head], cache)]
    out += [of.forward_logits(tokens[:, t : t + 1], cache) for t in range(head, CHECKED)]
    return torch.cat(out)


def agreeing(of: GptOss, prompt: Sequence[int], *, packed: bool) -> int:
    """How many of `STEPS` generated tokens, past a turn of the windows, are among the likeliest by plain calls too."""

    def cache() -> CacheManager:
        return of.init_cache(1, max_length=len(prompt) + STEPS, packed=packed)

    config = GenerationConfig(max_new_tokens=STEPS)
    made = [event.token for event in generate(of, [list(prompt)], config=config, cache=cache())]
    again, given = cache(), list(prompt)
    for n, token in enumerate(made):
        logits = of.forward_logits(torch.tensor([given]), again)[0]
        if logits[token] < logits.max():  # several may be equally likely
            return n
        given = [token]
    return len(made)


# --- how fast is it? -------------------------------------------------------------------------------------------------


def guarded(of: GptOss, rows: int, length: int, packed: bool, problem: str | None) -> Record:
    """`decode`, or why there is no figure."""
    record = {"case": "decode", "batch": rows, "context": length, "packed": packed} | decode_costs(
        of, rows, length, packed
    )
    if problem:
        return record | {"failed": problem}
    try:
        return record | decode(of, rows, length, packed)
    except RuntimeError as error:
        return record | {"failed": " ".join(str(error).split())[:200]}


def decode(of: GptOss, rows: int, length: int, packed: bool) -> Record:
    """Seconds a step of `generate` over caches that hold `length` random keys, as its user sees them."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    new = SKIPPED + STEPS
    cache = of.init_cache(rows, max_length=length + new + 1, packed=packed)
    fill(cache, of.config, length)
    events = generate(of, [[17 + row] for row in range(rows)], config=GenerationConfig(max_new_tokens=new), cache=cache)
    times = [time.perf_counter() for event in events if event.row == rows - 1]
    seconds = (times[-1] - times[SKIPPED - 1]) / (len(times) - SKIPPED)
    return {"seconds": seconds, "device_bytes": torch.cuda.max_memory_allocated()}


@torch.no_grad()
def fill(cache: CacheManager, config: GptOssConfig, length: int) -> None:
    """Random keys and values at the positions `0 .. length - 1` of every layer, as if a prompt had been read."""
    generator = torch.Generator(DEVICE).manual_seed(3)
    for start in range(0, length, FILL):
        step = cache.positions(min(FILL, length - start))
        shape = (cache.batch, config.num_key_value_heads, step.length, config.head_dim)
        for layer in cache:
            k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, generator=generator) for _ in range(2))
            layer.update(k, v, step)
        cache.advance(step)


def prompt(of: GptOss, length: int, problem: str | None) -> Record:
    """Seconds from the call of `generate` with a prompt of `length` tokens to its first token; the second time."""
    record = {"case": "prefill", "context": length} | prefill_costs(of, length)
    if problem:
        return record | {"failed": problem}
    tokens = torch.randint(of.vocab_size, (length,), generator=torch.Generator().manual_seed(4)).tolist()
    config = GenerationConfig(max_new_tokens=1)
    try:
        for _ in range(2):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            next(iter(generate(of, [tokens], config=config)))
            seconds = time.perf_counter() - began
    except RuntimeError as error:
        return record | {"failed": " ".join(str(error).split())[:200]}
    peak = torch.cuda.max_memory_allocated()
    return record | {"seconds": seconds, "device_bytes": peak}


# --- what it must cost at least --------------------------------------------------------------------------------------


def weights(of: GptOss) -> tuple[int, int, int, int]:
    """Bytes and values of what every token needs (the embedding aside), and of all experts."""
    experts = [module for module in of.modules() if isinstance(module, Mxfp4Weight)]
    packed = sum(weight.blocks.nbytes + weight.scales.nbytes for weight in experts)
    values = sum(2 * weight.blocks.numel() for weight in experts)
    biases = [layer.mlp.experts for layer in of.layers]
    packed += sum(e.gate_up_bias.nbytes + e.down_bias.nbytes for e in biases)
    total = sum(tensor.nbytes for tensor in of.state_dict().values())
    dense = total - packed - of.embed.weight.nbytes
    return dense, dense // 2, packed, values


def decode_costs(of: GptOss, rows: int, length: int, packed: bool) -> dict[str, int]:
    """Bytes read and FLOP of one step. Of the experts only those count that random choices of `rows` tokens meet."""
    config, (dense, dense_values, experts, expert_values) = of.config, weights(of)
    share = config.experts_per_token / config.num_experts
    keys = sum(min(length, config.sliding_window if kind == SLIDING else length) for kind in config.layer_types or ())
    heads, size = config.num_key_value_heads, config.head_dim
    key_bytes = 2 * heads * (size + 4 if packed else 2 * size)
    met = 1 - (1 - share) ** rows
    attention = 4 * config.num_attention_heads * size * keys
    return {
        "bytes": round(dense + experts * met + rows * keys * key_bytes),
        "flops": round(rows * (2 * dense_values + 2 * expert_values * share + attention)),
    }


def prefill_costs(of: GptOss, length: int) -> dict[str, int]:
    """Bytes read and FLOP of a prompt whose last logits alone are wanted."""
    config, (dense, dense_values, experts, expert_values) = of.config, weights(of)
    share = config.experts_per_token / config.num_experts
    pairs = sum(
        sum(min(t + 1, config.sliding_window if kind == SLIDING else length) for t in range(length))
        for kind in config.layer_types or ()
    )
    linear = 2 * (dense_values - of.head.weight.numel()) + 2 * expert_values * share
    attention = 4 * config.num_attention_heads * config.head_dim * pairs
    return {"bytes": dense + experts, "flops": round(length * linear + attention + 2 * of.head.weight.numel())}


# --- a peer ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def transformers(checkpoint: Path) -> Iterator[Record]:
    """The same sizes in transformers: eager attention (the one with sinks), bf16, random weights, dynamic cache."""
    from transformers import DynamicCache, GptOssForCausalLM
    from transformers import GptOssConfig as PeerConfig

    config = GptOssConfig.from_config(json.loads((checkpoint / "config.json").read_text()))
    settings = config.to_hf()
    settings.pop("architectures")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        peer = GptOssForCausalLM._from_config(PeerConfig(**settings), attn_implementation="eager").eval()
    torch.set_default_dtype(torch.float32)
    for length in PEER_PROMPTS:
        tokens = torch.randint(config.vocab_size, (1, length), device=DEVICE)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            cache = DynamicCache(config=peer.config)
            torch.cuda.synchronize()
            began = time.perf_counter()
            logits = peer(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = int(logits[0, -1].argmax())
            seconds = time.perf_counter() - began
        figures = {"context": length, "engine": "transformers"}
        yield {"case": "prefill", **figures, "seconds": seconds, "device_bytes": torch.cuda.max_memory_allocated()}
        times = [time.perf_counter()]
        for _ in range(12):
            logits = peer(torch.tensor([[token]], device=DEVICE), past_key_values=cache, use_cache=True).logits
            token = int(logits[0, -1].argmax())
            times.append(time.perf_counter())
        seconds = (times[-1] - times[2]) / (len(times) - 3)
        peak = torch.cuda.max_memory_allocated()
        yield {"case": "decode", "batch": 1, "packed": False, **figures, "seconds": seconds, "device_bytes": peak}
        del cache, logits
