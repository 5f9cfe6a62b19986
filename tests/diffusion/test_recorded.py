"""Recorded passes give what the pass gives, whatever is written to their tensors in between."""

import pytest
import torch
from torch import Tensor, nn

from longburn.diffusion import Recorded


class Pass:
    """`relu(weight * x + y)` or its negative, and how often it was run."""

    def __init__(self, device: str) -> None:
        self.model, self.runs = nn.Linear(3, 3, bias=False, device=device), 0

    def __call__(self, changing: tuple[Tensor, ...], fixed: tuple[Tensor, ...], negative: bool) -> Tensor:
        self.runs += 1
        out = torch.relu(self.model(changing[0]) + fixed[0])
        return -out if negative else out


def test_on_a_cpu_it_is_the_pass() -> None:
    run = Pass("cpu")
    recorded, x, y = Recorded(run, run.model), torch.randn(2, 3), torch.randn(2, 3)
    for negative in (False, True, False):
        out = recorded((x,), (y,), negative)
        assert torch.equal(out, run((x,), (y,), negative))
        assert out.requires_grad
    assert recorded.captures == 0
    assert run.runs == 6


@pytest.mark.cuda
@torch.no_grad()
def test_a_replay_is_the_pass() -> None:
    run = Pass("cuda")
    recorded = Recorded(run, run.model, keep=2)
    outs: list[tuple[Tensor, Tensor]] = []

    def same(x: Tensor, y: Tensor, negative: bool = False) -> None:
        out = recorded((x,), (y,), negative)
        outs.append((out, run((x,), (y,), negative)))

    def draw(rows: int = 2) -> Tensor:
        return torch.randn(rows, 3, device="cuda")

    y = draw()
    for _ in range(4):
        same(draw(), y)
    assert (recorded.captures, recorded.why_not) == (1, None)
    y.mul_(2)  # the same tensor with other numbers
    same(draw(), y)
    same(draw(), draw())  # another tensor
    same(draw(), y)
    for _ in range(3):  # other settings
        same(draw(), y, negative=True)
    assert recorded.captures == 2
    for _ in range(3):  # other shapes, in the place of the first
        same(draw(5), draw(5))
    assert recorded.captures == 3
    for _ in range(3):
        same(draw(), y)
    assert recorded.captures == 4
    run.model.weight.data = torch.randn(3, 3, device="cuda")  # weights that lie elsewhere
    for _ in range(3):
        same(draw(), y)
    assert recorded.captures == 5
    with torch.inference_mode():
        same(draw(), draw())
    for out, wanted in outs:  # a result is the caller's own
        assert torch.equal(out, wanted)


@pytest.mark.cuda
@torch.no_grad()
def test_a_pass_that_waits_is_called() -> None:
    model = nn.Linear(3, 3, device="cuda")

    def waits(changing: tuple[Tensor, ...], fixed: tuple[Tensor, ...], settings: None) -> Tensor:
        return changing[0] * float(fixed[0].sum())

    recorded, x = Recorded(waits, model), torch.ones(3, device="cuda")
    for _ in range(3):
        assert torch.equal(recorded((x,), (x,), None), 3 * x)
    assert recorded.captures == 0
    assert recorded.why_not is not None
