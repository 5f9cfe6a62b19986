"""Time on a CUDA device, what it can do at most, and how far a result is from the truth."""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Call = Callable[[], object]

DEVICE = "cuda"
REPLAYS = 15  # timed ones, of which the median counts
ROUND_SECONDS = 1e-3  # a timed replay is at least so long: events resolve about a microsecond
MOST_CALLS = 1024  # in one graph


class Timing(NamedTuple):
    """Seconds of one call, and whether it was replayed from a CUDA graph or launched from Python each time."""

    seconds: float
    how: Literal["graph", "stream"]


def measure(calls: Sequence[Call]) -> Timing:
    """The median time of one of `calls`, which do the same on inputs of their own, in turn.

    They are recorded one after the other into a CUDA graph. What cannot be recorded (it reads from the device, say) is
    launched from Python, which the result says.
    """
    _all(calls)
    try:
        graph, rounds = _recorded(calls, 1), 1
        if (once := _elapsed(graph.replay)) < ROUND_SECONDS:
            rounds = max(1, min(math.ceil(ROUND_SECONDS / max(once, 1e-6)), MOST_CALLS // len(calls)))
            graph = _recorded(calls, rounds)
    except RuntimeError:
        torch.cuda.synchronize()
        return Timing(median(_elapsed(lambda: _all(calls)) for _ in range(REPLAYS)) / len(calls), "stream")
    graph.replay()
    return Timing(median(_elapsed(graph.replay) for _ in range(REPLAYS)) / (rounds * len(calls)), "graph")


def _recorded(calls: Sequence[Call], rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            _all(calls)
    return graph


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _elapsed(work: Call) -> float:
    """Device seconds of what `work` launches."""
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copies(nbytes: int) -> int:
    """How many inputs of so many bytes it takes that none is still in the chip's cache when its turn comes again."""
    cache: int = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(math.ceil(3 * cache / nbytes), MOST_CALLS))


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy (read and written) and of a sum (read), and FLOP a second of a bf16 matrix product."""
    n = 1 << 30
    pairs = [(torch.randn(n, device=DEVICE, dtype=torch.bfloat16), torch.empty(n, device=DEVICE, dtype=torch.bfloat16))]
    pairs.append(pairs[0][::-1])
    copied = measure([lambda a=a, b=b: torch.neg(a, out=b) for a, b in pairs]).seconds  # not by the copy engines
    wide = [x.view(torch.float32) for x, _ in pairs]
    read = measure([lambda x=x: x.sum() for x in wide]).seconds
    del pairs, wide
    size = 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = measure([lambda: a @ b, lambda: b @ a]).seconds
    return {"copy": 4 * n / copied, "read": 2 * n / read, "matmul": 2 * size**3 / product}


def distance(out: Tensor, truth: Tensor) -> float:
    """`|out - truth| / |truth|`; infinite where anything is not a number."""
    value = float((out.double() - truth).norm() / truth.norm())
    return value if math.isfinite(value) else math.inf
