"""Gradients of attention: finite differences in fp64, and every implementation that has them against the reference."""

from dataclasses import replace

import pytest
import torch
from dense import Case, Inputs, after, call_of, from_zero, inputs, ragged, scattered
from torch import Tensor

from longburn import use_impl
from longburn.kernels.attend import IMPLS, AttendCall, BiasTerms, run

SMALL = [
    Case("causal", from_zero(5), H=4, K=2, D=3),
    Case("more_keys_than_queries", after(3, 4), H=2, K=1, D=4, sinks=(-2, 2)),
    Case("window_and_sinks", from_zero(7), H=2, K=1, D=3, window=2, sink_tokens=2, sinks=(8, 12)),
    Case("rows", ragged([(2, 3, 0), (0, 4, 1)], 5, 6), H=2, K=2, D=3, window=3, sinks=(-1, 1)),
    Case("sees_nothing", scattered(2, 4, 7, seed=3), H=2, K=1, D=3, window=2, sinks=(-1, 1)),
    *(Case(f"bias_{bias}", scattered(2, 3, 6, seed=6), H=2, K=1, D=2, bias=bias) for bias in ("slope", "key", "row")),
    *(Case(f"bias_{bias}", after(2, 4), H=2, K=1, D=2, bias=bias, sinks=(0, 1)) for bias in ("table", "dense", "all")),
    Case("relative", scattered(2, 4, 7, seed=7), H=2, K=1, D=4, window=3, sink_tokens=2, q_sink=True, sinks=(0, 1)),
    Case("two_sided", from_zero(6), H=2, K=2, D=3, window=2, lookahead=2),
]
LARGER = [
    Case("causal", from_zero(37), D=40),
    Case("causal_with_a_past", after(20, 17), D=64),
    Case("one_query", after(30, 1), D=64),
    Case("sinks_far_up", after(20, 17), sinks=(20, 30)),
    Case("window_sinks", from_zero(41), window=7, sink_tokens=3, sinks=(-2, 2)),
    Case("not_known", scattered(2, 17, 31, seed=8), window=12, sinks=(-2, 2)),
    Case("rows", ragged([(20, 3, 0), (0, 5, 2), (9, 0, 0)], 7, 30), B=3, H=6, K=1),
    *(Case(f"bias_{bias}", scattered(2, 9, 31, seed=6), bias=bias, sinks=(0, 1)) for bias in ("slope", "dense", "all")),
]
SELECTED = ("q", "k", "v", "q_sink", "sinks")


def tensors(given: Inputs) -> dict[str, Tensor]:
    """Every tensor of a call by its name."""
    found = {name: getattr(given, name) for name in SELECTED}
    if given.bias is not None:
        found |= {f"bias.{name}": x for name, x in given.bias._asdict().items() if isinstance(x, Tensor)}
    return {name: x for name, x in found.items() if x is not None}


def with_tensors(given: Inputs, values: dict[str, Tensor]) -> Inputs:
    bias = {name.removeprefix("bias."): x for name, x in values.items() if name.startswith("bias.")}
    bare = {name: x for name, x in values.items() if name in SELECTED}
    return replace(given, **bare, bias=given.bias and given.bias._replace(**bias))


def leaves(given: Inputs, *, keep_nan: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Copies that take gradients; finite, because a finite difference cannot step away from NaN."""
    return {
        name: (x.clone() if name in keep_nan else x.nan_to_num()).requires_grad_() for name, x in tensors(given).items()
    }


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_finite_differences(impl: str, case: Case) -> None:
    given = inputs(case)
    values = leaves(given)

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        call = call_of(case, with_tensors(given, dict(zip(values, args, strict=True))), wants_lse=impl == "reference")
        with use_impl(impl):
            out, lse = run(call)
        return (out, lse.masked_fill(lse == -torch.inf, 0)) if impl == "reference" else (out,)

    assert torch.autograd.gradcheck(function, tuple(values.values()), fast_mode=True)


def gradients(impl: str, case: Case, given: Inputs, values: dict[str, Tensor]) -> dict[str, Tensor]:
    for x in values.values():
        x.grad = None
    call = call_of(case, with_tensors(given, values), wants_lse=False)
    with use_impl(impl):
        out = run(call)[0]
    generator = torch.Generator().manual_seed(1)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return {name: x.grad for name, x in values.items() if x.grad is not None}


def with_gradients(case: Case) -> tuple[Inputs, dict[str, Tensor]]:
    """fp32 inputs whose empty slots hold NaN: they must neither show in a gradient nor have one."""
    given = inputs(case).to(torch.float32)
    return given, leaves(given, keep_nan=("k", "v"))


@pytest.mark.parametrize("case", LARGER, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "impl", [impl.name for impl in IMPLS if impl.name not in ("flex", "triton", "reference")] + ["auto"]
)
def test_equal_the_gradients_of_the_reference(impl: str, case: Case) -> None:
    given, values = with_gradients(case)
    call = call_of(case, with_tensors(given, values), wants_lse=False)
    for candidate in IMPLS:
        if candidate.name == impl and (reason := candidate.why_not(call)) is not None:
            pytest.skip(f"{impl}: {reason}")
    got = gradients(impl, case, given, values)
    wanted = gradients("reference", case, given, values)
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(got[name], x, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"d {name}: {text}")


def test_sdpa_takes_all_of_these() -> None:
    """The comparison above is not empty."""
    sdpa = next(impl for impl in IMPLS if impl.name == "sdpa")
    for case in LARGER:
        given, values = with_gradients(case)
        assert sdpa.why_not(call_of(case, with_tensors(given, values), wants_lse=False)) is None


def test_only_implementations_with_gradients_take_calls_that_need_them() -> None:
    case = Case("one_query", after(30, 1), D=64)
    given, values = with_gradients(case)
    call: AttendCall = call_of(case, with_tensors(given, values), wants_lse=False)
    assert call.needs_grad
    for name, alone in (("k", values["k"]), ("sinks", torch.zeros(case.H, requires_grad=True))):
        assert replace(call_of(case, given), **{name: alone}).needs_grad
    bias = BiasTerms(slope=torch.ones(case.H, requires_grad=True))
    assert replace(call_of(case, given), bias=bias).needs_grad
    with torch.no_grad():
        assert not call.needs_grad
    with use_impl("auto"):
        assert run(call)[0].requires_grad
