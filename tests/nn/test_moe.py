"""The mixture of experts against the formula, one token and one expert at a time, in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels.mxfp4 import Mxfp4, dequantize, quantize
from longburn.nn import Experts, MoE, Mxfp4Weight, clamped_swiglu

M, HIDDEN, E, K = 64, 96, 7, 3


def filled(storage: str, dtype: torch.dtype, seed: int = 0, **settings: float) -> MoE:
    g = torch.Generator().manual_seed(seed)
    moe = MoE(M, HIDDEN, E, K, storage=storage, dtype=dtype, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
        for module in moe.modules():
            if isinstance(module, Mxfp4Weight):
                shape = module.value.logical_shape
                blocks, scales = quantize(torch.randn(shape, generator=g) * 0.2)
                module.blocks.copy_(blocks)
                module.scales.copy_(scales)
    return moe


def dense(weight: Tensor | Mxfp4Weight) -> Tensor:
    return (dequantize(weight.value, torch.float64) if isinstance(weight, Mxfp4Weight) else weight).double()


def formula(moe: MoE, x: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """Full softmax, renormalised over the k largest: not the way the block goes."""
    gate_up, down = dense(moe.experts.gate_up), dense(moe.experts.down)
    gate_up_bias, down_bias = moe.experts.gate_up_bias.double(), moe.experts.down_bias.double()
    out = []
    for row in x.double().reshape(-1, M):
        p = (moe.router.weight.double() @ row + moe.router.bias.double()).softmax(0)
        chosen = sorted(range(E), key=lambda e, p=p: -float(p[e]))[:K]
        total = sum(p[e] for e in chosen)
        y = torch.zeros(M, dtype=torch.float64)
        for e in chosen:
            h = gate_up[e] @ row + gate_up_bias[e]
            gate = torch.stack([h[2 * i] for i in range(HIDDEN)]).clamp(max=limit)
            up = torch.stack([h[2 * i + 1] for i in range(HIDDEN)]).clamp(-limit, limit)
            y += p[e] / total * (down[e] @ (gate * torch.sigmoid(alpha * gate) * (up + 1)) + down_bias[e])
        out.append(y)
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("storage", ["dense", "mxfp4"])
@pytest.mark.parametrize("shape", [(1, 1, M), (2, 9, M), (M,)])
@pytest.mark.parametrize("settings", [{}, {"alpha": 0.9, "limit": 0.4}], ids=["released", "clamped"])
def test_moe(storage: str, shape: tuple[int, ...], settings: dict[str, float]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        moe = filled(storage, dtype, **settings)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=dtype)
        with torch.no_grad():
            got = moe(x)
            assert (got.shape, got.dtype) == (x.shape, dtype)
            torch.testing.assert_close(got.double(), formula(moe, x, **settings), atol=tolerance, rtol=tolerance)


def test_bf16_is_near_fp32() -> None:
    for storage in ("dense", "mxfp4"):
        moe = filled(storage, torch.bfloat16)
        x = torch.randn(40, M, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
        with torch.no_grad():
            wanted = formula(moe, x)
            error = (moe(x).double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert error.median() < 8e-3  # a token whose router logits nearly tie may take another expert


def test_weights_of_the_chosen_sum_to_one_and_fall() -> None:
    moe = filled("dense", torch.float32)
    chosen, weights = moe.route(torch.randn(20, M))
    assert (chosen.shape, weights.shape) == ((20, K), (20, K))
    torch.testing.assert_close(weights.sum(-1), torch.ones(20))
    assert (weights.diff(dim=-1) <= 0).all()
    assert all(len(set(row)) == K for row in chosen.tolist())


def test_gradients_reach_x_router_and_experts() -> None:
    torch.manual_seed(0)
    moe = MoE(4, 3, 3, 2, limit=0.5, dtype=torch.float64)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*moe.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


def test_clamped_swiglu() -> None:
    both = torch.tensor([[9.0, 20.0, -9.0, -20.0, 0.5, 0.25]], dtype=torch.float64)
    gate, up = torch.tensor([7.0, -9.0, 0.5]).double(), torch.tensor([7.0, -7.0, 0.25]).double()
    torch.testing.assert_close(clamped_swiglu(both), (F.silu(1.702 * gate) / 1.702 * (up + 1))[None])


def test_names_and_types_of_the_storages() -> None:
    names = ["gate_up_bias", "down_bias"]
    assert sorted(Experts(M, HIDDEN, E).state_dict()) == sorted([*names, "gate_up", "down"])
    packed = Experts(M, HIDDEN, E, storage="mxfp4", dtype=torch.bfloat16, device="meta")
    halves = [f"{weight}.{half}" for weight in ("gate_up", "down") for half in ("blocks", "scales")]
    assert sorted(packed.state_dict()) == sorted([*names, *halves])
    state = packed.to(torch.float32).state_dict()
    assert state["gate_up.blocks"].shape == (E, 2 * HIDDEN, M // 32, 16)
    assert state["down.scales"].shape == (E, M, HIDDEN // 32)
    assert {state[name].dtype for name in halves} == {torch.uint8}
    assert all(tensor.is_meta for tensor in state.values())
    assert isinstance(Mxfp4Weight(2, 32).value, Mxfp4)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"MoE: 4 of 3 experts, wanted at least 1 and at most all"):
        MoE(8, 8, 3, 4)
    with pytest.raises(ValueError, match=r"Mxfp4Weight: rows of 40 values, wanted a multiple of 32; store it dense"):
        Experts(40, 32, 2, storage="mxfp4")
