"""Every implementation of attention that this machine can run, against the dense answer in fp64."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from dense import Case, after, call_of, dense, from_zero, grid, inputs, past_window, ring, scattered
from torch import Tensor

from longburn import AttnWindow, ImplError, attend, use_impl
from longburn.attention import merge
from longburn.kernels.attend import IMPLS, AttendCall, run

CASES = grid()
# Of those on CUDA, flex has no interpreter, and Triton's is slow: its kernels have tests of their own.
NAMES = [impl.name for impl in IMPLS if impl.name not in ("flex", "triton")] + ["auto"]
# The share of the grid that each implementation must take, so that refusals cannot empty it silently.
AT_LEAST = {"reference": 1.0, "sdpa": 0.9, "auto": 1.0, "native": 0.2}
NO_FP16 = {"native"}
NO_FP64 = {"native"}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-6}
EXACT = [(name, dtype) for name in NAMES for dtype in TOLERANCE if not (dtype == torch.float64 and name in NO_FP64)]
HALF = [(name, torch.bfloat16) for name in NAMES] + [(name, torch.float16) for name in NAMES if name not in NO_FP16]


def compute(impl: str, call: AttendCall) -> tuple[Tensor, Tensor]:
    """The named implementation's result; skips the test where it cannot compute the call, with its reason."""
    for candidate in IMPLS:
        if candidate.name == impl and (reason := candidate.why_not(call)) is not None:
            pytest.skip(f"{impl}: {reason}")
    with use_impl(impl), torch.no_grad():
        return run(call)


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("impl", "dtype"), EXACT, ids=str)
def test_equals_the_dense_answer(impl: str, case: Case, dtype: torch.dtype) -> None:
    given = inputs(case).to(dtype)
    out, lse = compute(impl, call_of(case, given))
    wanted_out, wanted_lse = dense(case, given)
    assert out.dtype == dtype
    assert_close(out, wanted_out, TOLERANCE[dtype])
    assert_close(lse, wanted_lse, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("impl", NAMES)
def test_the_grid_is_not_empty(impl: str) -> None:
    answers: Counter[str | None] = Counter()
    for case in CASES:
        call = call_of(case, inputs(case).to(torch.float32))
        reasons = [candidate.why_not(call) for candidate in IMPLS if impl in (candidate.name, "auto")]
        answers[None if None in reasons else reasons[0]] += 1
    if impl == "native" and not answers[None]:
        pytest.skip(f"native: {answers.most_common(1)[0][0]}")  # no compiler here
    assert len(CASES) >= 120
    assert answers[None] >= AT_LEAST[impl] * len(CASES), answers


@pytest.mark.parametrize("wants_lse", [True, False])
@pytest.mark.parametrize("impl", NAMES)
def test_what_the_host_knows_changes_nothing(impl: str, wants_lse: bool) -> None:
    dtype = torch.float32 if impl in NO_FP64 else torch.float64
    for case in (case for case in CASES if case.at.known is not None and case.slots < 1000):
        given = inputs(case).to(dtype)
        for known in (True, False):
            call = call_of(case, given, known=known, wants_lse=wants_lse)
            if impl == "auto" or next(i for i in IMPLS if i.name == impl).why_not(call) is None:
                with use_impl(impl), torch.no_grad():
                    assert_close(run(call)[0], dense(case, given)[0], TOLERANCE[dtype])


def low_precision_error(case: Case, dtype: torch.dtype, impl: str, seed: int) -> tuple[Tensor, Tensor]:
    """The errors against fp64 of an implementation, and of the same formula with every step in the low precision."""
    given = inputs(case, seed).to(dtype)
    truth, _ = dense(case, given)
    out, _ = compute(impl, call_of(case, given, wants_lse=False))
    assert out.dtype == dtype
    return (out.double() - truth).abs(), (dense(case, given, dtype)[0].double() - truth).abs()


LOW = [
    *(Case(f"head_size_{D}", after(200, 37), D=D) for D in (32, 64, 80, 96, 128, 256)),
    *(Case(f"one_query_head_size_{D}", after(500, 1), D=D) for D in (40, 64, 128, 256)),
    Case("long", after(3000, 5), B=1, D=64),
    Case("very_long_one_query", after(9000, 1), B=1, D=64),
    Case("band", from_zero(300), window=33, sink_tokens=4, D=64),
    Case("band_with_sinks", from_zero(300), window=33, sink_tokens=4, sinks=(-1, 3), D=64),
    Case("past_window_with_sinks", past_window(800, 40, 129, 4), window=129, sink_tokens=4, sinks=(-1, 3), D=64),
    Case("ring_with_sinks", ring(900, 2, 129, 4, 3), window=129, sink_tokens=4, sinks=(-1, 3), D=64),
    Case("ring_relative", ring(900, 2, 129, 4, 3), window=129, sink_tokens=4, q_sink=True, D=64),
    Case("slope", after(200, 9), bias="slope", D=64),
    Case("dense_bias_with_sinks", scattered(2, 33, 300, seed=8), bias="dense", sinks=(-1, 3), D=64),
]


@pytest.mark.parametrize("case", LOW, ids=lambda case: case.name)
@pytest.mark.parametrize(("impl", "dtype"), HALF, ids=str)
def test_half_precision_is_as_good_as_plain_half_precision_attention(impl: str, case: Case, dtype: torch.dtype) -> None:
    pairs = [low_precision_error(case, dtype, impl, seed) for seed in range(3)]
    ours, plain = (torch.stack(errors) for errors in zip(*pairs, strict=True))
    assert ours.mean() <= 1.1 * plain.mean()
    assert ours.max() <= 2 * plain.max()


# --- the choice of an implementation ---------------------------------------------------------------------------------


def test_a_named_implementation_never_falls_back() -> None:
    case = Case("relative", scattered(2, 9, 31, seed=7), window=6, sink_tokens=2, q_sink=True)
    call = call_of(case, inputs(case))
    with (
        use_impl("sdpa"),
        pytest.raises(ImplError, match=r"attend: .*'sdpa' cannot compute this call.*order the host knows"),
    ):
        run(call)
    with use_impl("flex"), pytest.raises(ImplError, match=r"'flex' cannot compute this call.*needs CUDA, got cpu"):
        run(call)
    with use_impl("reference"):
        run(call)


def test_a_named_implementation_is_the_one_that_runs() -> None:
    """With identical answers nothing else shows which one ran: let one of them lie."""
    case = Case("plain", after(5, 3))
    call = call_of(case, inputs(case))
    reference = next(impl for impl in IMPLS if impl.name == "reference")
    sdpa = next(impl for impl in IMPLS if impl.name == "sdpa")
    was = sdpa.run
    object.__setattr__(sdpa, "run", lambda call: (torch.full_like(call.q, 7), torch.empty(0)))
    try:
        with use_impl("sdpa"):
            assert (run(call)[0] == 7).all()
        with use_impl("reference"):
            torch.testing.assert_close(run(call)[0], reference.run(call)[0])
    finally:
        object.__setattr__(sdpa, "run", was)


def test_an_unknown_name_lists_the_known_ones() -> None:
    q = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ImplError, match=r"'cudnn'.*auto.*reference.*sdpa"), use_impl("cudnn"):
        attend(q, q, q)


def test_the_choice_ends_with_its_block_and_after_an_error() -> None:
    q = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ImplError), use_impl("flex"):
        attend(q, q, q)
    attend(q, q, q)
    with use_impl("flex"):
        with use_impl("reference"):
            attend(q, q, q)
        with pytest.raises(ImplError):
            attend(q, q, q)


# --- log-sum-exp -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", NAMES)
@pytest.mark.parametrize("sinks", [None, (-1.0, 4.0)])
@pytest.mark.parametrize("cuts", [(0, 11, 31), (0, 1, 2, 31), (0, 10, 20, 30, 31)])
def test_parts_over_disjoint_keys_merge_exactly(impl: str, sinks: tuple[float, float] | None, cuts: list[int]) -> None:
    """Sinks enter one part only; a part may see nothing, and a query without a token sees nothing in any of them."""
    case = Case("whole", scattered(2, 9, 31, seed=9), window=20, sink_tokens=3, sinks=sinks, D=32)
    given = inputs(case).to(torch.float32)
    call = call_of(case, given)
    parts = []
    for n, (a, b) in enumerate(pairwise(cuts)):
        own = {"k": call.k[:, :, a:b], "v": call.v[:, :, a:b], "k_pos": call.k_pos[:, a:b]}
        parts.append(compute(impl, replace(call, **own, sinks=call.sinks if n == 1 else None)))
    wanted_out, wanted_lse = dense(case, given)
    for order in (parts, parts[::-1]):
        out, lse = merge(order)
        assert_close(out, wanted_out, 3e-6)
        assert_close(lse, wanted_lse, 1e-5)


@pytest.mark.parametrize("impl", NAMES)
def test_a_query_that_sees_nothing(impl: str) -> None:
    """0 and -inf; with learned sinks 0 and the sink's logit: the empty sum of keys beside the sink."""
    for sinks in (None, (2.0, 3.0)):
        case = Case("nothing", scattered(2, 5, 9, seed=3), window=1, sinks=sinks)
        given = inputs(case).to(torch.float32)
        call = call_of(case, given)
        call = replace(call, k_pos=torch.full_like(call.k_pos, -1))
        out, lse = compute(impl, call)
        assert (out == 0).all()
        if sinks is None:
            assert (lse == -math.inf).all()
        else:
            torch.testing.assert_close(lse, given.sinks[None, :, None].expand_as(lse))


# --- arguments of `attend` -------------------------------------------------------------------------------------------


def test_attend_defaults_to_the_last_queries_of_causal_attention() -> None:
    case = Case("defaults", after(20, 7))
    given = inputs(case)
    assert_close(attend(given.q, given.k, given.v), dense(case, given)[0], 1e-11)
    windowed = Case("defaults", after(20, 7), window=6, sink_tokens=2)
    got = attend(given.q, given.k, given.v, window=AttnWindow(6, sink_tokens=2))
    assert_close(got, dense(windowed, given)[0], 1e-11)


def test_large_and_tiny_scores_stay_finite() -> None:
    q, k, v = (torch.randn(1, 2, 5, 16, dtype=torch.float32) for _ in range(3))
    for factor in (1e-30, 1e4, 1e15):
        for name in ("auto", "sdpa", "reference"):
            with use_impl(name), torch.no_grad():
                assert attend(factor * q, k, v, sinks=torch.tensor([-1e30, 50.0])).isfinite().all()
