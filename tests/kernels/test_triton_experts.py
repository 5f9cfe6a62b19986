"""Experts, routing and unpacking on the GPU, in Triton's interpreter at small sizes and on the device at large ones."""

import math
from typing import Any

import pytest
import torch
from compute import compute
from covering import every_pair
from test_experts import ALPHA, LIMIT, Case, assert_close, case, oracle
from torch import Tensor

from longburn import use_impl
from longburn.kernels import experts as kernels
from longburn.kernels import route as routing
from longburn.kernels.experts import ExpertsCall
from longburn.kernels.mxfp4 import DEQUANTIZE, DequantizeCall, Mxfp4, dequantize, quantize
from longburn.kernels.registry import Operation
from longburn.kernels.route import RouteCall

cuda = pytest.mark.cuda
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, M, I, E, k: odd N, M != I, E no power of two, rows that end within a tile, more choices than one program sorts.
SMALL = [(1, 32, 96, 5, 4), (3, 160, 64, 5, 4), (7, 96, 32, 3, 3), (4, 64, 544, 7, 1), (0, 64, 32, 4, 2)]
MANY = (150, 64, 32, 3, 2)


def moved(x: Any, device: str) -> Any:
    """Tensors, and the tuples that hold them, on another device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, tuple):
        parts = [moved(part, device) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def computed(operation: Operation[Any, Any], call: Any) -> Any:
    """What Triton makes of the call: on a GPU where there is one, else in the interpreter."""
    return moved(compute(operation, "triton", moved(call, DEVICE)), "cpu")


def with_residual(given: Case, seed: int = 0) -> ExpertsCall:
    residual = torch.randn(given.x.shape, generator=torch.Generator().manual_seed(seed)).to(given.x.dtype)
    return given.call._replace(residual=residual)


@pytest.mark.parametrize(("sizes", "dtype", "packed"), every_pair([*SMALL, MANY], TYPES, [True, False]))
def test_small(sizes: tuple[int, ...], dtype: torch.dtype, packed: bool) -> None:
    given = case(*sizes, dtype, packed=packed)
    call = with_residual(given)
    got = computed(kernels.OPERATION, call)
    assert (got.shape, got.dtype) == (given.x.shape, dtype)
    assert_close(got, oracle(given) + call.residual.double())


@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_one_expert_for_all_and_others_for_nobody(dtype: torch.dtype) -> None:
    """Idle experts hold NaN; the busy one fills several tiles, the last in part."""
    given = case(41, 64, 96, 6, 2, dtype, packed=True)
    given.chosen = torch.stack([torch.full((41,), 4), torch.arange(41) % 2], 1)
    wanted = oracle(given)
    idle = torch.tensor([2, 3, 5])
    given.gate_up.scales[idle] = given.down.scales[idle] = 255
    given.gate_up_bias[idle] = given.down_bias[idle] = math.nan
    assert_close(computed(kernels.OPERATION, given.call), wanted)


def test_an_expert_twice_in_one_token() -> None:
    given = case(3, 64, 32, 4, 3, packed=True)
    given.chosen = torch.tensor([[1, 1, 1], [2, 0, 2], [3, 3, 1]])
    assert_close(computed(kernels.OPERATION, given.call), oracle(given))


@pytest.mark.parametrize(("up", "down"), [(True, False), (False, True)])
def test_one_weight_packed(up: bool, down: bool) -> None:
    given = case(5, 64, 96, 3, 2)
    given.gate_up = quantize(given.gate_up) if up else given.gate_up.bfloat16()
    given.down = quantize(given.down) if down else given.down.bfloat16()
    assert_close(computed(kernels.OPERATION, given.call), oracle(given))


def test_unpacking_first_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from longburn.kernels.triton import experts_grouped

    given = case(37, 64, 96, 3, 2, packed=True)
    wanted = computed(kernels.OPERATION, given.call)
    monkeypatch.setattr(experts_grouped, "UNPACK_FROM", 0)
    torch.testing.assert_close(computed(kernels.OPERATION, given.call), wanted)


def test_nan_is_not_hidden_by_the_clamp() -> None:
    given = case(3, 64, 32, 4, 2, packed=True)
    given.x[1, 3] = math.nan
    got = computed(kernels.OPERATION, given.call)
    assert bool(got[[0, 2]].isfinite().all())
    assert bool(got[1].isnan().all())


def test_experts_beyond_those_there_are_count_as_the_nearest() -> None:
    given = case(2, 64, 32, 4, 2, packed=True)
    given.chosen = torch.tensor([[-5, 1], [2, 9]])
    got = computed(kernels.OPERATION, given.call)
    given.chosen = torch.tensor([[0, 1], [2, 3]])
    assert_close(got, oracle(given))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(("n", "k", "count"), [(1, 4, 6), (300, 3, 5), (129, 1, 256)])
def test_sorting(n: int, k: int, count: int, tokens: int) -> None:
    """Each choice once, in the order of experts and within one in its own order; tiles cover them, and end at one."""
    from longburn.kernels.triton.sort import sort

    chosen = torch.randint(0, count, (n, k), generator=torch.Generator().manual_seed(n))
    chosen[chosen == 1] = 0  # nobody takes 1, many take 0
    with use_impl("triton"):
        order, back, ends, table = moved(sort(chosen.to(DEVICE), count, tokens), "cpu")
    flat = chosen.flatten()
    assert order.tolist() == flat.argsort(stable=True).tolist()
    assert order[back].tolist() == list(range(n * k))
    assert ends.tolist() == flat.bincount(minlength=count).cumsum(0).tolist()
    rows = []
    for expert, first, end in table.tolist():
        if expert >= 0:
            mine = list(range(first, min(first + tokens, end)))
            assert mine
            assert {int(flat[order[row]]) for row in mine} == {expert}
            rows += mine
    assert rows == list(range(n * k))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("n", "count", "k"), [(1, 32, 4), (5, 5, 5), (300, 7, 2), (0, 4, 2), (3, 129, 1)])
def test_routing(n: int, count: int, k: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(n + count)
    logits = torch.stack([torch.randperm(count, generator=g) for _ in range(n)]) if n else torch.zeros(0, count)
    logits = (logits / 7 - 3).to(dtype)  # no two are equal
    chosen, weights = computed(routing.OPERATION, RouteCall(logits, k))
    wanted_chosen, wanted = routing.OPERATION.impls[-1].run(RouteCall(logits, k))
    assert torch.equal(chosen, wanted_chosen)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, wanted)


def test_routing_among_equals_and_infinities() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0], [-math.inf, 2.0, -math.inf, -math.inf, 1.0]])
    chosen, weights = computed(routing.OPERATION, RouteCall(logits, 4))
    assert sorted(chosen[0].tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(weights[0], torch.full((4,), 0.25))
    assert chosen[1, :2].tolist() == [1, 4]
    assert len(set(chosen[1].tolist())) == 4
    torch.testing.assert_close(weights[1], torch.tensor([2.0, 1.0, -math.inf, -math.inf]).softmax(-1))
    _, weights = computed(routing.OPERATION, RouteCall(torch.tensor([[math.nan, 1.0, 2.0]]), 2))
    assert bool(weights.isnan().all())


def test_refusals_name_their_reason() -> None:
    given = case(2, 64, 32, 4, 2)
    with use_impl("triton"):
        why = kernels.OPERATION.impls[[impl.name for impl in kernels.OPERATION.impls].index("triton")].why_not
        wrong = case(2, 64, 32, 4, 2, torch.float64)
        assert "takes fp32, bf16 or fp16, got torch.float64" in (why(wrong.call) or "")
        given.x.requires_grad_()
        assert "has no gradients" in (why(given.call) or "")
        given.x = given.x.detach()
        given.down = given.down.transpose(1, 2).contiguous().transpose(1, 2)
        assert "a weight has gaps" in (why(given.call) or "")
    assert "needs CUDA, got cpu" in (why(case(2, 64, 32, 4, 2).call) or "")


# On the device.


def large(n: int, m: int, i: int, e: int, k: int, dtype: torch.dtype, low: int = 115, high: int = 122) -> ExpertsCall:
    """Random bytes, with weights of the size that trained ones have, or with scale bytes from `low` on."""
    g = torch.Generator("cuda").manual_seed(n + i)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device="cuda").to(dtype)

    def packed(*shape: int) -> Mxfp4:
        scales = (*shape[:-1], shape[-1] // 32)
        blocks = torch.randint(0, 256, (*scales, 16), generator=g, device="cuda", dtype=torch.uint8)
        return Mxfp4(blocks, torch.randint(low, high, scales, generator=g, device="cuda", dtype=torch.uint8))

    chosen = torch.rand(n, e, generator=g, device="cuda").topk(k, 1).indices
    weights = torch.rand(n, k, generator=g, device="cuda").softmax(-1)
    given = (packed(e, 2 * i, m), normal(e, 2 * i), packed(e, m, i), normal(e, m))
    return ExpertsCall(normal(n, m), chosen, weights, *given, ALPHA, LIMIT, normal(n, m))


def exact(call: ExpertsCall) -> Tensor:
    def wide(value: object) -> object:
        if isinstance(value, Mxfp4):
            return dequantize(value, torch.float64)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return kernels.OPERATION.impls[-1].run(ExpertsCall(*map(wide, call)))


def assert_as_exact_as_the_reference(call: ExpertsCall) -> None:
    wanted = exact(call)
    (ours, theirs) = ((run(call).double() - wanted).abs() for run in (run_poisoned, kernels.OPERATION.impls[-1].run))
    assert not ours.isnan().any()
    assert ours.mean() <= 1.1 * theirs.mean() + 1e-7 * wanted.abs().mean()
    assert ours.max() <= 2 * theirs.max() + 1e-6 * wanted.abs().max()


def run_poisoned(call: ExpertsCall) -> Tensor:
    """What the kernels give when all memory that they allocate holds NaN before."""
    torch.full((1 << 26,), math.nan, device="cuda")
    return compute(kernels.OPERATION, "triton", call)


@cuda
@pytest.mark.parametrize("n", [1, 2, 3, 8, 32, 100, 600, 2100])
def test_the_sizes_of_gpt_oss(n: int) -> None:
    assert_as_exact_as_the_reference(large(n, 2880, 2880, 32, 4, torch.bfloat16))


@cuda
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1, 96, 160, 5, 3), (2, 2080, 32, 3, 3), (9, 64, 96, 7, 1), (33, 160, 64, 6, 5), (400, 96, 64, 3, 2)],
    ids=str,
)
def test_other_sizes(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_exact_as_the_reference(large(*sizes, dtype))


@cuda
@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("scales", [(66, 90), (127, 150), (170, 193)], ids=str)
def test_every_scale(scales: tuple[int, int], n: int) -> None:
    """Of the second weight, whose values may be tiny or huge without a change of the activations."""
    call = large(n, 96, 160, 5, 3, torch.bfloat16)
    call = call._replace(down=Mxfp4(call.down.blocks, torch.randint_like(call.down.scales, *scales)), residual=None)
    call.down_bias.zero_()
    wanted, got = exact(call), run_poisoned(call).double()
    assert wanted.abs().max() > 0
    assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max()


@cuda
@pytest.mark.parametrize("n", [1, 8, 40, 600])
def test_a_graph_gives_the_same_bits_for_other_routes(n: int) -> None:
    call, other = large(n, 96, 64, 8, 4, torch.bfloat16), large(n, 96, 64, 8, 4, torch.bfloat16)
    other = other._replace(x=torch.randn_like(call.x), chosen=(call.chosen + 3) % 8)
    wanted = run_poisoned(call._replace(x=other.x, chosen=other.chosen))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernels.OPERATION(call)
    call.x.copy_(other.x)
    call.chosen.copy_(other.chosen)
    graph.replay()
    assert torch.equal(got, wanted)


@cuda
def test_unpacking_is_exact_on_the_device() -> None:
    places = torch.arange(256, dtype=torch.uint8, device="cuda").view(16, 16)
    blocks = torch.cat([places.roll(shift, 1) for shift in range(16)]).expand(256, 256, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8, device="cuda")[:, None].expand(256, 256).contiguous()
    for dtype in TYPES:
        call = DequantizeCall(Mxfp4(blocks, scales), dtype)
        got, wanted = compute(DEQUANTIZE, "triton", call), DEQUANTIZE.impls[-1].run(call)
        assert torch.equal(got.nan_to_num(7, 8, 9), wanted.nan_to_num(7, 8, 9))


@cuda
@pytest.mark.parametrize("n", [1, 33, 5000])
def test_routing_on_the_device(n: int) -> None:
    logits = torch.rand(n, 128, device="cuda").argsort(-1) / 7.0
    chosen, weights = compute(routing.OPERATION, "triton", RouteCall(logits, 4))
    wanted_chosen, wanted = routing.OPERATION.impls[-1].run(RouteCall(logits, 4))
    assert torch.equal(chosen, wanted_chosen)
    torch.testing.assert_close(weights, wanted)
