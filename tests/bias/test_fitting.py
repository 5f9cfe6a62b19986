"""Policies that do not fit their layer or call are refused before anything is written or read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from longburn import Attention, AttnWindow, CacheManager, attend
from longburn.bias import Alibi, BiasContext, Cope, Dape, DistanceCurves, ForgetBias, RelativeBias
from longburn.bias.picture import record_bias
from longburn.bias.policy import BiasPolicy
from longburn.kernels.attend import BiasTerms

H, D, M = 6, 4, 24


def layer(bias: BiasPolicy, **more: object) -> Attention:
    torch.manual_seed(0)
    return Attention(M, H, kv_heads=2, bias=bias, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda: Alibi(4), "the layer has heads 6, Alibi was built for 4"),
        (lambda: ForgetBias(M, 4), "heads 6, ForgetBias was built for 4"),
        (lambda: ForgetBias(M, 1), "heads 6, ForgetBias was built for 1"),
        (lambda: DistanceCurves(M, 8, curves=2, distances=5), "heads 6, DistanceCurves was built for 8"),
        (lambda: RelativeBias(M, 4, head_dim=4), "heads 6, RelativeBias was built for 4"),
        (lambda: RelativeBias(M, 6, head_dim=8), "head_dim 4, RelativeBias was built for 8"),
        (lambda: Dape(Alibi(4), 4), "heads 6, Dape was built for 4"),
        (lambda: Cope(8, 5), "head_dim 4, Cope was built for 8"),
    ],
)
def test_a_policy_for_other_heads(policy: Callable[[], BiasPolicy], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(policy())


class Anything:
    """A policy that gives what it was given."""

    def __init__(self, terms: BiasTerms) -> None:
        self.given = terms

    def terms(self, context: BiasContext) -> BiasTerms:
        return self.given


@pytest.mark.parametrize(
    "terms",
    [
        BiasTerms(slope=torch.ones(4)),
        BiasTerms(slope=torch.ones(1)),
        BiasTerms(key=torch.zeros(1, 4, 9)),
        BiasTerms(key=torch.zeros(2, 1, 9)),
        BiasTerms(key=torch.zeros(1, 1, 8)),
        BiasTerms(row=torch.zeros(1, 1, 1)),
        BiasTerms(table=torch.zeros(4, 5)),
        BiasTerms(table=torch.zeros(5)),
        BiasTerms(dense=torch.zeros(1, 6, 3, 1)),
    ],
)
def test_terms_of_another_shape(terms: BiasTerms) -> None:
    q, k = torch.randn(1, H, 3, D), torch.randn(1, 2, 9, D)
    (name,) = (name for name in ("slope", "key", "row", "table", "dense") if getattr(terms, name) is not None)
    with pytest.raises(ValueError, match=rf"attend: Anything gave `{name}` of .* B, H, T, S = \(1, 6, 3, 9\)"):
        attend(q, k, k, bias=Anything(terms))


@pytest.mark.parametrize(
    "terms",
    [
        BiasTerms(slope=torch.ones(H), key=torch.zeros(1, H, 9), row=torch.zeros(1, 1, 3)),
        BiasTerms(table=torch.zeros(1, 2), dense=torch.zeros(1, 1, 3, 9)),
        BiasTerms(table=torch.zeros(H, 30)),
    ],
)
def test_terms_that_stand_for_many(terms: BiasTerms) -> None:
    q, k = torch.randn(1, H, 3, D), torch.randn(1, 2, 9, D)
    attend(q, k, k, bias=Anything(terms))


def test_a_refused_call_leaves_the_cache() -> None:
    plain = Attention(M, H, kv_heads=2)
    cache = CacheManager.for_layers([plain], batch=1)
    with pytest.raises(ValueError, match="heads 6, Alibi was built for 4"):
        plain(torch.randn(1, 3, M), cache.positions(3), cache=cache[0], bias=Alibi(4))
    assert bool((cache[0].memory[-1] == -1).all())


@pytest.mark.parametrize("window", [AttnWindow.two_sided(), AttnWindow(8, block=4)])
@pytest.mark.parametrize("policy", [lambda: ForgetBias(M, H), lambda: Cope(D, 5)])
def test_causal_policies_in_other_windows(policy: Callable[[], BiasPolicy], window: AttnWindow) -> None:
    with pytest.raises(
        ValueError, match=r"Attention: .* it is about the keys up to the query; give the layer a causal"
    ):
        layer(policy(), window=window)


def test_what_reads_queries_takes_no_scaled_ones() -> None:
    with pytest.raises(ValueError, match="Cope computes with queries, which prescale would change"):
        layer(Cope(D, 5), prescale=True)
    with pytest.raises(ValueError, match="Dape: RelativeBias changes queries"):
        Dape(RelativeBias(M, H), H)


def test_weights_that_were_written_without_a_trace() -> None:
    made = layer(RelativeBias(M, H)).eval()
    nn.init.normal_(made.bias.v)  # type: ignore[union-attr]
    x = torch.randn(1, 5, M)
    with torch.no_grad():
        before = made(x)
        made.bias.project.weight.data.mul_(3)  # type: ignore[union-attr]
        after = made.eval()(x)
        fresh = layer(RelativeBias(M, H)).eval()
        fresh.load_state_dict(made.state_dict())
        assert not torch.allclose(after, before)
        assert torch.equal(after, fresh(x))


def test_recordings_within_each_other() -> None:
    policy = ForgetBias(M, H)
    made, x = layer(policy), torch.randn(1, 3, M)

    def positions(rows: list) -> list[int]:
        return [row.position for row in rows]

    with record_bias(policy) as outer:
        with record_bias(policy) as inner:
            made(x)
        made(x)
    made(x)
    assert positions(inner) == [0, 1, 2]
    assert positions(outer) == [0, 1, 2, 0, 1, 2]


def test_slopes_are_those_of_the_layer() -> None:
    """Kernels read one slope a head: a buffer that goes on behind them changes nothing."""
    buffer: Tensor = torch.full((9,), 50.0)
    buffer[:H] = 0.5
    made = layer(Alibi(H, slopes=buffer[:H]))
    same = layer(Alibi(H, slopes=torch.full((H,), 0.5)))
    x = torch.randn(1, 4, M)
    assert torch.equal(made(x), same(x))
