"""One measurement of one engine, in a process of its own: a job as JSON on stdin, the result as JSON on stdout.

Runs under any interpreter that has the engine; nothing is imported before the job asks for it.
"""

import copy
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Protocol

from memory import memory_bytes

WARM_UP = 512  # tokens of a first pass that is not counted


class Engine(Protocol):
    """A model with its cache. Each call gives the likeliest next token."""

    def start(self) -> None:
        """Empty the cache."""

    def prefill(self, tokens: list[int]) -> int: ...

    def decode(self, token: int) -> int: ...

    def facts(self) -> dict[str, Any]:
        """What else the result says: versions, bytes."""
        ...


class Longburn:
    """This library, called as its `generate` does: the prompt in chunks, a cache as long as the call needs.

    A job with a window keeps that many tokens and 4 sink tokens with relative positions, in a stream without end.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        from longburn.cache import AttnWindow
        from longburn.generation import DecodeStep
        from longburn.generation.loop import CHUNKS
        from longburn.models import load_model

        torch.set_num_threads(job["threads"])
        torch.set_grad_enabled(False)
        window = AttnWindow(job["window"], sink_tokens=4, relative_sinks=True) if "window" in job else None
        self.model = load_model(job["model"], dtype=getattr(torch, job["dtype"]), window=window).model
        self.max_length = None if window else job["context"] + job["decode_tokens"] + 1
        self.chunk_size = CHUNKS["cpu"]
        self.tensor: Any = torch.tensor
        self.cache: Any = None
        self.step: Any = None
        self.new_step: Any = DecodeStep

    def start(self) -> None:
        self.cache = self.step = None  # first, so that there are never two
        self.cache = self.model.init_cache(1, max_length=self.max_length)
        self.step = self.new_step(self.model, self.cache)

    def prefill(self, tokens: list[int]) -> int:
        for start in range(0, len(tokens), self.chunk_size):
            chunk = self.tensor([tokens[start : start + self.chunk_size]])
            logits = self.model.forward_logits(chunk, self.cache)
        return int(logits.argmax())

    def decode(self, token: int) -> int:
        return int(self.step(self.tensor([[token]])).argmax())

    def facts(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {
            "version": version("longburn"),
            "weights_bytes": sum(parameter.nbytes for parameter in self.model.parameters()),
            "cache_bytes": self.cache.nbytes,
        }


class Transformers:
    """Hugging Face transformers: SDPA attention, dynamic cache, the prompt in one call, only its last logits."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(job["threads"])
        torch.set_grad_enabled(False)
        dtype = getattr(torch, job["dtype"])
        model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation="sdpa")
        self.model = model.eval()
        self.new_cache: Any = partial(DynamicCache, config=self.model.config)
        self.tensor: Any = torch.tensor
        self.cache: Any = None

    def start(self) -> None:
        self.cache = None
        self.cache = self.new_cache()

    def prefill(self, tokens: list[int]) -> int:
        out = self.model(self.tensor([tokens]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def decode(self, token: int) -> int:
        return self.prefill([token])

    def facts(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {"version": version("transformers"), "torch": version("torch")}


GGML_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}


class LlamaCpp:
    """llama.cpp through llama-cpp-python: its flash attention off, which on a CPU is the faster way."""

    def __init__(self, job: dict[str, Any]) -> None:
        import numpy
        from llama_cpp import Llama

        kind = GGML_TYPES[job["kv_dtype"]]
        self.llama = Llama(
            job["model"],
            n_ctx=max(job["context"], WARM_UP) + job["decode_tokens"] + 1,
            n_threads=job["threads"],
            n_threads_batch=job["threads"],
            flash_attn=False,
            type_k=kind,
            type_v=kind,
            verbose=False,
        )
        self.as_array = numpy.ctypeslib.as_array

    def start(self) -> None:
        self.llama.reset()

    def prefill(self, tokens: list[int]) -> int:
        self.llama.eval(tokens)
        return int(self.as_array(self.llama._ctx.get_logits(), (self.llama.n_vocab(),)).argmax())

    def decode(self, token: int) -> int:
        return self.prefill([token])

    def facts(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {"version": "llama-cpp-python " + version("llama-cpp-python")}


ENGINES: dict[str, Callable[[dict[str, Any]], Engine]] = {
    "longburn": Longburn,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
}


def generation(job: dict[str, Any]) -> dict[str, Any]:
    """Prefill of `context` random tokens and `decode_tokens` greedy steps after it, each timed."""
    engine = ENGINES[job["engine"]](job)
    tokens = random_tokens(job, job["context"])
    engine.start()
    engine.decode(engine.decode(engine.prefill(tokens[:WARM_UP])))
    engine.start()
    began = time.perf_counter()
    made = [engine.prefill(tokens)]
    prefill_seconds = time.perf_counter() - began
    steps = timed_steps(engine, made, job["decode_tokens"])
    return {
        "prefill_seconds": prefill_seconds,
        "step_seconds": median(steps),
        "tokens": made,
        "peak_bytes": memory_bytes()[1],
        **engine.facts(),
    }


def window(job: dict[str, Any]) -> dict[str, Any]:
    """Decode speed near the start and far along one endless stream, by turns so that the machine's mood is the same."""
    near = Longburn(job)
    far = copy.copy(near)  # the same model, with a cache of its own
    tokens = random_tokens(job, job["far"])
    streams = {"near": (near, job["near"]), "far": (far, job["far"])}
    made = {}
    for name, (engine, position) in streams.items():
        engine.start()
        made[name] = [engine.prefill(tokens[:position])]
    rounds: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(job["turns"]):
        for name, (engine, _) in streams.items():
            rounds[name].append(median(timed_steps(engine, made[name], job["decode_tokens"])))
    return {"step_seconds": rounds, "peak_bytes": memory_bytes()[1], **near.facts()}


def bandwidth(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes a second at which a sum reads a GiB of memory with the same threads, the median of 9 passes.

    Also what a process takes that has only imported torch.
    """
    import torch

    torch_bytes = memory_bytes()[0]
    torch.set_num_threads(job["threads"])
    data = torch.ones(1 << 28)
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - began)
    return {"bytes_per_second": data.nbytes / median(seconds), "torch_bytes": torch_bytes}


def timed_steps(engine: Engine, made: list[int], count: int) -> list[float]:
    """Seconds of each of `count` greedy steps; the tokens are appended to `made`."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        made.append(engine.decode(made[-1]))
        seconds.append(time.perf_counter() - began)
    return seconds


def random_tokens(job: dict[str, Any], count: int) -> list[int]:
    """The same ids in every engine."""
    draw = random.Random(job["seed"])
    return [draw.randrange(job["vocab_size"]) for _ in range(count)]


if __name__ == "__main__":
    request = json.load(sys.stdin)
    measured = {"generation": generation, "window": window, "bandwidth": bandwidth}[request["kind"]](request)
    print(json.dumps(measured))
