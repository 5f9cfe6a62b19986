"""A mixture of experts: every implementation, dense and MXFP4, against the formula token by token in fp64."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from longburn import ImplError, use_impl
from longburn.kernels import experts as kernels
from longburn.kernels.experts import ExpertsCall, experts
from longburn.kernels.mxfp4 import Mxfp4, dequantize, quantize

ALPHA, LIMIT = 1.702, 7.0
IMPLS = [impl.name for impl in kernels.OPERATION.impls]
TYPES = {impl: [torch.float32, torch.bfloat16] + [torch.float64] * (impl == "reference") for impl in IMPLS}


@dataclass
class Case:
    """Arguments of `experts`, of which some activations lie beyond both ends of the clamp."""

    x: Tensor
    chosen: Tensor
    weights: Tensor
    gate_up: Tensor | Mxfp4
    gate_up_bias: Tensor
    down: Tensor | Mxfp4
    down_bias: Tensor

    def __call__(self) -> Tensor:
        return experts(**vars(self), alpha=ALPHA, limit=LIMIT)

    @property
    def call(self) -> ExpertsCall:
        return ExpertsCall(**vars(self), alpha=ALPHA, limit=LIMIT)


def case(
    n: int, m: int, i: int, e: int, k: int, dtype: torch.dtype = torch.float32, packed: bool = False, seed: int = 0
) -> Case:
    g = torch.Generator().manual_seed(seed + 1000 * n + m)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    chosen = torch.stack([torch.randperm(e, generator=g)[:k] for _ in range(n)]) if n else torch.zeros(0, k).long()
    gate_up, down = random(e, 2 * i, m, scale=5 / m**0.5).to(dtype), random(e, m, i, scale=1 / i**0.5).to(dtype)
    return Case(
        x=random(n, m).to(dtype),
        chosen=chosen,
        weights=random(n, k).softmax(-1).to(dtype),
        gate_up=quantize(gate_up) if packed else gate_up,
        gate_up_bias=random(e, 2 * i, scale=2).to(dtype),
        down=quantize(down) if packed else down,
        down_bias=random(e, m).to(dtype),
    )


def oracle(given: Case) -> Tensor:
    """One token and one expert after the other, in fp64."""

    def exact(weight: Tensor | Mxfp4) -> Tensor:
        return dequantize(weight, torch.float64) if isinstance(weight, Mxfp4) else weight.double()

    gate_up, down, y = exact(given.gate_up), exact(given.down), torch.zeros(given.x.shape, dtype=torch.float64)
    for n, row in enumerate(given.x.double()):
        for e, weight in zip(given.chosen[n].tolist(), given.weights[n].tolist(), strict=True):
            hidden = gate_up[e] @ row + given.gate_up_bias[e].double()
            gate, up = hidden[0::2].clamp(max=LIMIT), hidden[1::2].clamp(-LIMIT, LIMIT)
            out = down[e] @ (gate / (1 + torch.exp(-ALPHA * gate)) * (up + 1)) + given.down_bias[e].double()
            y[n] += weight * out
    return y


def compute(given: Case, impl: str) -> Tensor:
    reason = kernels.OPERATION.impls[IMPLS.index(impl)].why_not(given.call)
    if reason is not None:
        assert impl != "reference", f"{impl} refuses: {reason}"
        assert impl != "native" or reason == kernels.native.unavailable(), reason
        pytest.skip(f"{impl}: {reason}")
    with use_impl(impl):
        return given()


def assert_close(got: Tensor, wanted: Tensor) -> None:
    eps = torch.finfo(got.dtype).eps
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(
        got.double(), wanted, rtol=0, atol=(2 if got.dtype == torch.bfloat16 else 20) * eps * scale
    )


GRID = [(impl, dtype) for impl in IMPLS for dtype in TYPES[impl]]
PACKED = [(1, 32, 96, 4, 2), (3, 160, 64, 5, 4), (2, 96, 32, 3, 3), (4, 64, 2080, 7, 1), (0, 64, 32, 4, 2)]
DENSE = [(1, 7, 5, 3, 2), (3, 33, 17, 5, 4), (4, 20, 48, 4, 4), (1, 130, 1, 2, 1), (2, 1, 9, 2, 2), (0, 5, 3, 2, 1)]


@pytest.mark.parametrize("sizes", PACKED, ids=str)
@pytest.mark.parametrize(("impl", "dtype"), GRID, ids=str)
def test_mxfp4(impl: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    given = case(*sizes, dtype, packed=True)
    got = compute(given, impl)
    assert (got.shape, got.dtype) == (given.x.shape, dtype)
    assert_close(got, oracle(given))


@pytest.mark.parametrize("sizes", DENSE, ids=str)
@pytest.mark.parametrize(("impl", "dtype"), GRID, ids=str)
def test_dense(impl: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    given = case(*sizes, dtype)
    got = compute(given, impl)
    assert (got.shape, got.dtype) == (given.x.shape, dtype)
    assert_close(got, oracle(given))


def test_the_cases_reach_both_ends_of_the_clamp() -> None:
    given = case(3, 160, 64, 5, 4)
    hidden = torch.einsum("nm,eom->neo", given.x, given.gate_up) + given.gate_up_bias
    gate, up = hidden[..., 0::2], hidden[..., 1::2]
    assert min(gate.max(), up.max(), -up.min(), -gate.min()) > LIMIT


@pytest.mark.parametrize("impl", IMPLS)
def test_types_may_differ(impl: str) -> None:
    """fp32 activations over bf16 or packed weights, fp32 router weights over bf16 activations."""
    for packed in (False, True):
        given = case(2, 64, 32, 4, 2, torch.bfloat16, packed=packed)
        given.x, given.down_bias = given.x.float(), given.down_bias.float()
        assert_close(compute(given, impl), oracle(given))
        given = case(2, 64, 32, 4, 2, torch.bfloat16, packed=packed)
        given.weights = given.weights.float()
        assert_close(compute(given, impl), oracle(given))
    mixed = case(2, 64, 32, 4, 2)
    mixed.down = quantize(mixed.down)
    assert_close(compute(mixed, impl), oracle(mixed))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_one_expert_hit_by_all(impl: str, packed: bool) -> None:
    given = case(6, 64, 96, 4, 1, packed=packed)
    given.chosen = torch.full((6, 1), 2)
    assert_close(compute(given, impl), oracle(given))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_experts_that_nobody_chose_do_not_matter(impl: str, packed: bool) -> None:
    given = case(3, 64, 32, 6, 2, packed=packed)
    given.chosen = torch.tensor([[1, 3], [3, 5], [5, 1]])
    wanted = oracle(given)
    idle = torch.tensor([0, 2, 4])
    for weight in (given.gate_up, given.down):
        if isinstance(weight, Mxfp4):
            weight.scales[idle] = 255  # NaN
        else:
            weight[idle] = math.nan
    given.gate_up_bias[idle] = given.down_bias[idle] = math.nan
    assert_close(compute(given, impl), wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_infinity_are_not_hidden(impl: str) -> None:
    """The clamp must not turn NaN into a number."""
    given = case(2, 64, 32, 4, 2, packed=True)
    given.x[1, 3] = math.nan
    got = compute(given, impl)
    assert bool(got[0].isfinite().all())
    assert bool(got[1].isnan().all())


def test_many_tokens_equal_the_same_tokens_one_by_one() -> None:
    """Prefill goes another way than decode: past the number of choices up to which packed bytes are read."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        given = case(70, 64, 96, 4, 2, dtype, packed=True)
        whole = given()
        rows = [
            Case(**{**vars(given), "x": given.x[[n]], "chosen": given.chosen[[n]], "weights": given.weights[[n]]})
            for n in range(70)
        ]
        torch.testing.assert_close(torch.cat([row() for row in rows]), whole, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("impl", IMPLS)
def test_arguments_with_gaps(impl: str) -> None:
    given = case(4, 64, 32, 4, 2, packed=True)
    wanted = oracle(given)
    for name in ("x", "chosen", "weights"):
        tensor = getattr(given, name)
        wide = torch.stack([tensor, torch.zeros_like(tensor)], -1)
        setattr(given, name, wide[..., 0])
    assert not given.x.is_contiguous()
    assert_close(compute(given, impl), wanted)


def test_the_result_does_not_depend_on_the_threads() -> None:
    given = case(3, 320, 256, 6, 4, packed=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(given())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in pairwise(results))


def test_dense_weights_have_gradients() -> None:
    given = case(3, 4, 3, 4, 2, torch.float64)
    chosen = given.chosen
    inputs = [vars(given)[name].requires_grad_() for name in vars(given) if name != "chosen"]

    def run(x: Tensor, weights: Tensor, *others: Tensor) -> Tensor:
        return experts(x, chosen, weights, *others, alpha=ALPHA, limit=LIMIT)

    assert torch.autograd.gradcheck(run, inputs)
    gate_up = inputs[2]
    grad = torch.autograd.grad(run(*inputs).sum(), gate_up)[0]
    idle = sorted(set(range(4)) - set(chosen.flatten().tolist()))
    assert bool((grad[idle] == 0).all())


def test_gradients_flow_through_packed_weights() -> None:
    """To x and to the router: packed weights themselves are frozen."""
    given = case(2, 32, 32, 4, 2, packed=True)
    given.x.requires_grad_(), given.weights.requires_grad_()
    got = torch.autograd.grad(given().square().sum(), (given.x, given.weights))
    dense = Case(
        **{
            **vars(given),
            "gate_up": dequantize(given.gate_up, torch.float32),
            "down": dequantize(given.down, torch.float32),
        }
    )
    for one, two in zip(got, torch.autograd.grad(dense().square().sum(), (given.x, given.weights)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_expert_that_does_not_exist(impl: str, wrong: int) -> None:
    given = case(2, 64, 32, 4, 2, packed=True)
    given.chosen[1, 0] = wrong
    with pytest.raises(ValueError, match=r"experts: chosen holds .* wanted 0 \.\. 3"):
        compute(given, impl)


def test_shapes_that_do_not_belong_together() -> None:
    for name, wrong in {
        "weights": torch.zeros(2, 3),
        "gate_up": torch.zeros(4, 64, 32),
        "down": torch.zeros(4, 32, 64),
        "down_bias": torch.zeros(4, 63),
    }.items():
        given = case(2, 64, 32, 4, 2)
        setattr(given, name, wrong)
        with pytest.raises(ValueError, match=rf"experts: {name} is .*, wanted"):
            given()
    given = case(2, 64, 32, 4, 2)
    given.chosen = given.chosen.int()
    with pytest.raises(ValueError, match=r"chosen is torch\.int32, wanted torch\.int64"):
        given()


def test_native_says_why_not() -> None:
    if kernels.native.unavailable():
        pytest.skip("no compiled kernels here")
    for given, reason in (
        (case(9, 64, 32, 2, 2), "up to 8 choices of an expert, got 18"),
        (case(1, 64, 32, 2, 2, torch.float64), r"takes fp32 or bf16, got torch\.float64"),
        (case(1, 64, 32, 2, 2), "has no gradients"),
    ):
        given.x.requires_grad_(reason == "has no gradients")
        with use_impl("native"), pytest.raises(ImplError, match=reason):
            given()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_residual_is_added(impl: str, packed: bool) -> None:
    given = case(3, 64, 32, 4, 2, packed=packed)
    residual = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    compute(given, impl)  # skips where this implementation cannot run
    with use_impl(impl):
        got = experts(**vars(given), alpha=ALPHA, limit=LIMIT, residual=residual)
    assert_close(got, oracle(given) + residual.double())
    with pytest.raises(ValueError, match=r"experts: residual is \[3, 1\], wanted \[3, 64\]"):
        experts(**vars(given), alpha=ALPHA, limit=LIMIT, residual=residual[:, :1])
