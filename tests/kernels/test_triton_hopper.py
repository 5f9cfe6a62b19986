"""Attention of many queries on Hopper: on such a GPU its results, everywhere what it refuses."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from accuracy import assert_as_accurate
from dense import NAN, Case, Positions, after, call_of, dense, from_zero, inputs, past_window, ragged, ring
from torch import Tensor

from longburn.kernels.attend import AttendCall, Known

pytest.importorskip("triton.experimental.gluon")
from longburn.kernels.triton.hopper import attend_hopper, hopper_why_not

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
DRAWS = 2


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """PyTorch fills memory that nothing was written to with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def across(T: int, S: int) -> Positions:
    """Queries over a sequence of keys of their own, in a buffer with room for more."""
    return Positions((tuple(range(T)),), ((*range(S), *[-1] * 9),), (Known(0, T, S, 0, 0, True),))


def windowed(at: Positions, window: int, sink_tokens: int, **more: object) -> Case:
    name = f"window {window} + {sink_tokens}, {len(at.q[0])} of {len(at.k[0])}"
    return Case(name, at, window=window, sink_tokens=sink_tokens, sinks=(-3, 3), **more)  # type: ignore[arg-type]


CASES = [
    *(Case(f"T {T}", from_zero(T), B=1, sinks=(-9, 9)) for T in (64, 65, 127, 128, 129, 255, 384, 517)),
    *(Case(f"{T} after {past}", after(past, T, unwritten=37)) for past, T in ((1, 64), (128, 128), (311, 190))),
    *(Case(f"H {H} K {K}", after(70, 131), H=H, K=K, sinks=(-9, 9)) for H, K in ((1, 1), (4, 4), (6, 2), (5, 1))),
    *(Case(f"sink of {sink:g}", from_zero(140), sinks=(sink, sink)) for sink in (-60.0, 60.0)),
    Case("three rows", after(9, 200), B=3, H=3, K=1, sinks=(-9, 9)),
    Case("a scale of its own", from_zero(150), scale=0.7),
    Case("all keys", across(200, 333), lookahead=None),
    Case("fewer keys than queries", across(200, 70), lookahead=None, sinks=(-9, 9)),
    Case("fewer keys than queries, causal", across(200, 70)),
    Case("lookahead", from_zero(300), lookahead=70),
    Case("blocks of 7", from_zero(300), block=7),
    Case("blocks of 100 after 333", after(333, 170), block=100),
    Case("two-sided window", from_zero(400), window=50, lookahead=20),
    Case("slope", after(200, 170), bias="slope", sinks=(-9, 9)),
    Case("slope, all keys", across(170, 300), bias="slope", lookahead=None),
    *(windowed(from_zero(390), W, kept) for W in (1, 5, 64, 127, 128, 129, 300) for kept in (0, 4)),
    windowed(after(500, 150, unwritten=5), 40, 130),
    windowed(after(500, 150, unwritten=5), 40, 300),
    windowed(after(500, 150), 1000, 4),
    windowed(after(900, 70), 100, 0, B=1, H=2, K=1),
    *(windowed(past_window(700, T, W, kept), W, kept) for T, W, kept in ((70, 33, 4), (200, 100, 0), (300, 150, 131))),
    replace(windowed(past_window(700, 200, 100, 0), 100, 0), bias="slope", name="slope without the past"),
    Case("no window, but tokens missing", past_window(700, 200, 100, 6)),
    Case("window behind the keys", across(300, 70), window=20, lookahead=None),
]


def on_gpu(call: AttendCall) -> AttendCall:
    """The call as a model makes it: queries token after token, keys and values in one buffer."""

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.cuda()

    kv = torch.stack([call.k, call.v], 1).cuda()
    bias = None if call.bias is None else call.bias._replace(slope=moved(call.bias.slope))
    return replace(
        call,
        q=call.q.transpose(1, 2).contiguous().cuda().transpose(1, 2),
        k=kv[:, 0],
        v=kv[:, 1],
        q_pos=call.q_pos.cuda(),
        k_pos=call.k_pos.cuda(),
        sinks=moved(call.sinks),
        bias=bias,
    )


@hopper
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_accurate_as_the_formula_in_low_precision(case: Case, D: int, dtype: torch.dtype) -> None:
    case = replace(case, D=D)
    ours, plain, exact = [], [], []
    for seed in range(DRAWS):
        given = inputs(case, seed).to(dtype)
        call = on_gpu(call_of(case, given))
        assert hopper_why_not(call) is None
        out, lse = attend_hopper(call)
        wanted, wanted_lse = dense(case, given)
        assert out.dtype == dtype
        assert out.shape == wanted.shape
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse.cpu().double(), wanted_lse, atol=1e-4, rtol=1e-5)
        ours.append(out)
        plain.append(dense(case, given, dtype)[0])
        exact.append(wanted)
    assert_as_accurate(ours, plain, exact, f"{case.name}, D {D}")


SPLIT = [
    Case("after old keys", after(333, 170), sinks=(-9, 9)),
    Case("all keys, split", across(170, 400), lookahead=None),
    windowed(past_window(700, 300, 200, 0), 200, 0),
    windowed(past_window(700, 300, 200, 140), 200, 140),
    windowed(after(500, 150), 40, 4),
]


@hopper
@pytest.mark.cuda
@pytest.mark.parametrize("border", [1, 64, 128, 199, 320])
@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.name)
def test_first_keys_elsewhere(case: Case, border: int) -> None:
    case = replace(case, D=64)
    given = inputs(case).to(torch.bfloat16)
    call = on_gpu(call_of(case, given))
    k, v = call.k, call.v
    before = k[:, :, :border].contiguous(), v[:, :, :border].contiguous()
    call = replace(call, k=k[:, :, border:], v=v[:, :, border:], before=before)
    assert hopper_why_not(call) is None
    out, lse = attend_hopper(call)
    wanted, wanted_lse = dense(case, given)
    torch.testing.assert_close(lse.cpu().double(), wanted_lse, atol=1e-4, rtol=1e-5)
    assert_as_accurate([out], [dense(case, given, torch.bfloat16)[0]], [wanted], f"{case.name}, {border} elsewhere")


@hopper
@pytest.mark.cuda
@pytest.mark.parametrize("sink", [None, float("-inf"), 2.5])
def test_queries_that_see_nothing(sink: float | None) -> None:
    """A window that ends before the keys begin: 0, and the log-sum-exp of the sink alone."""
    case = replace(CASES[-1], D=64)
    given = inputs(case).to(torch.bfloat16)
    sinks = None if sink is None else torch.full((case.H,), sink)
    out, lse = attend_hopper(on_gpu(replace(call_of(case, given), sinks=sinks)))
    nothing = slice(90, None)  # the last key stands at 69
    assert (out[:, :, nothing] == 0).all()
    assert (lse[:, :, nothing] == (float("-inf") if sink is None else sink)).all()
    assert out[:, :, :80].isfinite().all()


@hopper
@pytest.mark.cuda
def test_the_same_bits_again() -> None:
    case = replace(CASES[-2], D=128)
    call = on_gpu(call_of(case, inputs(case).to(torch.bfloat16)))
    first, again = attend_hopper(call), attend_hopper(call)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def call(at: Positions | None = None, D: int = 64, **more: object) -> AttendCall:
    case = Case("", from_zero(70) if at is None else at, D=D)
    return replace(call_of(case, inputs(case).to(torch.bfloat16)), **more)  # type: ignore[arg-type]


def test_on_the_cpu_it_refuses_for_the_device_alone() -> None:
    assert hopper_why_not(call()) == "needs a CUDA device of capability 9.0, got cpu"


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (lambda: call(D=80), "head sizes 64 and 128, got 80"),
        (lambda: replace(call(), q=torch.ones(2, 4, 70, 64)), "bf16 or fp16, got torch.float32"),
        (lambda: call(after(70, 63)), "at least 64 queries, got 63"),
        (lambda: call(known=None), "order the host knows"),
        (lambda: call(ring(200, 70, 70, 2, 0)), "order the host knows"),
        (lambda: call(ragged([(3, 64, 0), (4, 64, 0)], 64, 80)), "order the host knows"),
        (lambda: call(q_sink=torch.ones(2, 4, 70, 64)), "one query"),
        (lambda: call(before=(torch.ones(2, 2, 70, 64), torch.ones(2, 2, 70, 64))), "order the host knows"),
        (lambda: call(scales=(torch.ones(2, 2, 70), torch.ones(2, 2, 70))), "keys in the type of q"),
        (lambda: call_of(Case("", from_zero(70), D=64, bias="key"), biased("key")), "slope only"),
        (lambda: call_of(Case("", from_zero(70), D=64, bias="dense"), biased("dense")), "slope only"),
        (lambda: call(scale=-1.0), "positive scale, got -1.0"),
        (lambda: call(past_window(200, 70, 40, 6), window=40, sink_tokens=3), "kept tokens apart"),
    ],
)
def test_refuses_with_the_reason(refused, reason: str) -> None:
    refusal = hopper_why_not(refused())
    assert refusal is not None
    assert reason in refusal


def biased(kind: str):
    return inputs(Case("", from_zero(70), D=64, bias=kind)).to(torch.bfloat16)


@hopper
@pytest.mark.cuda
def test_refuses_heads_that_the_copy_engine_cannot_read() -> None:
    good = on_gpu(call())
    wide = torch.full((2, 4, 70, 68), NAN, dtype=torch.bfloat16, device="cuda")
    for name in "qkv":
        heads = getattr(good, name).shape[1]
        refusal = hopper_why_not(replace(good, **{name: wide[:, :heads, :, :64]}))
        assert refusal is not None
        assert "16 bytes aligned" in refusal
