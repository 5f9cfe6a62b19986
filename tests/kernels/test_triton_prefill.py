"""Attention of many queries in Triton: on a GPU, and in Triton's interpreter where there is none."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from accuracy import assert_as_accurate
from covering import every_pair
from dense import (
    Case,
    Inputs,
    after,
    call_of,
    crossed,
    dense,
    from_zero,
    grid,
    inputs,
    past_window,
    ragged,
    ring,
    scattered,
    visible,
)
from torch import Tensor

from longburn import AttnWindow, ImplError, attend, use_impl
from longburn.kernels import triton as triton_kernels
from longburn.kernels.attend import IMPLS, AttendCall, AttendResult, BiasTerms, run

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# conftest.py sees to it; without it every test here would be skipped and look green.
assert ON_GPU or triton_kernels.interprets(), "Triton was imported before TRITON_INTERPRET=1 was set"

from longburn.kernels.triton import arguments, ranges  # noqa: E402
from longburn.kernels.triton import prefill as prefill_module  # noqa: E402
from longburn.kernels.triton.prefill import prefill  # noqa: E402
from longburn.kernels.triton.ranges import known_ranges  # noqa: E402

SMALL = {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 2}  # several tiles even of the interpreter's small calls
LAW = {"window": 7, "sink_tokens": 3}
ODD_CASES = [
    Case("one_key", from_zero(1)),
    Case("scale", after(5, 11), scale=0.7),
    Case("sinks_far_up", after(10, 17), sinks=(20, 30)),
    Case("bias_all_known", after(20, 17), bias="all", sinks=(0, 1)),
    Case("left_only", from_zero(33), window=14, lookahead=None),
    Case("sees_nothing", replace(after(0, 3), q=((5, 0, -1),), k=((6, 7, -1, 8, 9),), known=None), sinks=(0, 1)),
    Case("no_token", replace(after(0, 3), q=((-1, -1),), k=((0, 1, 2),), known=None)),
    Case("millions", ring(10_000_019, 3, 8, 4, 2), window=8, sink_tokens=4, bias="slope"),
    Case("whole_tiles_up_to_empty_slots", after(29, 19, unwritten=3), D=40, H=1, K=1, lookahead=None),
    Case("whole_tiles_within_a_band", after(60, 20), H=2, K=1, window=50, sink_tokens=18),
]
SMALL_CASES = [
    *ODD_CASES,
    *(Case(f"head_size_{D}", after(24, 13), D=D) for D in (40, 64, 80)),
    *(Case(f"H_{H}_K_{K}", after(8, 19), H=H, K=K) for H, K in ((1, 1), (6, 2), (6, 1), (9, 3))),
    Case("three_tiles_after_a_past", after(57, 41, unwritten=5), H=2, K=1),
    Case("band", from_zero(90), H=2, K=1, **LAW),
    Case("band_past_it", past_window(161, 40, 19, 4), H=2, K=1, window=19, sink_tokens=4),
    Case("band_wider_than_tiles", from_zero(110), H=2, K=1, window=70, sink_tokens=3),
    Case("ring", ring(161, 3, 37, 2, 2), window=37, sink_tokens=2),
    Case("ring_of_many_tiles", ring(261, 40, 90, 3, 41), H=2, K=1, window=90, sink_tokens=3),
    Case("ragged", ragged([(20, 3, 0), (0, 5, 2), (9, 0, 0)], 7, 30), B=3, **LAW),
    Case("ragged_without_window", ragged([(20, 23, 0), (0, 15, 9), (3, 20, 4)], 24, 47), B=3, sinks=(-1, 1)),
    Case("not_known", scattered(2, 19, 71, seed=1), **LAW),
    Case("sinks", after(10, 27), sinks=(-2, 2)),
    Case("sinks_far_down", scattered(2, 9, 31, seed=5), sinks=(-30, -20)),
    *(Case(f"bias_{bias}", after(20, 17), bias=bias) for bias in ("slope", "key", "row", "table", "dense")),
    Case("bias_all_not_known", scattered(2, 19, 41, seed=6), bias="all", sinks=(0, 1), window=12),
    Case("no_mask", after(4, 39), lookahead=None),
    Case("two_sided", from_zero(53), window=14, lookahead=15),
    Case("blocks_of_4", from_zero(53), block=4),
    Case("blocks_of_24_not_known", scattered(2, 19, 71, seed=2), block=24, window=20, sink_tokens=2, sinks=(0, 1)),
    Case("relative", past_window(161, 40, 19, 4), window=19, sink_tokens=4, q_sink=True, sinks=(0, 1)),
    Case("relative_ring", ring(61, 3, 30, 2, 2), window=30, sink_tokens=2, q_sink=True),
    Case("relative_not_known", scattered(2, 19, 71, seed=7), q_sink=True, **LAW),
]
LARGE_CASES = [case for case in grid() if case.slots < 2000]
HALF = [torch.bfloat16, torch.float16]
HALF_CASES = [
    *(Case(f"head_size_{D}", after(300, 137), D=D) for D in (32, 64, 80, 96, 128, 256)),
    Case("band", from_zero(500), window=65, sink_tokens=4, sinks=(-1, 3), D=64),
    Case("band_not_known", scattered(2, 200, 400, seed=3), window=165, sinks=(-1, 3), D=128),
    Case("relative", ring(900, 130, 300, 4, 130), window=300, sink_tokens=4, q_sink=True, sinks=(-1, 3), D=64),
    *(Case(f"bias_{bias}", after(200, 99), bias=bias, D=64) for bias in ("slope", "key", "table", "dense")),
    Case("bias_all_head_size_128", after(200, 99), bias="all", sinks=(0, 1), D=128),
    Case("bias_all_head_size_256", after(200, 99), bias="all", sinks=(0, 1), D=256),
    Case("full", after(200, 137), lookahead=None, D=128),
]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """PyTorch fills memory that nothing was written to with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_module, "_tile", lambda call: SMALL)


def moved(call: AttendCall) -> AttendCall:
    """The call on the device under test."""

    def move(x: object) -> object:
        return x.to(DEVICE) if isinstance(x, Tensor) else x

    changed = {name: move(value) for name, value in vars(call).items()}
    if call.bias is not None:
        changed["bias"] = BiasTerms(*map(move, call.bias))  # type: ignore[arg-type]
    return AttendCall(**changed)  # type: ignore[arg-type]


def of(
    case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, *, known: bool = True
) -> tuple[AttendCall, Inputs]:
    given = inputs(case, seed).to(dtype)
    return moved(call_of(case, given, known=known)), given


def assert_equal(got: AttendResult, wanted: AttendResult, tolerance: float = 3e-6) -> None:
    for one, other, allowed in zip(got, wanted, (tolerance, 10 * tolerance), strict=True):
        torch.testing.assert_close(one.cpu().double(), other.cpu().double(), atol=allowed, rtol=allowed)


def check_fp32(case: Case, *, known: bool = True) -> None:
    call, given = of(case, known=known)
    got = prefill(call)
    assert got[0].dtype == torch.float32
    assert_equal(got, dense(case, given))


@pytest.mark.parametrize("case", [*ODD_CASES, *crossed(19, 7)], ids=lambda case: case.name)
@pytest.mark.usefixtures("_small_tiles")
def test_equals_the_dense_answer(case: Case) -> None:
    check_fp32(case)


@pytest.mark.parametrize("case", [case for case in crossed(11) if case.name.startswith("past")], ids=lambda c: c.name)
@pytest.mark.usefixtures("_small_tiles")
def test_equals_the_dense_answer_by_the_positions_alone(case: Case) -> None:
    check_fp32(case, known=False)


@pytest.mark.cuda
@pytest.mark.parametrize("known", [True, False], ids=["known", "positions"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("_small_tiles")
def test_equals_the_dense_answer_in_small_tiles(case: Case, known: bool) -> None:
    if not known or case.at.known is not None:
        check_fp32(case, known=known)


@pytest.mark.cuda
@pytest.mark.parametrize("known", [True, False], ids=["known", "positions"])
@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda case: case.name)
def test_equals_the_dense_answer_over_the_whole_grid(case: Case, known: bool) -> None:
    check_fp32(case, known=known)


@pytest.mark.cuda
@pytest.mark.parametrize("known", [True, False], ids=["known", "positions"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_half_precision_is_as_good_as_plain_half_precision_attention(
    case: Case, dtype: torch.dtype, known: bool
) -> None:
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    for seed in range(3):
        call, given = of(case, dtype, seed, known=known)
        out, lse = prefill(call)
        truth, wanted_lse = dense(case, given)
        torch.testing.assert_close(lse.cpu().double(), wanted_lse, atol=1e-4, rtol=1e-4)
        results.append((out, dense(case, given, dtype)[0], truth))
    got, plain, wanted = zip(*results, strict=True)
    assert_as_accurate(got, plain, wanted, case.name)


# --- where keys and values lie ---------------------------------------------------------------------------------------


def split(call: AttendCall, S0: int) -> AttendCall:
    """The same call, its first S0 slots somewhere else."""
    before = (call.k[:, :, :S0].clone(), call.v[:, :, :S0].clone())
    return replace(call, before=before, k=call.k[:, :, S0:], v=call.v[:, :, S0:])


IN_TWO_PARTS = [
    Case("full", after(31, 18), bias="all", sinks=(0, 1)),
    Case("band", past_window(161, 22, 19, 4), window=19, sink_tokens=4, q_sink=True),
    Case("ring", ring(161, 18, 19, 4, 18), window=19, sink_tokens=4),
]


@pytest.mark.parametrize(("case", "S0", "known"), every_pair(IN_TWO_PARTS, [1, 23], [True, False]))
@pytest.mark.usefixtures("_small_tiles")
def test_first_slots_may_lie_elsewhere(case: Case, S0: int, known: bool) -> None:
    call, given = of(case, known=known)
    assert_equal(prefill(split(call, S0)), dense(case, given))


@pytest.mark.usefixtures("_small_tiles")
def test_any_strides() -> None:
    """Token after token, every other head, gaps between slots and within heads; one row's positions for two."""
    case = Case("strides", past_window(61, 21, 19, 4), window=19, sink_tokens=4, q_sink=True, bias="all", sinks=(0, 1))
    call, given = of(case)

    def by_token(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def with_gaps(x: Tensor) -> Tensor:
        wide = x.new_full((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]), float("nan"))
        wide[:, :, ::2, ::2] = x
        return wide[:, :, ::2, ::2]

    for change in (by_token, with_gaps):
        names = ("q", "k", "v", "q_sink")
        terms = call.bias and call.bias._replace(dense=with_gaps(call.bias.dense), key=call.bias.key.mT.contiguous().mT)
        changed = {name: change(getattr(call, name)) for name in names}
        assert_equal(prefill(replace(call, **changed, bias=terms)), dense(case, given))


@pytest.mark.parametrize("known", [True, False], ids=["known", "positions"])
@pytest.mark.usefixtures("_small_tiles")
def test_nan_of_a_query_that_is_there_is_not_hidden(known: bool) -> None:
    case = Case("nan", after(10, 27), sinks=(0, 1))
    call, given = of(case, known=known)
    call.q[1, 2, 5] = float("nan")
    out, lse = prefill(call)
    assert out[1, 2, 5].isnan().all()
    assert lse[1, 2, 5].isnan()
    out[1, 2, 5], lse[1, 2, 5] = 0, 0
    wanted = [x.clone() for x in dense(case, given)]
    wanted[0][1, 2, 5], wanted[1][1, 2, 5] = 0, 0
    assert_equal((out, lse), (wanted[0], wanted[1]))


# --- which tiles are visited -----------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["T", "columns", "window", "sink_tokens", "lookahead", "q_rest", "q_base", "head", "k_shift"]
)
def _known(
    numbers, T, columns, window, sink_tokens, lookahead, q_rest, q_base, head, k_shift,
    BLOCK: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    kept, low, full_low, full_high, high = known_ranges(
        tile * BM, tl.minimum(tile * BM + BM, T) - 1, q_rest, q_base, head, k_shift, columns, 0, window, sink_tokens,
        lookahead, BLOCK, WINDOWED, BOUNDED, BN,
    )  # fmt: skip
    tl.store(numbers + 5 * tile, kept)
    tl.store(numbers + 5 * tile + 1, low)
    tl.store(numbers + 5 * tile + 2, full_low)
    tl.store(numbers + 5 * tile + 3, full_high)
    tl.store(numbers + 5 * tile + 4, high)


def from_host(call: AttendCall, BM: int, BN: int) -> Tensor:
    """The ranges that follow from what the host knows, `[1, tiles, 5]`."""
    known = arguments.ordered(call)
    assert known is not None
    T = call.q.shape[2]
    numbers = torch.empty(1, triton.cdiv(T, BM), 5, dtype=torch.int32, device=DEVICE)
    given = {name: x for name, x in arguments.known(call, known).items() if name != "KNOWN"}
    _known[(numbers.shape[1],)](numbers, T=T, **given, **arguments.law(call), BM=BM, BN=BN)
    return numbers


BANDS = [
    Case("causal", after(57, 90, unwritten=5)),
    Case("full", from_zero(133), lookahead=None),
    Case("window", from_zero(133), window=21),
    Case("window_and_sinks", from_zero(133), window=21, sink_tokens=3),
    Case("past_it", past_window(400, 133, 37, 20), window=37, sink_tokens=20),
    Case("two_sided", from_zero(133), window=14, lookahead=40),
    Case("left_only", after(0, 133, unwritten=70), window=14, lookahead=None),
    Case("blocks", from_zero(133), block=24, window=50),
]


@pytest.mark.parametrize("source", [from_host, ranges.of_queries], ids=["known", "positions"])
@pytest.mark.parametrize(
    "case", [*BANDS, Case("ring", ring(461, 40, 90, 3, 41), window=90, sink_tokens=3)], ids=lambda case: case.name
)
def test_tiles_outside_the_band_are_never_visited(case: Case, source: Callable[[AttendCall, int, int], Tensor]) -> None:
    """Every tile with a pair that is seen is visited, no other one, and those without masks are seen entirely.

    A tile that holds kept keys, or stands at the edge of a block, may be visited in vain.
    """
    BM, BN = 16, 16
    call, _ = of(replace(case, B=1, D=16, H=1, K=1))
    if source is from_host and arguments.ordered(call) is None:
        return
    seen = visible(replace(case, B=1))[0, 0]
    for tile, (kept, low, full_low, full_high, high) in enumerate(source(call, BM, BN)[0].tolist()):
        rows = seen[tile * BM : (tile + 1) * BM]
        some = [bool(rows[:, n : n + BN].any()) for n in range(0, case.slots, BN)]
        every = [bool(rows[:, n : n + BN].all()) and n + BN <= case.slots for n in range(0, case.slots, BN)]
        visited = {*range(kept), *range(low, high)}
        needed = {n for n, any_seen in enumerate(some) if any_seen}
        assert needed <= visited
        if case.name != "ring":  # its band is two stretches, and what is visited is one
            assert visited - needed <= {*range(kept)}
        assert kept <= low <= full_low <= full_high <= high
        assert all(every[n] for n in range(full_low, full_high))
        if case.name not in ("ring", "past_it"):
            assert full_high - full_low >= sum(every) - kept


# --- who computes what -----------------------------------------------------------------------------------------------


def test_takes_every_call_of_the_grid_where_it_runs() -> None:
    impl = next(impl for impl in IMPLS if impl.name == "triton")
    case = Case("plain", after(5, 33), D=64)
    call = call_of(case, inputs(case).to(torch.float32))
    assert impl.why_not(call) == "needs CUDA, got cpu"
    with use_impl("triton"):
        for case in grid():
            call, _ = of(case)
            assert impl.why_not(call) is None
        for changed, reason in (
            ({"q": call.q.double(), "k": call.k.double(), "v": call.v.double()}, "fp32"),
            ({"v": call.v[..., :16]}, "one head size"),
            ({"scale": -1.0}, "positive scale"),
        ):
            assert reason in (impl.why_not(replace(call, **changed)) or "")  # type: ignore[arg-type]
    with pytest.raises(ImplError, match=r"'flex' cannot"), use_impl("flex"):
        run(call_of(case, inputs(case)))


def test_by_name_through_attend() -> None:
    case = Case("windowed", from_zero(40), window=9, sink_tokens=2, sinks=(-1, 1))
    call, given = of(case)
    window = AttnWindow(9, sink_tokens=2)
    with use_impl("triton"):
        got = attend(call.q, call.k, call.v, window=window, sinks=call.sinks)
    torch.testing.assert_close(got.cpu().double(), dense(case, given)[0], atol=3e-6, rtol=3e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_compiler_sees_one_operator(backend: str) -> None:
    case = Case("windowed", from_zero(300), window=90, sink_tokens=2, sinks=(-1, 1), D=64)
    call, _ = of(case, torch.bfloat16)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(2 * q, k, v, window=AttnWindow(90, sink_tokens=2), sinks=call.sinks)

    with use_impl("triton"):
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        assert torch.equal(compiled(call.q, call.k, call.v), function(call.q, call.k, call.v))


@pytest.mark.cuda
def test_a_recorded_graph_replays_with_other_positions() -> None:
    case = Case("windowed", from_zero(300), window=90, sink_tokens=2, sinks=(-1, 1), D=64)
    call, _ = of(case, torch.bfloat16, known=False)
    prefill(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = prefill(call)
    for shift in (0, 7):
        call.q_pos.add_(shift)
        wanted = prefill(call)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, wanted[0])
        assert torch.equal(lse, wanted[1])
