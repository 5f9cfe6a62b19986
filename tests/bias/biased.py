"""A layer with a bias of its own, loops over its formula in fp64, and a stream that does whatever a stream may do."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from longburn import Attention, AttnWindow, CacheManager, use_impl
from longburn.bias import Policy

M, HEADS, KV_HEADS, D = 8, 4, 2, 6
NAN = float("nan")
# Of query head h at position p and key position j, given that query and its key `[D]`: what is added to their score.
Formula = Callable[[int, int, int, np.ndarray, np.ndarray], float]
Making = Callable[[torch.dtype], Policy]  # a policy for M and HEADS
Written = Callable[[Policy, np.ndarray], Formula]  # the formula of a policy over tokens [T, M]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that whoever looks at a slot that nothing was written to shows it."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def build(
    making: Making,
    window: AttnWindow | None = None,
    *,
    sinks: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Attention:
    layer = Attention(
        M,
        HEADS,
        kv_heads=KV_HEADS,
        head_dim=D,
        window=window,
        sinks=sinks,
        qkv_bias=True,
        bias=making(dtype),
        dtype=dtype,
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            size = 3.0 if name == "sinks" else 0.6
            parameter.copy_(size * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return layer


def wanted(layer: Attention, written: Written, x: np.ndarray) -> np.ndarray:
    """The layer's output for tokens `[T, M]` at the positions 0 .. T - 1, one score after the other."""
    assert isinstance(layer.bias, Policy)
    T, window = x.shape[0], layer.window
    projected = x @ numbers(layer.qkv.weight).T + numbers(layer.qkv.bias)
    q, k, v = np.split(projected.reshape(T, -1, D), [HEADS, HEADS + KV_HEADS], 1)  # [T, heads, D]
    formula = written(layer.bias, x)
    heads = np.zeros((T, HEADS, D))
    for p in range(T):
        seen = [j for j in range(p + 1) if window.size is None or p - j < window.size or j < window.sink_tokens]
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            weights = [q[p, h] @ k[j, kv] / np.sqrt(D) + formula(h, p, j, q[p, h], k[j, kv]) for j in seen]
            sink = [] if layer.sinks is None else [float(layer.sinks[h].detach())]
            e = np.exp(np.array(weights + sink) - max(weights + sink))
            heads[p, h] = sum(w * v[j, kv] for w, j in zip(e / e.sum(), seen, strict=False))
    return heads.reshape(T, -1) @ numbers(layer.out.weight).T


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def inputs(rows: int, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, length, M))


def forward(layer: Attention, x: Tensor, cache: CacheManager, ids: Tensor | int, *, commit: bool = True) -> Tensor:
    step = cache.positions(ids)
    with torch.no_grad():
        y = layer(x.to(layer.dtype), step, cache=cache[0])
    if commit:
        cache.advance(step)
    return y


def stream(layer: Attention, x: np.ndarray, chunk: int, **options: bool | int | None) -> np.ndarray:
    """All of x `[B, T, M]` in chunks of one size."""
    cache = CacheManager.for_layers([layer], len(x), **options)
    return np.concatenate([forward(layer, c, cache, c.shape[1]).numpy() for c in torch.tensor(x).split(chunk, 1)], 1)


def chunks(window: int | None) -> list[int]:
    w = window or 9
    return sorted({1, 2, 3, 13, max(1, w - 1), w, w + 1, 2 * w + 1, 41})


# --- everything that a stream may do ---------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    window = draw(st.sampled_from([None, 1, 7]))
    rows = draw(st.integers(1, 3))
    reach = window or 5
    sizes = st.sampled_from([1, 1, 2, 3, 11, max(1, reach - 1), reach, reach + 1, 2 * reach + 1])
    turn = st.one_of(
        st.tuples(st.just("chunk"), st.lists(sizes, min_size=rows, max_size=rows)),
        st.tuples(st.just("same"), sizes),
        st.tuples(st.just("draft"), sizes),
        st.tuples(st.just("pause"), st.integers(0, rows - 1)),
        st.tuples(st.just("rewind"), st.integers(1, 6)),
        st.tuples(st.just("reset"), st.integers(0, rows - 1)),
    )
    return {
        "window": AttnWindow(window, sink_tokens=draw(st.sampled_from([0, 1, 3])) if window else 0),
        "rows": rows,
        "slack": draw(st.sampled_from([0, 1, 5])),
        "max_length": draw(st.sampled_from([None, None, 120])),
        "sinks": draw(st.booleans()),
        "left": draw(st.booleans()),
        "padding": draw(st.sampled_from([0, 0, 2])),
        "turns": draw(st.lists(turn, min_size=3, max_size=9)),
        "impl": draw(st.sampled_from(["auto", "auto", "reference"])),
        "seed": draw(st.integers(0, 2**20)),
    }


class Stream:
    """Rows of tokens on their way through a layer, with what came out for each."""

    def __init__(self, layer: Attention, case: dict[str, object]) -> None:
        self.layer, self.rows, self.left = layer, int(str(case["rows"])), bool(case["left"])
        self.padding = int(str(case["padding"]))
        options = {name: case[name] for name in ("slack", "max_length")}
        self.cache = CacheManager.for_layers([layer], self.rows, **options)  # type: ignore[arg-type]
        self.tokens: list[list[np.ndarray]] = [[] for _ in range(self.rows)]
        self.got: list[list[np.ndarray]] = [[] for _ in range(self.rows)]
        self.finished: list[tuple[np.ndarray, np.ndarray]] = []
        self.random = np.random.default_rng(int(str(case["seed"])))

    def turn(self, what: str, how: object) -> None:
        if what == "chunk":
            assert isinstance(how, list)
            self.chunk(how)
        elif what == "pause":
            self.chunk([0 if row == how else 2 for row in range(self.rows)])
        elif what in ("same", "draft"):
            assert isinstance(how, int)
            self.chunk([how] * self.rows, draft=what == "draft")
        elif what == "rewind":
            assert isinstance(how, int)
            at = self.cache.row_positions
            back = [min(how, n - self.cache[0].earliest_restart(b)) for b, n in enumerate(at)]
            self.cache.rewind(back)
            for b, n in enumerate(at):
                del self.tokens[b][n - back[b] :], self.got[b][n - back[b] :]
        else:
            assert isinstance(how, int)
            self.finish(how)
            self.cache.reset([how])

    def chunk(self, sizes: Sequence[int], *, draft: bool = False) -> None:
        sizes = [min(n, 45 - at) for n, at in zip(sizes, self.cache.row_positions, strict=True)]
        if max(sizes) == 0:
            return
        width = max(sizes) + self.padding
        cache = self.cache[0]
        if draft and (cache.ring is None or width <= cache.slack + 1):
            for _ in range(2):
                self.call(sizes, width, commit=False)
        x, y = self.call(sizes, width, commit=True)
        for b, n in enumerate(sizes):
            own = slice(width - n, width) if self.left else slice(0, n)
            self.tokens[b] += list(x[b, own])
            self.got[b] += list(y[b, own])

    def call(self, sizes: Sequence[int], width: int, *, commit: bool) -> tuple[np.ndarray, np.ndarray]:
        x, ids = np.full((self.rows, width, M), NAN), torch.full((self.rows, width), -1)
        for b, n in enumerate(sizes):
            own = slice(width - n, width) if self.left else slice(0, n)
            x[b, own], ids[b, own] = self.random.normal(size=(n, M)), 0
        same = set(sizes) == {width}
        y = forward(self.layer, torch.tensor(x), self.cache, width if same else ids, commit=commit)
        return x, y.double().numpy()

    def finish(self, row: int) -> None:
        if self.tokens[row]:
            self.finished.append((np.array(self.tokens[row]), np.array(self.got[row])))
        self.tokens[row], self.got[row] = [], []


def check(case: dict[str, object], making: Making, written: Written, tolerance: float = 1e-10) -> None:
    window, turns = case["window"], case["turns"]
    assert isinstance(window, AttnWindow)
    assert isinstance(turns, list)
    layer = build(making, window, sinks=bool(case["sinks"]), seed=int(str(case["seed"])))
    with poisoned_memory(), use_impl(str(case["impl"])):
        rows = Stream(layer, case)
        for what, how in turns:
            rows.turn(what, how)
    for row in range(rows.rows):
        rows.finish(row)
    for x, got in rows.finished:
        np.testing.assert_allclose(got, wanted(layer, written, x), atol=tolerance, rtol=0)


def check_any_chunks(making: Making, written: Written, window: AttnWindow, *, sinks: bool) -> None:
    """The whole at once and in every cut, against the formula; packed, every cut against token by token."""
    layer, x = build(making, window, sinks=sinks), inputs(2, 41)
    answers = np.stack([wanted(layer, written, row) for row in x])
    np.testing.assert_allclose(layer(torch.tensor(x)).detach().numpy(), answers, atol=1e-11, rtol=0)
    one = stream(layer, x, 1, packed=True)
    for chunk in chunks(window.size):
        np.testing.assert_allclose(stream(layer, x, chunk), answers, atol=1e-11, rtol=0)
        np.testing.assert_allclose(stream(layer, x, chunk, packed=True), one, atol=1e-10, rtol=0)
