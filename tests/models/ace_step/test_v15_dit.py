"""The diffusion transformer against diffusers' own class, and what sampling relies on."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from v15_peers import ACOUSTIC, assert_parity, diffusers_parts, ours_of, randn, tiny_config

from longburn import CrossAttention
from longburn.attention import core
from longburn.kernels.attend import AttendCall, triton
from longburn.kernels.attend.call import AttendResult
from longburn.models.ace_step.v15 import AceStep15, AceStepDiT, Modulation

Pair = tuple[nn.Module, AceStepDiT]


@pytest.fixture(scope="module")
def pairs() -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def pair(shape: str) -> Pair:
        if shape not in made:
            parts = diffusers_parts(shape)
            made[shape] = parts["transformer"], ours_of(parts, shape).dit
        return made[shape]

    return pair


def data(dit: AceStepDiT, B: int, N: int, S: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    C = dit.config.encoder_hidden_size
    return randn(B, N, ACOUSTIC), randn(B, N, 2 * ACOUSTIC, seed=2), randn(B, S, C, seed=3)


def theirs_of(peer: nn.Module, x: Tensor, t: Tensor, context: Tensor, hidden: Tensor) -> Tensor:
    return peer(x, t, t, hidden, context, return_dict=False)[0]


@pytest.mark.parametrize("shape", ["2b", "xl"])
@pytest.mark.parametrize(
    ("B", "N"), [(1, 1), (1, 2), (2, 7), (2, 30), (1, 35), (3, 61), (1, 120)], ids=lambda n: str(n)
)
@torch.no_grad()
def test_any_number_of_frames(pairs: Callable[[str], Pair], shape: str, B: int, N: int) -> None:
    """Odd numbers, fewer tokens than the window has neighbours, and several windows."""
    peer, dit = pairs(shape)
    x, context, hidden = data(dit, B, N)
    t = torch.linspace(0.95, 0.1, B)
    wanted = theirs_of(peer, x, t, context, hidden)
    got = dit(x, t, context, dit.conditions(hidden))
    assert got.shape == (B, N, ACOUSTIC)
    assert_parity(got, wanted)


@pytest.mark.parametrize("shape", ["2b", "xl"])
@torch.no_grad()
def test_nothing_but_rounding_differs(pairs: Callable[[str], Pair], shape: str) -> None:
    """In fp64, where the peer's angles are still fp32."""
    peer, dit = (copy.deepcopy(module).double() for module in pairs(shape))
    x, context, hidden = (x.double() for x in data(dit, 2, 61))
    t = torch.tensor([0.9, 0.3], dtype=torch.float64)
    wanted = theirs_of(peer, x, t, context, hidden)
    assert_parity(dit(x, t, context, dit.conditions(hidden)), wanted, 5e-7)


@pytest.mark.parametrize("S", [1, 40])
@torch.no_grad()
def test_conditions_are_projected_once(pairs: Callable[[str], Pair], S: int, monkeypatch: pytest.MonkeyPatch) -> None:
    peer, dit = pairs("xl")
    x, context, hidden = data(dit, 2, 31, S)
    held = dit.conditions(hidden)
    monkeypatch.setattr(CrossAttention, "keys_values", None)  # from here on, nobody may
    for t in (1.0, 0.7, 0.3):
        wanted = theirs_of(peer, x, torch.full((2,), t), context, hidden)
        assert_parity(dit(x, t, context, held), wanted)
    assert held[0].k.shape == held[0].v.shape == (2, 2, S, 16)


@torch.no_grad()
def test_a_timestep_is_a_number_a_tensor_or_what_it_modulates(pairs: Callable[[str], Pair]) -> None:
    _, dit = pairs("2b")
    x, context, hidden = data(dit, 2, 13)
    held = dit.conditions(hidden)
    ts = (1.0, 0.9545454, 0.3)
    tabulated = dit.modulations(ts)
    assert [tuple(m.layers.shape) for m in tabulated] == [(1, 4, 6, 64)] * 3
    for t, modulation in zip(ts, tabulated, strict=True):
        assert isinstance(modulation, Modulation)
        by_number = dit(x, t, context, held)
        assert_parity(dit(x, modulation, context, held), by_number)
        assert_parity(dit(x, torch.tensor([t]), context, held), by_number)
    assert not torch.allclose(dit(x, ts[0], context, held), dit(x, ts[2], context, held), atol=1e-2)


@torch.no_grad()
def test_a_row_with_padding_is_what_it_is_alone(pairs: Callable[[str], Pair]) -> None:
    peer, dit = pairs("2b")
    x, context, hidden = data(dit, 2, 15)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 4:] = False
    poisoned = hidden.masked_fill(~mask[..., None], float("nan"))
    got = dit(x, 0.5, context, dit.conditions(poisoned, mask))
    t = torch.tensor([0.5])
    assert_parity(got[:1], theirs_of(peer, x[:1], t, context[:1], hidden[:1]))
    assert_parity(got[1:], theirs_of(peer, x[1:], t, context[1:], hidden[1:, :4]))


@torch.no_grad()
def test_attention_is_left_to_the_kernels_for_gpus(
    pairs: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host knows where queries and keys stand, so no kernel has to look: a window by positions, and no mask."""
    _, dit = pairs("2b")
    seen: list[AttendCall] = []
    run = core.kernels.run

    def spy(call: AttendCall) -> AttendResult:
        seen.append(call)
        return run(call)

    monkeypatch.setattr(core.kernels, "run", spy)
    x, context, hidden = data(dit, 2, 61)
    dit(x, 0.7, context, dit.conditions(hidden))
    assert [(call.window, call.lookahead) for call in seen] == [(9, 8), (None, None), (None, None), (None, None)] * 2
    for call in seen:
        assert call.bias is None
        assert call.known is not None
        (known,) = call.known
        assert (known.q_count, known.keys, known.ordered) == (31, call.k.shape[2], True)
        assert triton.why_not(call) == "needs CUDA, got cpu"


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@torch.no_grad()
def test_no_mask_of_all_pairs_is_made() -> None:
    torch.manual_seed(0)
    config = tiny_config("2b")
    dit = AceStep15(config).dit.eval()
    dit.layers = dit.layers[:2]
    L = 3600
    x, context, hidden = data(dit, 1, 2 * L)
    held = dit.conditions(hidden)
    with Largest() as largest:
        assert dit(x, 0.5, context, held).isfinite().all()
    assert largest.elements < L * L


def test_gradients_reach_every_weight() -> None:
    torch.manual_seed(0)
    dit = AceStep15(tiny_config("xl")).dit
    x, context, hidden = data(dit, 2, 21)
    dit(x, torch.tensor([0.9, 0.2]), context, dit.conditions(hidden)).square().sum().backward()
    # r = t in sampling: the second time is 0, whose first half of sinusoids is 1 and second half 0.
    assert not [name for name, p in dit.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_what_it_refuses(pairs: Callable[[str], Pair]) -> None:
    _, dit = pairs("2b")
    x, context, hidden = data(dit, 2, 6)
    held = dit.conditions(hidden)
    with pytest.raises(ValueError, match=r"x is \(2, 6, 8\) and context_latents \(2, 5, 16\), wanted \[B, N, 8\]"):
        dit(x, 0.5, context[:, :5], held)
    with pytest.raises(ValueError, match=r"x is \(2, 0, 8\) and .* with at least one frame"):
        dit(x[:, :0], 0.5, context[:, :0], held)
    with pytest.raises(ValueError, match=r"x is \(6, 8\)"):
        dit(x[0], 0.5, context, held)
    with pytest.raises(ValueError, match=r"timesteps of 3 rows beside 2 rows of x"):
        dit(x, torch.rand(3), context, held)
    with pytest.raises(ValueError, match=r"conditions for 3 layers of 2 rows, wanted 4 layers of 2 rows"):
        dit(x, 0.5, context, held[:3])
    with pytest.raises(ValueError, match=r"conditions for 4 layers of 1 rows, wanted 4 layers of 2 rows"):
        dit(x, 0.5, context, dit.conditions(hidden[:1]))
    with pytest.raises(ValueError, match=r"AceStepDiT.conditions: hidden is \(2, 11, 9\), wanted \[B, S, 64\]"):
        dit.conditions(hidden[..., :9])
