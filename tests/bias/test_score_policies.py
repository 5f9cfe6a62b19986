"""CoPE and DAPE: the papers' formulas in loops, over streams, rings and kept sink tokens."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from bias_streams import WINDOWS, D, H, K, Row, largest_difference, layer, randomise, streamed, tokens, wanted
from torch import Tensor

from longburn import Alibi, Attention, AttnWindow, RotaryEncoding, attend
from longburn.attention import core
from longburn.bias import BiasContext, Cope, Dape, Fire, ForgetBias, KerpleLog, Policy, T5Buckets

double = torch.float64


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cope_paper(policy: Cope) -> Callable[[Row], np.ndarray]:
    embedding = policy.pos_emb.detach().numpy()
    farthest = embedding.shape[1] - 1

    def bias(row: Row) -> np.ndarray:
        def one(h: int, p: int, j: int) -> float:
            place = min(farthest, sum(sigmoid(row.scores[h, p, k]) for k in row.seen[p] if k >= j))
            low, high = math.floor(place), math.ceil(place)
            ends = [float(row.q[h, p] @ embedding[:, at]) for at in (low, high)]
            return (place - low) * ends[1] + (1 - place + low) * ends[0]

        return row.fill(one)

    return bias


def dape_paper(policy: Dape, base: Callable[[int, int, int], float]) -> Callable[[Row], np.ndarray]:
    first, first_bias, second, second_bias = (x.detach().numpy() for x in policy.mlp.parameters())

    def bias(row: Row) -> np.ndarray:
        matrix = np.zeros_like(row.scores)
        for p, keys in enumerate(row.seen):
            for j in keys:
                both = [*row.scores[:, p, j], *(base(h, p, j) for h in range(H))]
                hidden = first @ np.array(both) + first_bias
                hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
                matrix[:, p, j] = both[H:] + second @ hidden + second_bias
        return matrix

    return bias


def cope(positions: int = 5) -> Cope:
    return randomise(Cope(D, positions, dtype=double), scale=0.5).requires_grad_(False)


def dape(base: object = None) -> Dape:
    base = base or Alibi(H, slopes=torch.tensor([0.5, 0.25, 0.1, 0.9], dtype=double))
    made = Dape(base, H, width=7, dtype=double)
    randomise(made.mlp, scale=0.5)
    return made.requires_grad_(False)


def alibi(policy: Dape) -> Callable[[int, int, int], float]:
    return lambda h, p, j: -float(policy.base.slopes[h]) * abs(p - j)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("positions", "sinks"), [(1, False), (4, False), (4, True), (64, True)])
def test_cope_equals_the_formula_in_loops(window: AttnWindow, sinks: bool, positions: int) -> None:
    policy = cope(positions)
    assert largest_difference(layer(window, sinks=sinks), policy, cope_paper(policy)) < 1e-11


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [*WINDOWS, AttnWindow.two_sided(3, 2)], ids=str)
def test_dape_equals_the_formula_in_loops(window: AttnWindow, sinks: bool) -> None:
    policy = dape()
    assert largest_difference(layer(window, sinks=sinks), policy, dape_paper(policy, alibi(policy))) < 1e-11


def test_dape_over_other_biases() -> None:
    """Whichever form the base takes for a call."""
    made = layer(AttnWindow(7, sink_tokens=2))
    t5 = randomise(T5Buckets(H, buckets=4, max_distance=9, dtype=double))
    fire = Fire(H, length=8.0, dtype=double).requires_grad_(False)
    log = KerpleLog(H, dtype=double)

    def of(policy: Policy) -> Callable[[int, int, int], float]:
        def one(h: int, p: int, j: int) -> float:
            context = BiasContext(torch.tensor([[p]]), torch.tensor([[j]]), torch.zeros(1, H, 1, D, dtype=double))
            terms = policy.terms(context)
            return float(
                terms.table[h, 0] if terms.table is not None and terms.table.shape[1] == 1 else terms.key[0, h, 0]
            )

        return one

    for base in (fire, log):
        policy = dape(base)
        assert largest_difference(made, policy, dape_paper(policy, of(base))) < 1e-11
    policy = dape(t5)
    near = lambda h, p, j: t5.at(torch.tensor(p - j), double)[h].item()  # noqa: E731
    assert largest_difference(made, policy, dape_paper(policy, near)) < 1e-11


def test_relative_sinks_count_with_the_scores_that_attend() -> None:
    """Kept sink tokens are seen from a clamped distance: CoPE's gates are of those scores, too."""
    window = AttnWindow(5, sink_tokens=2, relative_sinks=True)
    made = layer(window, rope=RotaryEncoding(D, theta=50.0))
    policy, x = cope(), tokens(20)
    with torch.no_grad():
        found = made(x[None], bias=policy)[0]
        q, k, v = (t[0] for t in made_heads(made, x))
        out = torch.zeros(20, H, D, dtype=double)
        for p in range(20):
            keys = [j for j in range(p + 1) if p - j < 5 or j < 2]
            for h in range(H):
                rows = []
                for j in keys:
                    at = min(p, 6) if j < 2 else p
                    rows.append(float(turned(made, q[h, p], at) @ turned(made, k[h // (H // K), j], j)) * made.scale)
                own = turned(made, q[h, p], p).numpy()
                scores = np.zeros((1, 1, 20))
                scores[0, 0, keys] = rows
                bias = cope_paper(policy)(Row(own[None, None], scores, [keys]))[0, 0, keys]
                weights = torch.tensor(np.array(rows) + bias).softmax(0)
                out[p, h] = weights @ v[h // (H // K), keys]
    assert (out.reshape(20, -1) @ made.out.weight.T - found).abs().max() < 1e-11


def made_heads(made: Attention, x: Tensor) -> tuple[Tensor, ...]:
    heads = (x @ made.qkv.weight.T).view(1, x.shape[0], -1, D).transpose(1, 2)
    return heads[:, :H], heads[:, H : H + K], heads[:, H + K :]


def turned(made: Attention, x: Tensor, position: int) -> Tensor:
    angles = made.rope.angles(torch.tensor([[position]]), double)
    return made.rope.rotate(x[None, None, None], angles)[0, 0, 0]


def test_a_ring_counts_in_order_of_position() -> None:
    """The same keys in any order of slots give the same numbers, beside empty slots of NaN."""
    g = torch.Generator().manual_seed(0)
    policy = cope()
    q, k, v = (torch.randn(2, n, s, D, generator=g, dtype=double) for n, s in ((H, 3), (K, 12), (K, 12)))
    q_pos, k_pos = torch.tensor([[9, 10, 11]]), torch.arange(12)[None]
    straight = attend(q, k, v, q_pos=q_pos, k_pos=k_pos, bias=policy)
    order = torch.randperm(12, generator=g)
    hole = torch.full((2, K, 2, D), float("nan"), dtype=double)
    mixed = attend(
        *(q, torch.cat([k[:, :, order], hole], 2), torch.cat([v[:, :, order], hole], 2)),
        q_pos=q_pos,
        k_pos=torch.cat([k_pos[:, order], torch.full((1, 2), -1)], 1),
        bias=policy,
    )
    assert (mixed - straight).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["cope", "dape"])
def test_rows_are_written_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = cope() if name == "cope" else dape()
    made, x = layer(AttnWindow(7, sink_tokens=2)), tokens(1, 30)
    with torch.no_grad():
        whole = made(x, bias=policy)
        sizes: list[int] = []
        terms = policy.terms
        monkeypatch.setattr(policy, "terms", lambda c: sizes.append(c.q.shape[2]) or terms(c))
        monkeypatch.setattr(core, "ROWS", 4 * H * 30)
        assert (made(x, bias=policy) - whole).abs().max() < 1e-12
    assert sizes == [4] * 7 + [2]


@pytest.mark.parametrize("name", ["cope", "dape"])
@pytest.mark.parametrize("window", [AttnWindow(), AttnWindow(3, sink_tokens=1)], ids=str)
def test_gradients_reach_everything(name: str, window: AttnWindow) -> None:
    policy = (cope() if name == "cope" else dape()).requires_grad_(True)
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, n, 6, D, generator=g, dtype=double) for n in (H, K, K))
    parameters = dict(policy.named_parameters())

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = policy

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return attend(q, k, v, bias=self.policy, window=window)

    called = Called()

    def function(q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        named = {f"policy.{n}": p for n, p in zip(parameters, given, strict=True)}
        return torch.func.functional_call(called, named, (q, k))

    start = [x.detach().clone().requires_grad_() for x in (q, k, *parameters.values())]
    assert torch.autograd.gradcheck(function, start, fast_mode=True)
    gradients = torch.autograd.grad(function(*start).square().sum(), start)
    last = -1 if name == "dape" else len(gradients)  # DAPE's last number of a head is the same for all keys
    assert all((gradient != 0).any() for gradient in gradients[:last])


@pytest.mark.parametrize("window", [AttnWindow(), AttnWindow(7, sink_tokens=2)], ids=str)
@pytest.mark.parametrize("name", ["cope", "dape", "fire", "t5"])
def test_a_layer_owns_its_bias(name: str, window: AttnWindow) -> None:
    """Its parameters are the layer's, and its streams those of a bias that every call is given."""
    policy = {
        "cope": cope,
        "dape": dape,
        "fire": lambda: Fire(H, length=8.0, dtype=double).requires_grad_(False),
        "t5": lambda: randomise(T5Buckets(H, dtype=double)).requires_grad_(False),
    }[name]()
    made, plain, x = layer(window, bias=policy), layer(window), tokens(30)
    assert {f"bias.{n}" for n in policy.state_dict()} == set(made.state_dict()) - set(plain.state_dict())
    whole = plain(x[None], bias=policy)[0]
    assert (made(x[None])[0] - whole).abs().max() < 1e-12
    assert (streamed(made, None, [x], (2, 11))[0] - whole).abs().max() < 1e-11


def test_without_an_embedding_cope_is_nothing() -> None:
    made, x = layer(AttnWindow(7)), tokens(20)
    with torch.no_grad():
        assert (made(x[None], bias=Cope(D, 9, dtype=double))[0] - made(x[None])[0]).abs().max() < 1e-12
        assert (wanted(made, x, lambda row: 0 * row.scores) - made(x[None])[0]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Cope(0, 4), "Cope: head_dim 0, positions 4: wanted at least 1 of each"),
        (lambda: Dape(Alibi(4), 4, width=0), "Dape: heads 4, width 0: wanted at least 1 of each"),
        (lambda: layer(AttnWindow())(tokens(1, 3), bias=Cope(3, 4)), "the layer has head_dim 6, Cope was built for 3"),
        (
            lambda: layer(AttnWindow())(tokens(1, 3), bias=Dape(Alibi(3), 3)),
            "the layer has heads 4, Dape was built for 3",
        ),
        (
            lambda: layer(AttnWindow(lookahead=2))(tokens(1, 3), bias=cope()),
            "Cope: lookahead 2, block 1: it is about the keys up to the query",
        ),
        (lambda: layer(AttnWindow(block=4))(tokens(1, 3), bias=cope()), "Cope: lookahead 0, block 4"),
    ],
)
def test_what_they_refuse(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_dape_refuses_a_base_with_numbers_of_its_own() -> None:
    with pytest.raises(ValueError, match="Dape: ForgetBias keeps 2 numbers for every token"):
        Dape(ForgetBias(8, 2), 4)
