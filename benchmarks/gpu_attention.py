"""Attention on a GPU: what is measured, through the public functions, beside PyTorch's own, each held to fp64 first."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_timing import DEVICE, Call, copies, distance, measure
from longburn import Alibi, AttnWindow, BiasTerms, attend
from longburn.kernels.append import quantised

Record = dict[str, Any]

NEAR = 1e-2  # |out - truth| / |truth| of bf16 attention; PyTorch's own kernels come to about 3e-3
KEPT = 4  # sink tokens
LATER = 1000  # positions beyond the cache: its ring has wrapped
SPREAD = 3.0  # of queries: softmax is then far from uniform, and mistakes show
SAMPLED = 64  # queries of a prefill that are compared


class Shape(NamedTuple):
    """B rows, H query heads on K kv heads of size D, S keys."""

    B: int
    H: int
    K: int
    D: int
    S: int

    def __str__(self) -> str:
        return f"{self.B} x {self.H}/{self.K} x {self.D}, {self.S:,}"


DECODE = [
    Shape(1, 64, 8, 64, 8192),
    Shape(1, 64, 8, 64, 131072),
    Shape(8, 64, 8, 64, 32768),
    Shape(32, 64, 8, 64, 8192),
    Shape(1, 32, 8, 128, 131072),
    Shape(16, 32, 8, 128, 8192),
]
FLEX_DECODE = DECODE[:2]


class Inputs(NamedTuple):
    """One call's tensors on the device: queries `[B, H, T, D]`, keys and values `[B, K, S, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class KeyBias:
    """One additive scalar for every key `[1, 1, S]`, in the order of the keys."""

    key: Tensor

    def terms(self, context: object) -> BiasTerms:
        return BiasTerms(key=self.key)


def inputs(shape: Shape, T: int, seed: int) -> Inputs:
    """Random ones."""
    B, H, K, D, S = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    draw = partial(torch.randn, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    return Inputs(SPREAD * draw(B, H, T, D), draw(B, K, S, D), draw(B, K, S, D))


def truth(
    given: Inputs,
    *,
    rows: Tensor | None = None,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    kept: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Attention in fp64, `[B, H, T, D]`, a row of the batch at a time.

    Args:
        rows: the queries to compute; default all.
        seen: `[T, S]`; default all.
        bias: `[H|1, T|1, S]`.
        sinks: `[H]`.
        kept: other queries, and the number of first keys that they look at.
    """
    q, k, v = given
    B, H, _, D = q.shape
    K = k.shape[1]

    def scores(queries: Tensor, b: int) -> Tensor:
        picked = queries[b] if rows is None else queries[b][:, rows]
        grouped = picked.double().reshape(K, -1, D)
        return (grouped @ k[b].double().mT).view(H, -1, k.shape[2]) / math.sqrt(D)

    out = []
    for b in range(B):
        s = scores(q, b)
        if kept is not None:
            s[:, :, : kept[1]] = scores(kept[0], b)[:, :, : kept[1]]
        if bias is not None:
            s += bias
        if seen is not None:
            s.masked_fill_(~seen, -math.inf)
        if sinks is not None:
            s = torch.cat([s, sinks.double()[:, None, None].expand(H, s.shape[1], 1)], -1)
        weights = s.softmax(-1)[:, :, : k.shape[2]]
        out.append((weights.reshape(K, -1, k.shape[2]) @ v[b].double()).view(H, -1, D))
    return torch.stack(out)


def compare(
    case: str, engine: str, calls: Sequence[Call], wanted: Tensor, *, rows: Tensor | None = None, **figures: Any
) -> Record:
    """The time of `calls`, if the first gives what is wanted (at the queries `rows`); else why there is none."""
    record: Record = {"case": case, "engine": engine, **figures}
    try:
        out = calls[0]()
        assert isinstance(out, Tensor)
        record["error"] = distance(out if rows is None else out[:, :, rows], wanted)
        if record["error"] > NEAR:
            return record | {"failed": f"off by {record['error']:.2g}, allowed {NEAR:g}"}
        timing = measure(calls)
    except Exception as error:  # a peer that cannot, or a kernel that fails, must not take the others' figures along
        return record | {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return record | {"seconds": timing.seconds, "how": timing.how}


def sdpa(backend: SDPBackend, given: Inputs, **options: Any) -> Tensor:
    """PyTorch's fused attention through one backend and no other."""
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(*given, enable_gqa=given.q.shape[1] != given.k.shape[1], **options)


PEERS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION}


def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention as its documentation calls it."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


# --- one new token over a cache --------------------------------------------------------------------------------------


def decode() -> Iterator[Record]:
    """Windowed layers; then every shape plain, with all features, and in fp8; peers plain."""
    yield from _windows()
    for shape in DECODE:
        yield from _decode_shape(shape)
        torch.cuda.empty_cache()


def _decode_shape(shape: Shape) -> Iterator[Record]:
    B, H, K, D, S = shape
    nbytes = 2 * 2 * B * K * S * D
    sets = [inputs(shape, 1, seed) for seed in range(copies(nbytes))]
    q_pos, k_pos = torch.tensor([[S - 1]], device=DEVICE), torch.arange(S, device=DEVICE)[None]
    flops = 4 * B * H * S * D
    figures = {"bytes": nbytes, "flops": flops}
    plain = truth(sets[0])

    calls = [partial(attend, *given, q_pos=q_pos, k_pos=k_pos, ascending=True) for given in sets]
    yield compare(str(shape), "longburn", calls, plain, **figures)
    for name, backend in PEERS.items():
        yield compare(str(shape), name, [partial(sdpa, backend, given) for given in sets], plain, **figures)

    generator = torch.Generator(DEVICE).manual_seed(99)
    q_sinks = [SPREAD * torch.randn(given.q.shape, device=DEVICE, generator=generator).bfloat16() for given in sets]
    bias = torch.randn(1, 1, S, device=DEVICE, generator=generator)
    sinks = 3 * torch.randn(H, device=DEVICE, generator=generator)
    ring = S - KEPT
    p = S + LATER
    held = torch.arange(p - ring + 1, p + 1, device=DEVICE)
    wrapped = torch.arange(S, device=DEVICE)[None].clone()
    wrapped[0, KEPT + (held - KEPT) % ring] = held
    options = {
        "q_pos": torch.tensor([[p]], device=DEVICE),
        "k_pos": wrapped,
        "window": AttnWindow(ring, sink_tokens=KEPT, relative_sinks=True),
        "bias": KeyBias(bias),
        "sinks": sinks,
        "ascending": True,
    }
    calls = [partial(attend, *given, q_sink=second, **options) for given, second in zip(sets, q_sinks, strict=True)]
    wanted = truth(sets[0], bias=bias, sinks=sinks, kept=(q_sinks[0], KEPT))
    more = {"bytes": nbytes + 4 * S, "flops": flops}
    yield compare(str(shape), "longburn, all features", calls, wanted, **more)
    del q_sinks, calls, wanted

    half = [_in_fp8(given) for given in sets * 2]  # half the bytes, twice the copies
    calls = [partial(attend, *given, scales=s, q_pos=q_pos, k_pos=k_pos, ascending=True) for given, s in half]
    given, scales = half[0]
    values = (x.double() * s[..., None] for x, s in zip(given[1:], scales, strict=True))
    packed = {"bytes": nbytes // 2 + 2 * 4 * B * K * S, "flops": flops}
    yield compare(str(shape), "longburn, fp8 cache", calls, truth(Inputs(given.q, *values)), **packed)


def _in_fp8(given: Inputs) -> tuple[Inputs, tuple[Tensor, Tensor]]:
    (k, k_scale), (v, v_scale) = quantised(given.k), quantised(given.v)
    return Inputs(given.q, k, v), (k_scale, v_scale)


def _windows() -> Iterator[Record]:
    """A layer with a window of 128 far into a stream: over its ring, and over keys that lie in order."""
    window, H, K, D = 128, 64, 8, 64
    sinks = 3 * torch.randn(H, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(5))
    for context in (8192, 131072):
        shape = Shape(1, H, K, D, window)
        figures = {"bytes": 2 * 2 * K * window * D, "flops": 4 * H * window * D}
        sets = [inputs(shape, 1, seed) for seed in range(copies(figures["bytes"]))]
        held = torch.arange(context - window, context, device=DEVICE)
        k_pos = torch.empty(1, window, dtype=torch.int64, device=DEVICE)
        k_pos[0, held % window] = held
        options = {"window": AttnWindow(window), "sinks": sinks, "q_pos": held[None, -1:]}
        calls = [partial(attend, *given, k_pos=k_pos, ascending=True, **options) for given in sets]
        wanted = truth(sets[0], sinks=sinks)
        yield compare(f"window 128 at {context:,}, ring", "longburn", calls, wanted, **figures)

        far = Shape(1, H, K, D, context)
        sets = [inputs(far, 1, seed) for seed in range(copies(4 * K * context * D))]
        calls = [partial(attend, *given, window=AttnWindow(window), sinks=sinks) for given in sets]
        last = Inputs(sets[0].q, *(x[:, :, -window:] for x in sets[0][1:]))
        wanted = truth(last, sinks=sinks)
        yield compare(f"window 128 at {context:,}, in order", "longburn", calls, wanted, **figures)
        del sets, calls
        torch.cuda.empty_cache()


# --- many new tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefill:
    """H query heads on K kv heads of size D, T queries at the end of S keys."""

    name: str
    H: int
    K: int
    D: int
    T: int
    S: int
    window: AttnWindow
    sinks: bool = False
    alibi: bool = False
    peers: bool = False  # whether SDPA can compute it, but for the sinks
    flex: bool = False

    def seen(self, rows: Tensor) -> Tensor:
        """`[len(rows), S]`: the keys that these queries see."""
        p, j = rows[:, None] + self.S - self.T, torch.arange(self.S, device=rows.device)
        seen = torch.ones(len(rows), self.S, dtype=torch.bool, device=rows.device)
        if self.window.lookahead is not None:
            seen &= j <= p
        if self.window.size is not None:
            seen &= p - j < self.window.size
        return seen

    @property
    def flops(self) -> int:
        """Of the pairs that are seen."""
        if self.window.lookahead is None:
            pairs = self.T * self.S
        else:
            past, most = self.S - self.T, self.window.size or self.S
            pairs = sum(min(past + t + 1, most) for t in range(self.T))
        return 4 * self.H * self.D * pairs


CAUSAL = AttnWindow()
PREFILL = [
    Prefill("64/8 x 64, 8k, sinks", 64, 8, 64, 8192, 8192, CAUSAL, sinks=True, peers=True, flex=True),
    Prefill("64/8 x 64, 32k, sinks", 64, 8, 64, 32768, 32768, CAUSAL, sinks=True, peers=True),
    Prefill("32/8 x 128, 16k, sinks", 32, 8, 128, 16384, 16384, CAUSAL, sinks=True, peers=True),
    Prefill("64/8 x 64, 4k more at 32k, sinks", 64, 8, 64, 4096, 32768, CAUSAL, sinks=True),
    Prefill("64/8 x 64, 32k, window 128, sinks", 64, 8, 64, 32768, 32768, AttnWindow(128), sinks=True, flex=True),
    Prefill("64/8 x 64, 8k, ALiBi", 64, 8, 64, 8192, 8192, CAUSAL, alibi=True, flex=True),
    Prefill("12 x 128, 2640 of 5280, no mask", 12, 12, 128, 2640, 5280, AttnWindow(lookahead=None), peers=True),
]


def prefill() -> Iterator[Record]:
    """Every case, and PyTorch's kernels where they can compute it but for the sinks."""
    for case in PREFILL:
        sets = _prefill_inputs(case)
        sinks, rows, wanted, figures = _prefill_truth(case, sets[0])
        bias = Alibi(case.H, slopes=_slopes(case.H)) if case.alibi else None
        calls = [partial(attend, *given, window=case.window, sinks=sinks, bias=bias) for given in sets]
        yield compare(case.name, "longburn", calls, wanted, rows=rows, **figures)
        if case.peers:
            plain = truth(sets[0], rows=rows, seen=case.seen(rows))
            causal = case.window.lookahead is not None
            for name, backend in PEERS.items():
                calls = [partial(sdpa, backend, given, is_causal=causal) for given in sets]
                engine = f"{name}, no sinks" if case.sinks else name
                yield compare(case.name, engine, calls, plain, rows=rows, **figures)
        del sets, calls, wanted
        torch.cuda.empty_cache()


def _prefill_inputs(case: Prefill) -> list[Inputs]:
    return [inputs(Shape(1, case.H, case.K, case.D, case.S), case.T, seed) for seed in range(2)]


def _prefill_truth(case: Prefill, given: Inputs) -> tuple[Tensor | None, Tensor, Tensor, dict[str, int]]:
    """Sinks, the queries to compare, what they give, and what the call costs at least."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    sinks = 3 * torch.randn(case.H, device=DEVICE, generator=generator) if case.sinks else None
    ends = torch.tensor([0, 1, case.T - 1], device=DEVICE)
    rows = torch.cat([ends, torch.randint(case.T, (SAMPLED - 3,), device=DEVICE, generator=generator)])
    bias = None
    if case.alibi:
        distance = (rows[:, None] + case.S - case.T - torch.arange(case.S, device=DEVICE)).abs()
        bias = -_slopes(case.H).double()[:, None, None] * distance
    wanted = truth(given, rows=rows, seen=case.seen(rows), bias=bias, sinks=sinks)
    nbytes = sum(x.nbytes for x in given) + given.q.nbytes
    return sinks, rows, wanted, {"bytes": nbytes, "flops": case.flops}


def _slopes(heads: int) -> Tensor:
    """ALiBi's, for a power of two of heads: 2^(-8 i / heads), i from 1."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=DEVICE) / heads)


# --- FlexAttention, whose compiler takes many seconds for each kind of call ------------------------------------------


def flex() -> Iterator[Record]:
    """The shortest decode, prompts, and longer decodes."""
    compute = compiled_flex()
    yield _decode_flex(FLEX_DECODE[0], compute)
    for case in PREFILL:
        if case.flex:
            yield _prefill_flex(case, compute)
            torch.cuda.empty_cache()
    for shape in FLEX_DECODE[1:]:
        yield _decode_flex(shape, compute)


def _decode_flex(shape: Shape, compute: Callable[..., Tensor]) -> Record:
    B, H, K, D, S = shape
    nbytes = 2 * 2 * B * K * S * D
    figures = {"bytes": nbytes, "flops": 4 * B * H * S * D}
    sets = [inputs(shape, 1, seed) for seed in range(copies(nbytes))]
    calls = [partial(compute, *given, enable_gqa=True) for given in sets]
    return compare(str(shape), "Flex", calls, truth(sets[0]), **figures)


def _prefill_flex(case: Prefill, compute: Callable[..., Any]) -> Record:
    """Sinks through its log-sum-exp, as its users do."""
    from torch.nn.attention.flex_attention import create_block_mask

    sets = _prefill_inputs(case)
    sinks, rows, wanted, figures = _prefill_truth(case, sets[0])
    past, size, slopes = case.S - case.T, case.window.size, _slopes(case.H)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i + past
        return seen if size is None else seen & (i + past - j < size)

    def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i + past - j)

    blocks = create_block_mask(mask, None, None, case.T, case.S, device=DEVICE, _compile=True)
    options = {"block_mask": blocks, "enable_gqa": True, "score_mod": alibi if case.alibi else None}

    def call(given: Inputs) -> Tensor:
        if sinks is None:
            return compute(*given, **options)
        out, lse = compute(*given, return_lse=True, **options)
        return out * torch.sigmoid(lse - sinks[:, None]).unsqueeze(-1).to(out.dtype)

    return compare(case.name, "Flex", [partial(call, given) for given in sets], wanted, rows=rows, **figures)
