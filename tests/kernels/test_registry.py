"""Asking which implementation takes a call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from longburn import ImplError, attend, use_impl
from longburn.kernels.linear import linear
from longburn.kernels.registry import Impl, Operation, explain
from longburn.kernels.route import RouteCall
from longburn.kernels.triton import on_its_device


@pytest.fixture
def halve() -> Operation[int, int]:
    """Halves by shifting what is even, slowly everything; says who worked."""
    return Operation(
        "halve",
        (
            Impl("shift", lambda n: n >> 1, lambda n: "is odd" if n % 2 else None),
            Impl("never", _fails, lambda n: "never does"),
            Impl("slow", lambda n: n // 2, lambda n: None),
        ),
    )


def _fails(n: int) -> int:
    raise AssertionError("was run")


def test_every_implementation_is_asked_in_order(halve: Operation[int, int]) -> None:
    even, odd = (explain("halve", lambda n=n: halve(n)) for n in (4, 5))
    assert list(even.reasons.items()) == [("shift", None), ("never", "never does"), ("slow", None)]
    assert (even.operation, even.taken) == ("halve", "shift")
    assert list(odd.reasons.items()) == [("shift", "is odd"), ("never", "never does"), ("slow", None)]
    assert odd.taken == "slow"
    assert halve(5) == 2  # asking leaves nothing behind


@pytest.mark.parametrize(("name", "n", "taken"), [("slow", 4, "slow"), ("shift", 5, None), ("reference", 4, "shift")])
def test_use_impl_counts(halve: Operation[int, int], name: str, n: int, taken: str | None) -> None:
    with use_impl(name):
        assert explain("halve", lambda: halve(n)).taken == taken


def test_what_comes_before_is_computed_and_nothing_after(halve: Operation[int, int]) -> None:
    done: list[str] = []

    def compute() -> None:
        done.append(f"{linear(torch.ones(1, 2), torch.ones(1, 2)).item():.0f}")
        try:
            halve(2)
        except Exception:
            done.append("held up")
        done.append("after")

    assert explain("halve", compute).taken == "shift"
    assert done == ["2"]


@pytest.mark.parametrize("compute", [lambda: None, lambda: linear(torch.ones(1, 2), torch.ones(1, 2))])
def test_an_operation_that_is_not_called(compute: Callable[[], object]) -> None:
    with pytest.raises(ImplError, match=r"explain: no operation 'attend' was called; there are .*attend.*linear"):
        explain("attend", compute)


def test_errors_come_through_and_asking_ends() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="disagree"):
        explain("attend", lambda: attend(q, q[:, :, :, :4], q))
    assert attend(q, q, q).shape == q.shape


def test_the_answer_is_what_happens() -> None:
    """Whatever `explain` names computes the call, and what it gives a reason against refuses by name."""
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16)
    found = explain("attend", lambda: attend(q, k, k, sinks=torch.randn(4)))
    assert found.taken == next(name for name, reason in found.reasons.items() if reason is None)
    assert found.reasons["flex"] == "needs CUDA, got cpu"
    with use_impl("flex"), pytest.raises(ImplError, match="needs CUDA, got cpu"):
        attend(q, k, k)


def test_triton_runs_where_the_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, whatever the tensors say."""
    entered = []

    @contextmanager
    def entering(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda:1")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", entering)
    call = RouteCall(torch.zeros(1).as_subclass(Elsewhere), 3)
    run = on_its_device(lambda call: call.k)
    assert run(call) == 3
    assert entered == [torch.device("cuda:1")]
    assert run(RouteCall(torch.zeros(1), 4)) == 4
    assert on_its_device(lambda call: 5)((call, 1)) == 5
    assert len(entered) == 2
