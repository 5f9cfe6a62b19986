"""A prefill of 32768 tokens never holds T x T of anything."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from longburn import Alibi, AttnWindow, attend, attend_with_lse, use_impl

T = 32_768


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = [x.numel() for x in tree_iter(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *found])
        return result


def streams(length: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, length, 16, generator=g) for _ in range(3)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": AttnWindow(1024, sink_tokens=4)},
        {"window": AttnWindow(1)},
        {"window": AttnWindow(128), "sinks": torch.ones(1)},
    ],
    ids=["full", "window_1024_sinks_4", "window_1", "window_128_learned_sinks"],
)
def test_a_long_prefill_is_not_quadratic_in_memory(settings: dict) -> None:
    q, k, v = streams(T)
    with torch.no_grad(), Largest() as largest:
        attend(q, k, v, **settings)
    assert q.numel() <= largest.elements <= 2 * q.numel()  # outputs, a merge of two: never more


def test_nor_inside_an_operation() -> None:
    """Buffers that a kernel allocates and frees by itself: the profiler sees them."""
    q, k, v = streams(T)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, torch.no_grad():
        attend(q, k, v, window=AttnWindow(1024, sink_tokens=4))
    sizes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes, "the profiler saw no allocation"
    assert max(sizes) <= 2 * q.nbytes


@pytest.mark.parametrize(
    ("impl", "settings"),
    [
        ("reference", {}),
        ("reference", {"bias": Alibi(1), "sinks": torch.zeros(1)}),
        ("sdpa", {"bias": Alibi(1), "sinks": torch.zeros(1)}),
        ("sdpa", {"window": AttnWindow(64, lookahead=3)}),
    ],
)
def test_masked_calls_go_in_blocks_of_queries(impl: str, settings: dict) -> None:
    """Where a mask is written out, it is for a block of queries at a time, and the blocks join without a seam."""
    length = 6500
    q, k, v = streams(length)
    with torch.no_grad(), use_impl(impl):
        with Largest() as largest:
            out, lse = attend_with_lse(q, k, v, **settings)
        assert largest.elements < length * length
        for rows in (slice(0, 3), slice(5100, 5200), slice(length - 2, length)):
            part = attend_with_lse(
                q[:, :, rows],
                k,
                v,
                q_pos=torch.arange(length)[None, rows],
                k_pos=torch.arange(length)[None],
                **settings,
            )
            torch.testing.assert_close(out[:, :, rows], part[0])
            torch.testing.assert_close(lse[:, :, rows], part[1])
