"""Gradients of attention in Triton: on a GPU, and in Triton's interpreter where there is none."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accuracy import assert_as_accurate
from dense import Case, Inputs, after, call_of, crossed, dense, from_zero, inputs, past_window, ragged, ring, scattered
from test_attend_gradients import LARGER, leaves, with_tensors
from torch import Tensor

from longburn import AttnWindow, attend, use_impl
from longburn.kernels import triton as triton_kernels
from longburn.kernels.attend import IMPLS, AttendCall, AttendResult, BiasTerms, run
from longburn.kernels.attend.reference import attend_reference

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# conftest.py sees to it; without it every test here would be skipped and look green.
assert ON_GPU or triton_kernels.interprets(), "Triton was imported before TRITON_INTERPRET=1 was set"

from longburn.kernels.triton import backward as backward_module  # noqa: E402
from longburn.kernels.triton import bias_gradients  # noqa: E402
from longburn.kernels.triton import prefill as prefill_module  # noqa: E402

LAW = {"window": 7, "sink_tokens": 3}
ODD_CASES = [
    Case("one_query", after(30, 1), D=64),
    Case("band_of_several_tiles", after(40, 19), H=2, K=1, window=40, sink_tokens=18, sinks=(-2, 2)),
    Case("bias_all", scattered(2, 9, 31, seed=6), bias="all", sinks=(0, 1)),
    Case("far_up", after(20, 17), sinks=(20, 30)),
]
SMALL_CASES = [
    *LARGER,
    Case("three_tiles", after(37, 41), H=6, K=2),
    Case("band", from_zero(70), H=2, K=1, **LAW),
    Case("head_size_80", scattered(2, 19, 41, seed=2), D=80, H=2, K=2),
    Case("ring", ring(161, 20, 37, 2, 20), H=2, K=1, window=37, sink_tokens=2, sinks=(-1, 1)),
    Case("ragged", ragged([(20, 23, 0), (0, 15, 9), (3, 20, 4)], 24, 47), B=3, H=2, K=1, window=9, sink_tokens=2),
    Case("relative", past_window(161, 20, 19, 4), H=2, K=1, window=19, sink_tokens=4, q_sink=True, sinks=(0, 1)),
    Case("relative_not_known", scattered(2, 19, 41, seed=7), q_sink=True, sinks=(0, 1), **LAW),
    *(Case(f"bias_{bias}", after(20, 21), bias=bias, H=2, K=1, sinks=(0, 1)) for bias in ("key", "row", "table")),
    Case("two_sided", from_zero(43), window=14, lookahead=9),
    Case("blocks", scattered(2, 19, 41, seed=3), block=8, window=20, sink_tokens=2, sinks=(0, 1)),
    Case("no_mask", after(4, 39), lookahead=None, H=2, K=1),
]
HALF_CASES = [
    *(Case(f"head_size_{D}", after(300, 137), D=D, sinks=(-1, 3)) for D in (32, 64, 80, 128, 256)),
    Case("band", from_zero(500), window=65, sink_tokens=4, sinks=(-1, 3), D=64),
    Case("band_not_known", scattered(2, 200, 400, seed=3), window=165, sinks=(-1, 3), D=128),
    Case("relative", ring(900, 130, 300, 4, 130), window=300, sink_tokens=4, q_sink=True, sinks=(-1, 3), D=64),
    *(
        Case(f"bias_{bias}", after(200, 99), bias=bias, D=64, sinks=(-1, 3))
        for bias in ("slope", "key", "table", "dense")
    ),
    Case("bias_all_head_size_128", after(200, 99), bias="all", sinks=(0, 1), D=128),
    Case("bias_all_head_size_256", after(200, 99), bias="all", sinks=(0, 1), D=256),
]
Function = Callable[[AttendCall], AttendResult]


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles even of the interpreter's small calls."""
    size = {"BN": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(prefill_module, "_tile", lambda call: {"BM": 64, **size})
    for module, name in (
        (backward_module, "_tile_of_queries"),
        (backward_module, "_tile_of_keys"),
        (bias_gradients, "_tile"),
    ):
        monkeypatch.setattr(module, name, lambda call: {"BT": 16, **size})


def by_triton(call: AttendCall) -> AttendResult:
    with use_impl("triton"):
        return run(call)


def gradients(
    function: Function, case: Case, given: Inputs, *, lse: bool = False, known: bool = True, device: str = "cpu"
) -> dict[str, Tensor]:
    """Of a random sum of the output, and of the log-sum-exp; keys and values keep the NaN of their empty slots."""
    values = {name: x.detach().to(device).requires_grad_() for name, x in leaves(given, keep_nan=("k", "v")).items()}
    bias = given.bias and BiasTerms(*(x.to(device) if isinstance(x, Tensor) else x for x in given.bias))
    call = call_of(case, with_tensors(replace(given, bias=bias), values), known=known)
    call = replace(call, q_pos=call.q_pos.to(device), k_pos=call.k_pos.to(device))
    out, sums = function(call)
    generator = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=generator).to(device, out.dtype)).sum()
    if lse:
        weights = torch.randn(sums.shape, generator=generator).to(device, sums.dtype)
        loss = loss + (sums.masked_fill(sums == -torch.inf, 0) * weights).sum()
    loss.backward()
    return {name: x.grad for name, x in values.items() if x.grad is not None}


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        assert got[name].dtype == x.dtype
        torch.testing.assert_close(
            got[name].cpu(), x, atol=3e-5, rtol=1e-4, msg=lambda text, name=name: f"d {name}: {text}"
        )


def check_fp32(case: Case, *, lse: bool = False, known: bool = True) -> None:
    given = inputs(case).to(torch.float32)
    got = gradients(by_triton, case, given, lse=lse, known=known, device=DEVICE)
    assert_equal(got, gradients(attend_reference, case, given, lse=lse))


@pytest.mark.parametrize("case", crossed(19, heads=((1, 1), (4, 2), (3, 1))), ids=lambda case: case.name)
@pytest.mark.usefixtures("_small_tiles")
def test_equal_the_gradients_of_the_reference(case: Case) -> None:
    check_fp32(case, lse=True)


@pytest.mark.parametrize("case", ODD_CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("_small_tiles")
def test_equal_the_gradients_of_the_reference_without_the_log_sum_exp(case: Case) -> None:
    check_fp32(case)


@pytest.mark.cuda
@pytest.mark.parametrize("lse", [False, True], ids=["output", "both"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("_small_tiles")
def test_equal_the_gradients_of_the_reference_in_small_tiles(case: Case, lse: bool) -> None:
    check_fp32(case, lse=lse, known=lse)


@pytest.mark.cuda
@pytest.mark.parametrize("case", SMALL_CASES + HALF_CASES, ids=lambda case: case.name)
def test_equal_the_gradients_of_the_reference_in_full_tiles(case: Case) -> None:
    check_fp32(case)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_half_precision_is_as_good_as_plain_half_precision_attention(case: Case, dtype: torch.dtype) -> None:
    """The plain formula's gradients are those of PyTorch, with every step in the low precision."""

    draws = []
    for seed in range(3):
        given = inputs(case, seed).to(dtype)
        got = gradients(by_triton, case, given, device=DEVICE)
        truth = gradients(lambda call: dense_call(case, call, torch.float64), case, given.to(torch.float64))
        plain = gradients(lambda call: dense_call(case, call, dtype), case, given)
        draws.append((got, plain, truth))
    for name in draws[0][2]:
        assert_as_accurate(*([draw[side][name] for draw in draws] for side in range(3)), f"{case.name}: d {name}")


def dense_call(case: Case, call: AttendCall, dtype: torch.dtype) -> AttendResult:
    return dense(case, Inputs(call.q, call.k, call.v, call.q_sink, call.sinks, call.bias), dtype)


def test_first_slots_that_lie_elsewhere_have_gradients() -> None:
    case = Case("before", after(31, 14), H=2, K=1, window=20, sinks=(0, 1))
    given = inputs(case).to(torch.float32)

    def split(call: AttendCall) -> AttendResult:
        before = (call.k[:, :, :19], call.v[:, :, :19])
        return by_triton(replace(call, before=before, k=call.k[:, :, 19:], v=call.v[:, :, 19:]))

    assert_equal(gradients(split, case, given, device=DEVICE), gradients(attend_reference, case, given))


def test_only_what_is_wanted_has_a_gradient() -> None:
    """Each input alone: the others stay without, and this one's bits do not depend on them."""
    case = Case("all", scattered(1, 19, 41, seed=6), B=1, H=2, K=1, bias="all", sinks=(0, 1))
    given = inputs(case).to(torch.float32)
    together = gradients(by_triton, case, given, device=DEVICE)

    for name, wanted in together.items():

        def alone(call: AttendCall, name: str = name) -> AttendResult:
            def keep(field: str, x: Tensor | None) -> Tensor | None:
                return x if x is None or field == name else x.detach()

            fields = {field: keep(field, getattr(call, field)) for field in ("q", "k", "v", "sinks")}
            assert call.bias is not None
            terms = {f: keep(f"bias.{f}", x) for f, x in call.bias._asdict().items() if f != "zero"}
            return by_triton(replace(call, **fields, bias=BiasTerms(zero=call.bias.zero, **terms)))

        got = gradients(alone, case, given, device=DEVICE)
        assert got.keys() == {name}
        assert torch.equal(got[name], wanted)


def test_refuses_gradients_of_fp8() -> None:
    case = Case("plain", after(5, 33), D=64)
    given = inputs(case).to(torch.float32)
    q, k, v = (x.to(DEVICE) for x in (given.q, given.k, given.v))
    call = call_of(case, replace(given, q=q.requires_grad_(), k=k, v=v))
    scale = torch.ones(k.shape[:3], device=DEVICE)
    impl = next(impl for impl in IMPLS if impl.name == "triton")
    with use_impl("triton"):
        assert impl.why_not(replace(call, scales=(scale, scale))) == "has no gradients of keys and values in fp8"
        assert impl.why_not(call) is None


@pytest.mark.cuda
@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_the_same_bits_every_time(case: Case) -> None:
    given = inputs(case).to(torch.bfloat16)
    first, second = (gradients(by_triton, case, given, device=DEVICE) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_through_the_compiler(backend: str) -> None:
    q = torch.randn(1, 8, 300, 64, device=DEVICE, dtype=torch.bfloat16)
    k = torch.randn(1, 2, 300, 64, device=DEVICE, dtype=torch.bfloat16)
    sinks = torch.randn(8, device=DEVICE)

    def function(*values: Tensor) -> Tensor:
        q, k, v, sinks = values
        return attend(2 * q, k, v, window=AttnWindow(90, sink_tokens=2), sinks=sinks).square().sum()

    found = []
    with use_impl("triton"):
        for how in (function, torch.compile(function, fullgraph=True, backend=backend)):
            values = [x.clone().requires_grad_() for x in (q, k, k, sinks)]
            how(*values).backward()
            found.append([x.grad for x in values])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)
