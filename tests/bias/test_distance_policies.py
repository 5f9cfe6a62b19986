"""T5's buckets, KERPLE and Sandwich: the papers' formulas, transformers' T5, streams, and which form they take."""

import math

import numpy as np
import pytest
import torch
from bias_streams import WINDOWS, H, Row, largest_difference, layer, randomise, streamed, tokens
from torch import Tensor, nn

from longburn import Attention, AttnWindow, attend
from longburn.bias import BiasContext, BiasTerms, KerpleLog, KerplePower, Policy, Sandwich, T5Buckets
from longburn.kernels.attend import Known


def kerple(policy: KerpleLog | KerplePower, heads: int = H) -> KerpleLog | KerplePower:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        policy.p.copy_(0.2 + 1.6 * torch.rand(heads, generator=g, dtype=torch.float64))
        policy.a.copy_(0.1 + torch.rand(heads, generator=g, dtype=torch.float64))
    return policy


def t5_bucket(distance: int, buckets: int, farthest: int, both: bool) -> int:
    """The paper's rule for a key that many positions back (negative: later)."""
    first = 0
    if both:
        buckets //= 2
        first, distance = (buckets, -distance) if distance < 0 else (0, distance)
    distance = max(distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    steps = math.log(distance / exact) / math.log(farthest / exact) * (buckets - exact)
    return first + min(buckets - 1, exact + int(steps + 1e-9))


def of_distance(policy: Policy, h: int, distance: int) -> float:
    """The bias of head h (from 0), straight from the formulas."""
    if isinstance(policy, T5Buckets):
        buckets, farthest = policy.weight.shape[0], policy.ends[1]
        return policy.weight[t5_bucket(distance, buckets, farthest, policy.ends[0] < 0), h].item()
    if isinstance(policy, KerpleLog):
        return -policy.p[h].item() * math.log(1 + policy.a[h].item() * abs(distance))
    if isinstance(policy, KerplePower):
        return -policy.a[h].item() * abs(distance) ** policy.p[h].item()
    assert isinstance(policy, Sandwich)
    dim = 2 * len(policy.frequencies)
    total = sum(math.cos(distance * 10000 ** (-2 * k / dim)) for k in range(dim // 2))
    return policy.heads / (8 * (h + 1)) * total


def policies() -> dict[str, Policy]:
    double = torch.float64
    return {
        "t5": randomise(T5Buckets(H, buckets=8, max_distance=12, dtype=double)),
        "t5, both sides": randomise(T5Buckets(H, buckets=8, max_distance=12, bidirectional=True, dtype=double)),
        "kerple log": kerple(KerpleLog(H, dtype=double)),
        "kerple power": kerple(KerplePower(H, dtype=double)),
        "sandwich": Sandwich(H, dim=16),
    }


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [*WINDOWS, AttnWindow.two_sided(3, 2), AttnWindow.two_sided()], ids=str)
@pytest.mark.parametrize("name", policies())
def test_streams_equal_the_formula_in_loops(name: str, window: AttnWindow, sinks: bool) -> None:
    policy = policies()[name]

    def bias(row: Row) -> np.ndarray:
        return row.fill(lambda h, p, j: of_distance(policy, h, p - j))

    assert largest_difference(layer(window, sinks=sinks), policy, bias) < 1e-12


BUCKETS = [(32, 128), (32, 1000), (16, 64), (8, 20), (64, 2048), (6, 30), (32, 256)]


@pytest.mark.parametrize(
    ("buckets", "farthest", "both"),
    [(*one, both) for one in BUCKETS for both in (False, True) if not (both and one[0] % 4)],  # pairs in both halves
)
def test_buckets_are_those_of_transformers(buckets: int, farthest: int, both: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    policy = T5Buckets(1, buckets=buckets, max_distance=farthest, bidirectional=both)
    with torch.no_grad():
        policy.weight.copy_(torch.arange(buckets)[:, None])
    distance = torch.arange(-2 * farthest, 2 * farthest)
    theirs = T5Attention._relative_position_bucket(
        -distance, bidirectional=both, num_buckets=buckets, max_distance=farthest
    )
    assert torch.equal(policy.at(distance, torch.float32)[0].long(), theirs)


@pytest.mark.parametrize("decoder", [False, True])
def test_a_layer_of_t5(decoder: bool) -> None:
    """transformers' self-attention with its own weights: scores are not scaled."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=5, num_heads=3, relative_attention_num_buckets=8, is_decoder=decoder)
    config.relative_attention_max_distance = 20
    config._attn_implementation = "eager"
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval()
    ours = Attention(16, 3, head_dim=5, scale=1.0, window=AttnWindow(lookahead=0 if decoder else None)).double()
    policy = T5Buckets(3, buckets=8, max_distance=20, bidirectional=not decoder).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))
        ours.qkv.weight.copy_(torch.cat([theirs.q.weight, theirs.k.weight, theirs.v.weight]))
        ours.out.weight.copy_(theirs.o.weight)
        policy.weight.copy_(theirs.relative_attention_bias.weight)
        x = torch.randn(2, 47, 16, dtype=torch.float64)
        mask = torch.full((47, 47), -math.inf).triu(1)[None, None].double() if decoder else None
        reply = theirs(x, mask=mask)
        torch.testing.assert_close(ours(x, bias=policy), reply[0], atol=1e-12, rtol=0)


def context(
    queries: range, keys: list[int], window: AttnWindow | None = None, known: Known | None = None
) -> BiasContext:
    window = window or AttnWindow()
    q = torch.zeros(1, H, len(queries), 4)
    positions = torch.tensor([list(queries)]), torch.tensor([keys])
    return BiasContext(
        *(*positions, q, 1.0, window.size, window.sink_tokens, window.lookahead, window.block),
        known=None if known is None else (known,),
    )


def sizes(terms: BiasTerms) -> dict[str, tuple[int, ...]]:
    return {name: tuple(term.shape) for name, term in terms._asdict().items() if isinstance(term, Tensor)}


def test_the_cheapest_form() -> None:
    """As long as a window, as a stream, or as far as the law changes; written out only where that is less."""
    far = 10**6
    log, t5 = KerpleLog(H), T5Buckets(H)
    keys = list(range(far - 99, far + 1))
    # A window: its size, wherever the stream stands.
    assert sizes(log.terms(context(range(far, far + 1), keys, AttnWindow(100)))) == {"table": (H, 100)}
    assert sizes(log.terms(context(range(40), list(range(40)), AttnWindow.two_sided(6, 2)))) == {"table": (H, 9)}
    # All keys: as far as they are.
    assert sizes(log.terms(context(range(40), list(range(40))))) == {"table": (H, 40)}
    assert sizes(log.terms(context(range(30, 40), list(range(40))))) == {"table": (H, 40)}
    # Kept sink tokens of long ago: a number for each key of one query, rows for more.
    kept = AttnWindow(98, sink_tokens=2)
    assert sizes(log.terms(context(range(far, far + 1), [0, 1, *keys[2:]], kept))) == {"key": (1, H, 100)}
    assert sizes(log.terms(context(range(far - 1, far + 1), [0, 1, *keys[2:]], kept))) == {"dense": (1, H, 2, 100)}
    assert log.writes_rows(context(range(far - 1, far + 1), [0, 1, *keys[2:]], kept))
    # T5's law ends.
    assert sizes(t5.terms(context(range(far - 1, far + 1), [0, 1, *keys[2:]], kept))) == {"table": (H, 129)}
    # What a cache knows is not read from the positions.
    known = Known(q_start=30, q_count=10, keys=40, head=0, k_start=0, ordered=True)
    asked = context(range(30, 40), list(range(40)), None, known)
    nowhere = asked._replace(q_pos=asked.q_pos.to("meta"), k_pos=asked.k_pos.to("meta"))
    assert not log.writes_rows(nowhere)
    assert log.writes_rows(nowhere._replace(known=None))
    assert not t5.writes_rows(nowhere._replace(known=None))


@pytest.mark.parametrize("name", policies())
def test_rows_written_out_are_the_table(name: str) -> None:
    """What a call far away or unknown to the host gets is what a near one gets."""
    policy = policies()[name]
    asked = context(range(20, 26), [*range(4, 26), -1, 0])
    asked = asked._replace(q=asked.q.double())
    table = policy.terms(asked)
    assert table.table is not None
    distance = asked.q_pos[:, :, None] - asked.k_pos[:, None, :]
    looked_up = table.table[:, (distance + table.zero).clamp(0, table.table.shape[1] - 1)]
    written = policy.at(distance, torch.float64)
    seen = ((asked.k_pos >= 0)[:, None] & (distance >= 0)).expand(H, -1, -1, -1)
    assert (looked_up - written)[seen].abs().max() < 1e-12


@pytest.mark.parametrize("name", ["kerple log", "kerple power", "sandwich"])
def test_far_positions_keep_their_digits(name: str) -> None:
    policy = policies()[name]
    for distance in (10**7, 10**7 + 1):
        found = policy.at(torch.tensor([distance]), torch.float32).double()
        truth = torch.tensor([[of_distance(policy, h, distance)] for h in range(H)], dtype=torch.float64)
        torch.testing.assert_close(found, truth, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("window", [AttnWindow(), AttnWindow(3), AttnWindow(3, sink_tokens=1)], ids=str)
@pytest.mark.parametrize("name", ["t5", "t5, both sides", "kerple log", "kerple power"])
def test_gradients_reach_the_parameters(name: str, window: AttnWindow) -> None:
    """Also through the forms that the window chooses, and at distance 0."""
    policy = policies()[name]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, H, 8, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    names = [n for n, _ in policy.named_parameters()]

    def function(*parameters: Tensor) -> Tensor:
        class Called(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.policy = policy

            def forward(self) -> Tensor:
                return attend(q, k, v, bias=policy, window=window)

        given = {f"policy.{n}": p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Called(), given, ())

    start = tuple(p.detach().clone().requires_grad_() for p in policy.parameters())
    assert torch.autograd.gradcheck(function, start)
    assert all((gradient != 0).any() for gradient in torch.autograd.grad(function(*start).square().sum(), start))


def test_kerple_holds_its_parameters_up() -> None:
    """Below 0.01 they act as 0.01, and p of the power above 2 as 2; their gradients still lead back."""
    power = KerplePower(2)
    with torch.no_grad():
        power.p.copy_(torch.tensor([-1.0, 3.0]))
        power.a.copy_(torch.tensor([-0.5, 1.0]))
    bias = power.at(torch.tensor([4]), torch.float32)
    torch.testing.assert_close(bias[:, 0], torch.tensor([-0.01 * 4**0.01, -16.0]))
    bias.sum().backward()
    assert (power.p.grad != 0).all()
    assert (power.a.grad != 0).all()


def test_training_finds_the_curve_that_made_the_data() -> None:
    torch.manual_seed(0)
    truth, learner = kerple(KerpleLog(2), heads=2), KerpleLog(2)
    q, k, v = (torch.randn(4, 2, 24, 8) for _ in range(3))
    target = attend(q, k, v, bias=truth).detach()
    optimiser = torch.optim.Adam(learner.parameters(), 0.05)
    losses = []
    for _ in range(120):
        loss = (attend(q, k, v, bias=learner) - target).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 1e-3 * losses[0]


def test_inference_first_and_training_after() -> None:
    """What is kept between calls does not come from inference mode."""
    for policy in (T5Buckets(H), Sandwich(H)):
        q, k, v = (torch.randn(1, H, 6, 4) for _ in range(3))
        with torch.inference_mode():
            attend(q, k, v, bias=policy)
        attend(q.requires_grad_(), k, v, bias=policy).sum().backward()


def test_half_precision_keeps_the_bias_in_single() -> None:
    policy = KerpleLog(H, dtype=torch.bfloat16)
    asked = context(range(9), list(range(9)))
    assert policy.terms(asked._replace(q=asked.q.bfloat16())).table.dtype == torch.float32


def test_one_policy_for_many_layers() -> None:
    """Without state, a policy is the same at every position of every stream."""
    policy = policies()["kerple log"]
    made, x = layer(AttnWindow(7)), tokens(20)
    first = streamed(made, policy, [x], (4,))
    streamed(made, policy, [tokens(9, seed=8)], (1,))
    assert torch.equal(streamed(made, policy, [x], (4,))[0], first[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T5Buckets(4, buckets=1), "T5Buckets: 1 buckets up to distance 128: wanted at least 2"),
        (lambda: T5Buckets(4, buckets=7, bidirectional=True), "wanted at least 4, an even number"),
        (lambda: T5Buckets(4, buckets=32, max_distance=16), "a max_distance above 16"),
        (lambda: KerpleLog(0), "KerpleLog: 0 heads, wanted at least 1"),
        (lambda: Sandwich(4, dim=7), "Sandwich: dim 7, wanted an even number"),
        (lambda: KerpleLog(3).terms(context(range(2), [0, 1])), "KerpleLog: built for 3 heads, the call has 4"),
    ],
)
def test_what_they_refuse(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
