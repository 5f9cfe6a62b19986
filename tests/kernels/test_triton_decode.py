"""Decode attention in Triton against the dense answer in fp64: in the interpreter, and on a GPU where there is one."""

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from dense import Case, after, call_of, crossed, dense, grid, inputs, ragged, ring, scattered
from torch import Tensor

from longburn.kernels.attend import AttendCall, BiasTerms
from longburn.kernels.attend.call import bias_matrix, joined, visible
from longburn.kernels.attend.reference import attend_reference

pytest.importorskip("triton")
from longburn.kernels.triton import decode as module
from longburn.kernels.triton.decode import decode, decode_why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
HALF = (torch.bfloat16, torch.float16)

FEW = [case for case in grid() if case.queries <= module.MAX_QUERIES]
LONG = [  # several splits, merged
    Case("long", after(700, 1, unwritten=40), D=64),
    Case("long_rows", ragged([(600, 2, 0), (0, 3, 1), (130, 0, 0)], 4, 640), B=3, H=6, K=2, sinks=(-9, 9)),
    Case("long_ring", ring(5000, 3, 500, 4, 6), window=500, sink_tokens=4, sinks=(-9, 9), q_sink=True, bias="key"),
    Case("long_scattered", scattered(2, 5, 600, seed=9), H=9, K=3, window=300, sink_tokens=40, bias="all"),
    Case("window_of_a_long_cache", after(1000, 2), window=7, sink_tokens=3, sinks=(-9, 9), q_sink=True),
    Case("more_rows_than_a_tile", after(150, 16), H=12, K=1, window=90, sink_tokens=3, q_sink=True),
]
SPLIT = [  # the same for the interpreter
    Case("splits_merged_one_after_the_other", after(400, 1, unwritten=40), B=1, D=256, H=4),
    Case("rows_of_two_splits", ragged([(290, 2, 0), (0, 3, 1), (130, 0, 0)], 4, 320), B=3, H=3, K=1, sinks=(-9, 9)),
    Case("ring_of_two_splits", ring(5000, 3, 280, 4, 6), H=2, K=1, window=280, sink_tokens=4, q_sink=True, bias="key"),
    Case("scattered_splits", scattered(2, 5, 300, seed=9), H=3, K=1, window=150, sink_tokens=40, bias="all"),
    Case("window_of_a_cache", after(600, 2), H=2, K=1, window=7, sink_tokens=3, sinks=(-9, 9), q_sink=True),
]
SMALL = [
    *(case for case in FEW if case.name in ("sees_nothing", "no_token_at_all", "all_slots_empty", "T_16")),
    *(case for case in FEW if case.name in ("positions_in_the_millions", "a_scale_of_its_own", "sinks_(20.0_30.0)")),
    *crossed(1, 5, heads=((1, 1), (6, 2), (9, 3), (17, 1))),
    *SPLIT,
]


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NaN in all memory that the host hands to the kernel, so that what is not written shows."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        return empty(*size, **options).fill_(NAN)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
    for counters in module._held.values():
        assert not counters.any(), "a call left its counters behind"


def moved(x: Any) -> Any:
    """Tensors, and what holds them, on the device of the tests."""
    if isinstance(x, Tensor):
        return x.to(DEVICE)
    if isinstance(x, BiasTerms):
        return BiasTerms(*map(moved, x))
    return tuple(map(moved, x)) if isinstance(x, tuple) else x


def on_device(call: AttendCall) -> AttendCall:
    return replace(call, **{f.name: moved(getattr(call, f.name)) for f in fields(call) if f.name != "known"})


def computed(call: AttendCall) -> tuple[Tensor, Tensor]:
    assert decode_why_not(call) is None
    out, lse = decode(call)
    assert out.dtype == call.q.dtype
    assert lse.dtype == torch.float32
    return out, lse


def assert_as_good(out: Tensor, low: Tensor, truth: Tensor) -> None:
    """The rule for half precision: as good as PyTorch's own dense answer in that precision."""
    ours, theirs = (out.double() - truth).abs(), (low.double() - truth).abs()
    assert ours.mean() <= 1.1 * theirs.mean() + 1e-6
    assert ours.max() <= 2 * theirs.max() + 1e-5


def check_fp32(case: Case) -> None:
    given = inputs(case).to(torch.float32)
    out, lse = computed(on_device(call_of(case, given)))
    wanted_out, wanted_lse = dense(case, given)
    torch.testing.assert_close(out.cpu().double(), wanted_out, atol=5e-6, rtol=5e-6)
    torch.testing.assert_close(lse.cpu().double(), wanted_lse, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_equals_the_dense_answer(case: Case) -> None:
    check_fp32(case)


@pytest.mark.cuda
@pytest.mark.parametrize("case", [*FEW, *LONG], ids=lambda case: case.name)
def test_equals_the_dense_answer_on_the_gpu(case: Case) -> None:
    check_fp32(case)


@pytest.mark.cuda
@pytest.mark.parametrize("case", [*FEW, *LONG], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(dtype: torch.dtype, case: Case) -> None:
    given = inputs(case).to(dtype)
    out, lse = computed(on_device(call_of(case, given)))
    truth, wanted_lse = dense(case, given)
    assert_as_good(out.cpu(), dense(case, given, dtype)[0], truth)
    torch.testing.assert_close(lse.cpu().double(), wanted_lse, atol=2e-3, rtol=1e-3)


# --- caches ----------------------------------------------------------------------------------------------------------


def cached(
    lengths: list[int],
    *,
    slots: int,
    T: int = 1,
    H: int = 8,
    K: int = 2,
    D: int = 64,
    before: int = 0,
    ahead: int = 0,
    fp8: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **law: Any,
) -> AttendCall:
    """T queries at the end of each row of a cache with room for more, or `ahead` before it; unused slots hold NaN."""
    g = torch.Generator().manual_seed(seed)
    B = len(lengths)
    k, v = (torch.randn(B, K, slots + 1, D, generator=g) for _ in range(2))
    k_pos, q_pos = torch.arange(slots).repeat(B, 1), torch.full((B, T), -1)
    for row, n in enumerate(lengths):
        k_pos[row, n:] = -1
        k[row, :, n:] = v[row, :, n:] = NAN
        q_pos[row] = torch.arange(n - T, n) + before - ahead
    scales = None
    if fp8:
        scales = tuple((x.abs().amax(-1) / 448)[:, :, :slots] for x in (k, v))
        k, v = ((x / (x.abs().amax(-1, keepdim=True) / 448)).to(torch.float8_e4m3fn) for x in (k, v))
    else:
        k, v = k.to(dtype), v.to(dtype)
    kept = tuple(torch.randn(B, K, before, D, generator=g).to(dtype) for _ in range(2)) if before else None
    if before:
        k_pos = torch.cat([torch.arange(before).repeat(B, 1), torch.where(k_pos >= 0, k_pos + before, -1)], 1)
    q, q_sink = (torch.randn(B, T, H, D, generator=g).to(dtype).transpose(1, 2) for _ in range(2))
    return on_device(
        AttendCall(
            q=q,
            k=k[:, :, :slots],
            v=v[:, :, :slots],
            q_pos=q_pos,
            k_pos=k_pos,
            scale=1 / math.sqrt(D),
            q_sink=q_sink if law.get("sink_tokens") else None,
            sinks=3 * torch.randn(H, generator=g),
            bias=BiasTerms(key=torch.randn(B, 1, slots + before, generator=g)),
            ascending=True,
            before=kept,
            scales=scales,
            **law,
        )
    )


def truth_of(call: AttendCall) -> tuple[Tensor, Tensor]:
    """The reference in fp64, from the numbers that fp8 stands for."""
    k, v = call.k, call.v
    if call.scales is not None:
        k, v = (x.double() * scale.double().unsqueeze(-1) for x, scale in zip((k, v), call.scales, strict=True))
    if call.before is not None:
        k, v = (torch.cat([old.double(), x.double()], 2) for old, x in zip(call.before, (k, v), strict=True))
    q_sink = None if call.q_sink is None else call.q_sink.double()
    q, k, v = call.q.double(), k.double(), v.double()
    return attend_reference(replace(call, q=q, k=k, v=v, q_sink=q_sink, before=None, scales=None, ascending=False))


def low_precision(call: AttendCall) -> Tensor:
    """PyTorch's dense answer with every step in the type of q."""
    call = joined(call)
    filled = (call.k_pos >= 0)[:, None, :, None]
    k, v = (torch.where(filled, x, 0).repeat_interleave(call.groups, 1) for x in (call.k, call.v))
    scores = (call.q @ k.mT) * call.scale
    if call.q_sink is not None:
        is_kept = (call.k_pos < call.sink_tokens)[:, None, None, :]
        scores = torch.where(is_kept, (call.q_sink @ k.mT) * call.scale, scores)
    bias = bias_matrix(call)
    assert bias is not None
    assert call.sinks is not None
    scores = (scores + bias.to(scores.dtype)).masked_fill(~visible(call), -math.inf)
    column = call.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.softmax(torch.cat([scores, column], -1), -1)
    return weights[..., :-1] @ v


CACHES: dict[str, dict[str, Any]] = {
    "plain": {"lengths": [331, 20], "slots": 400},
    "few_slots": {"lengths": [9, 2], "slots": 11, "T": 2, "window": 6, "sink_tokens": 1},
    "few_fp8_kept_elsewhere": {"lengths": [9, 7], "slots": 13, "T": 3, "before": 3, "fp8": True, "sink_tokens": 3},
    "kept_elsewhere": {"lengths": [331, 20], "slots": 400, "before": 5, "window": 200, "sink_tokens": 5},
    "much_elsewhere": {"lengths": [150], "slots": 200, "before": 300, "T": 3, "window": 170, "sink_tokens": 4},
    "fp8": {"lengths": [331, 20], "slots": 400, "fp8": True},
    "fp8_kept_elsewhere": {"lengths": [331, 20], "slots": 400, "T": 2, "before": 4, "fp8": True, "sink_tokens": 4},
    "window_of_a_long_cache": {"lengths": [1500, 90], "slots": 1600, "window": 30, "sink_tokens": 2},
    "blocks": {"lengths": [333, 40], "slots": 400, "T": 2, "ahead": 3, "block": 12},
}
ON_GPU = [torch.float32, *HALF] if DEVICE == "cuda" else [torch.float32]


@pytest.mark.parametrize("dtype", ON_GPU, ids=str)
@pytest.mark.parametrize("name", CACHES)
def test_caches(name: str, dtype: torch.dtype) -> None:
    law = CACHES[name]
    if law.get("sink_tokens") and "window" not in law:
        law = law | {"window": 10_000}
    call = cached(**law, dtype=dtype)
    out, lse = computed(call)
    truth, wanted_lse = truth_of(call)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=2e-3, rtol=1e-3)
    if dtype == torch.float32:
        torch.testing.assert_close(out.double(), truth, atol=5e-6, rtol=5e-6)
    else:
        assert_as_good(out, low_precision(call), truth)


@pytest.mark.parametrize("name", ["long_ring", "window_of_a_long_cache"])
def test_the_second_query_where_slots_ascend(name: str) -> None:
    """It is then multiplied with the first slots only."""
    case = next(case for case in LONG if case.name == name)
    given = inputs(case).to(torch.float32)
    out, lse = computed(on_device(replace(call_of(case, given, known=False), ascending=True)))
    wanted, wanted_lse = dense(case, given)
    torch.testing.assert_close(out.cpu().double(), wanted, atol=5e-6, rtol=5e-6)
    torch.testing.assert_close(lse.cpu().double(), wanted_lse, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("bias", ["key", "dense", None])
def test_keys_before_a_known_window_are_not_read(bias: str | None) -> None:
    case = Case("in_order", after(701, 3), window=50, bias=bias, sinks=(-9, 9))
    given = inputs(case).to(torch.float32)
    call = call_of(case, given)
    first = (701 - 50 + 1) // module.ALIGNED * module.ALIGNED
    of_a_cache = replace(call, ascending=True)  # recorded steps, of which the host knows nothing, must read the same
    assert module._nearest(of_a_cache) is of_a_cache
    for x in (call.k, call.v):
        x[:, :, :first] = NAN
    out, _ = computed(on_device(call))
    torch.testing.assert_close(out.cpu().double(), dense(case, inputs(case).to(torch.float32))[0], atol=5e-6, rtol=5e-6)


def without_spare_slots(call: AttendCall, slots: int) -> AttendCall:
    assert call.bias is not None
    assert call.bias.key is not None
    bias = BiasTerms(key=call.bias.key[..., :slots])
    return replace(call, k=call.k[:, :, :slots], v=call.v[:, :, :slots], k_pos=call.k_pos[:, :slots], bias=bias)


@pytest.mark.parametrize(
    ("lengths", "slots"), [([301, 130], 700), pytest.param([701, 130], 2000, marks=pytest.mark.cuda)], ids=str
)
@pytest.mark.parametrize("law", [{}, {"window": 31, "sink_tokens": 2}], ids=["all", "window"])
def test_bits_do_not_depend_on_the_capacity(law: dict[str, Any], lengths: list[int], slots: int) -> None:
    """A graph sees the whole capacity, an eager call what is filled."""
    call = cached(lengths, slots=slots, H=4, K=1, **law)
    out, lse = computed(call)
    for filled in (max(lengths), max(lengths) + 199):
        again, again_lse = computed(without_spare_slots(call, filled))
        assert torch.equal(out, again)
        assert torch.equal(lse, again_lse)


@pytest.mark.parametrize("lengths", [[300, 256, 90], pytest.param([700, 512, 90], marks=pytest.mark.cuda)], ids=str)
@pytest.mark.parametrize("deterministic", [True, False])
def test_bits_of_a_row_and_its_batch_mates(deterministic: bool, lengths: list[int]) -> None:
    """A row's bits depend on no other row; in deterministic mode not on how many there are either."""
    call = cached(lengths, slots=lengths[0] + 20, H=4, K=1)

    def row(call: AttendCall, b: int) -> AttendCall:
        one = slice(b, b + 1)
        assert call.bias is not None
        assert call.bias.key is not None
        bias = BiasTerms(key=call.bias.key[one])
        tensors = {name: getattr(call, name)[one] for name in ("q", "k", "v", "q_pos", "k_pos")}
        return replace(call, **tensors, bias=bias)

    torch.use_deterministic_algorithms(deterministic)
    try:
        together = computed(call)[0]
        other = call.k.clone()
        other[1:] = torch.randn_like(other[1:])
        assert torch.equal(computed(replace(call, k=other))[0][0], together[0])
        if deterministic:
            for b in range(3):
                assert torch.equal(computed(row(call, b))[0][0], together[b])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
def test_a_graph_replays_the_bits_of_eager_calls() -> None:
    """Captured at one position, replayed at others: filled slots, splits and the ragged rows all change."""
    call = cached([40, 40], slots=3000, dtype=torch.bfloat16)
    call.k_pos.copy_(torch.arange(3000))
    k, v = (torch.randn(x.shape, device=DEVICE).to(x.dtype) for x in (call.k, call.v))
    call = replace(call, k=k, v=v)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        decode(call)
        graph = torch.cuda.CUDAGraph()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            out, lse = decode(call)
    for ends in ((40, 40), (3000, 1), (128, 129), (2047, 700), (40, 40)):
        call.q_pos.copy_(torch.tensor(ends)[:, None] - 1)
        graph.replay()
        torch.cuda.synchronize()
        wanted, wanted_lse = decode(without_spare_slots(call, max(ends)))
        assert torch.equal(out, wanted)
        assert torch.equal(lse, wanted_lse)


def test_what_it_refuses() -> None:
    call = cached([30], slots=30)
    assert decode_why_not(call) is None
    q = torch.zeros(1, 8, 17, 64, device=DEVICE)
    assert "up to 16 queries, got 17" in (decode_why_not(replace(call, q=q)) or "")
    assert "float64" in (decode_why_not(replace(call, q=call.q.double())) or "")
    assert "gaps within a head" in (decode_why_not(replace(call, k=call.k.mT.contiguous().mT)) or "")
    assert "gaps between slots" in (decode_why_not(replace(call, k_pos=call.k_pos.mT.repeat(1, 2)[:, :1].mT)) or "")
    assert "gradients" in (decode_why_not(replace(call, q=call.q.clone().requires_grad_())) or "")
    wide = torch.zeros(1, 2, 30, 300, device=DEVICE)
    assert "up to 256, got 300" in (
        decode_why_not(replace(call, q=torch.zeros(1, 8, 1, 300, device=DEVICE), k=wide, v=wide)) or ""
    )


def test_a_small_cache_is_known_by_its_buffer() -> None:
    """A recorded step sees whole buffers, an eager one what is filled: both must cut the keys alike."""
    small, large = torch.zeros(2, 3, 17, 8), torch.zeros(2, 3, 18, 8)
    assert all(module._is_small(small[:, :, :n], 0) for n in (1, 9, 16))
    assert not any(module._is_small(large[:, :, :n], 0) for n in (1, 9, 17))
    assert module._is_small(torch.zeros(1, 1, 12, 8)[:, :, :11], 5)
    assert not module._is_small(torch.zeros(1, 1, 12, 8)[:, :, :11], 6)  # kept elsewhere
    assert not module._is_small(torch.zeros(2, 9, 3, 8).transpose(1, 2), 0)  # heads lie side by side: no cache
    torch.use_deterministic_algorithms(True)
    try:
        assert not module._is_small(small[:, :, :9], 0)
    finally:
        torch.use_deterministic_algorithms(False)
