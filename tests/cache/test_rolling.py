"""One layer's cache: slots, growth, capacity, memory, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor

from longburn import AttnWindow, RollingKVCache
from longburn.cache import KeyValues
from longburn.cache.rolling import PAGE


def cache_of(window: AttnWindow | None = None, *, batch: int = 1, **settings) -> RollingKVCache:
    return RollingKVCache(batch, 1, 2, window=window, **settings)


def tokens(start: int, stop: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that say their position, values that say its negative, and the positions."""
    at = torch.arange(start, stop)
    k = at.float()[None, None, :, None].expand(batch, 1, -1, 2).contiguous()
    return k, -k, at[None]


def fill(cache: RollingKVCache, *stops: int, start: int = 0) -> KeyValues:
    for stop in stops:
        held = cache.update(*tokens(start, stop, cache.batch))
        start = stop
    return held


# --- slots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_slot_is_a_function_of_the_position(size: int, sinks: int, slack: int) -> None:
    """`p` below sink_tokens, else `sink_tokens + (p - sink_tokens) % ring`: for every cut of the stream."""
    ring, end = size + slack, 23
    wanted = [-1] * (sinks + ring)
    for p in range(end):
        wanted[p if p < sinks else sinks + (p - sinks) % ring] = p
    for cut in (1, 2, 3, 7, end):
        cache = cache_of(AttnWindow(size, sink_tokens=sinks), capacity=sinks + ring)
        fill(cache, *range(cut, end, cut), end)
        assert cache.positions.tolist() == [wanted]
        assert cache.slots == sinks + ring
        assert cache.slack == slack


def test_nothing_moves() -> None:
    """A token stays in the storage where it was written until the one that replaces it."""
    cache = cache_of(AttnWindow(4, sink_tokens=1))
    held = fill(cache, 3)
    address = held.k.data_ptr()
    for p in range(3, 20):
        held = fill(cache, p + 1, start=p)
        assert held.k.data_ptr() == address
    assert sorted(held.pos[0].tolist()) == [0, 16, 17, 18, 19]
    assert held.k[0, 0, :, 0].tolist() == held.pos[0].tolist()


def test_only_what_is_written_comes_back() -> None:
    """Before the ring is full, a view of its filled beginning; nothing to mask, nothing copied."""
    cache = cache_of(AttnWindow(8))
    assert fill(cache, 3).pos.tolist() == [[0, 1, 2]]
    assert fill(cache, 5, start=3).k.shape[2] == 5
    full = cache_of()
    assert fill(full, 5).k.shape[2] == 5
    assert full.slots == PAGE


def test_a_chunk_within_the_slack_is_written_in_place() -> None:
    window = AttnWindow(4, sink_tokens=2)
    cache = cache_of(window, capacity=6 + 3)
    fill(cache, 20)
    held = fill(cache, 24, start=20)  # slack + 1 tokens
    assert held.k.untyped_storage().data_ptr() == cache.memory[0].untyped_storage().data_ptr()
    assert sorted(held.pos[0].tolist()) == [0, 1, 17, 18, 19, 20, 21, 22, 23]
    held = fill(cache, 29, start=24)  # one more: old and new, before anything is overwritten
    assert held.pos.tolist() == [[0, 1, 21, 22, 23, 24, 25, 26, 27, 28]]
    assert held.before is not None  # the chunk itself is not copied
    assert torch.cat([held.before[0], held.k], 2)[0, 0, :, 0].tolist() == held.pos[0].tolist()


def test_positions_without_a_token_are_written_nowhere() -> None:
    cache = cache_of(AttnWindow(4), batch=2)
    k, v, _ = tokens(0, 3, 2)
    k[0, :, 0] = k[1, :, 1:] = math.nan
    held = cache.update(k, v, torch.tensor([[-1, 0, 1], [0, -1, -1]]))
    assert held.pos[:, :2].tolist() == [[0, 1], [0, -1]]
    assert held.k[0, 0, :2].isfinite().all()
    assert held.k[1, 0, 0].isfinite().all()


def test_positions_need_not_start_at_zero_nor_be_consecutive() -> None:
    """By explicit positions anything may be written; the slots are the same arithmetic."""
    cache = cache_of(AttnWindow(4, sink_tokens=2))
    k, v, _ = tokens(0, 3)
    held = cache.update(k, v, torch.tensor([[10_000_001, 1, 10_000_003]]))
    assert {*held.pos[0].tolist()} == {-1, 1, 10_000_001, 10_000_003}
    assert cache.positions.tolist() == [[-1, 1, -1, 10_000_003, -1, 10_000_001]]
    assert held.known is None


# --- capacity --------------------------------------------------------------------------------------------------------


def test_a_layer_without_a_window_grows_by_pages() -> None:
    cache = cache_of()
    slots = []
    for start in range(0, 8 * PAGE, 100):
        held = fill(cache, start + 100, start=start)
        slots.append(cache.slots)
        assert held.pos.tolist() == [[*range(start + 100)]]
        assert held.k[0, 0, :, 0].tolist() == [*range(start + 100)]
    assert all(n % PAGE == 0 for n in slots)
    assert len(set(slots)) <= 2 + math.log(8, 1.25)  # geometric: copies stay linear in the length
    assert slots[-1] < 1.25 * 8 * PAGE + 2 * PAGE


def test_a_fixed_capacity_is_refused_with_the_ways_out() -> None:
    cache = cache_of(capacity=10)
    fill(cache, 8)
    before = cache.positions.clone()
    with pytest.raises(ValueError, match=r"position 10 does not fit a fixed capacity of 10") as error:
        fill(cache, 11, start=8)
    for way in ("max_length", "window", "grows"):
        assert way in str(error.value)
    assert torch.equal(cache.positions, before)
    assert fill(cache, 10, start=8).k.shape[2] == 10
    assert cache.slots == 10


def test_a_fixed_capacity_that_the_host_cannot_check_is_checked_on_the_device() -> None:
    from longburn.cache import Step

    cache = cache_of(capacity=4)
    k, v, _ = tokens(0, 1)
    with pytest.raises(RuntimeError, match="capacity exceeded"):
        cache.update(k, v, Step.of(torch.tensor([[4]]), read=False))


@pytest.mark.parametrize(
    ("window", "settings", "message"),
    [
        (AttnWindow(8, sink_tokens=4), {"capacity": 11}, r"capacity 11 is below 12 \(sink_tokens 4 \+ window 8\)"),
        (AttnWindow(8, sink_tokens=4), {"capacity": 4}, "capacity 4 is below 12"),
        (None, {"capacity": 0}, "capacity 0 is below 1"),
        (AttnWindow(4, lookahead=1), {}, "lookahead 1: a cache cannot hold keys that are yet to come"),
        (AttnWindow(lookahead=None), {}, "lookahead None"),
    ],
)
def test_a_cache_that_cannot_be(window: AttnWindow | None, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"RollingKVCache: {message}"):
        cache_of(window, **settings)


# --- going back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slack", [0, 1, 5])
def test_how_far_a_row_can_go_back(slack: int) -> None:
    """Until the ring wraps, anywhere; after that slack + 1 tokens, and one farther is refused."""
    window, slots = AttnWindow(4, sink_tokens=2), 6 + slack
    cache = cache_of(window, capacity=slots)
    for end in range(1, 30):
        fill(cache, end, start=end - 1)
        assert cache.earliest_restart(0) == (0 if end <= slots else end - slack - 1)
    with pytest.raises(
        ValueError, match=rf"row 0 goes back to position {29 - slack - 2}, but .* from {29 - slack - 1} on"
    ):
        fill(cache, 29, start=29 - slack - 2)
    held = fill(cache, 29, start=29 - slack - 1)
    assert {0, 1, 25, 26, 27, 28} <= {*held.pos[0].tolist()}


def test_truncate_forgets_what_comes_after() -> None:
    cache = cache_of(AttnWindow(4), batch=2, capacity=8)
    fill(cache, 7)
    cache.truncate([5, 7])
    assert cache.positions.tolist() == [[0, 1, 2, 3, 4, -1, -1, -1], [0, 1, 2, 3, 4, 5, 6, -1]]
    cache.truncate([3])
    assert cache.positions.tolist() == [[0, 1, 2, -1, -1, -1, -1, -1]] * 2


def test_reset_leaves_nothing_behind() -> None:
    """The contents need not be cleared: without their positions nobody looks at them."""
    cache = cache_of(AttnWindow(4), batch=2)
    fill(cache, 9)
    cache.reset([1])
    assert cache.positions[1].tolist() == [-1] * 4
    assert sorted(cache.positions[0].tolist()) == [5, 6, 7, 8]
    assert cache.earliest_restart(1) == 0
    cache.reset()
    assert (cache.positions == -1).all()
    assert fill(cache, 2).pos.tolist() == [[0, 1]] * 2


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "positions", "message"),
    [
        (
            torch.zeros(2, 1, 3, 2),
            None,
            r"k is \(2, 1, 3, 2\), wanted \(1, 1, 3, 2\) \(batch 1, kv_heads 1, .*head_dim 2",
        ),
        (torch.zeros(1, 2, 3, 2), None, r"k is \(1, 2, 3, 2\), wanted"),
        (torch.zeros(1, 1, 3, 4), None, r"k is \(1, 1, 3, 4\), wanted"),
        (torch.zeros(1, 1, 2, 2), None, r"k is \(1, 1, 2, 2\), wanted \(1, 1, 3, 2\)"),
        (
            torch.zeros(1, 1, 3, 2, dtype=torch.float64),
            None,
            r"k is torch.float64 on cpu, the cache torch.float32 on cpu",
        ),
        (torch.zeros(1, 1, 3, 2, requires_grad=True), None, r"gradients do not flow through a cache.*no_grad"),
        (torch.zeros(1, 1, 3, 2), torch.arange(3)[None].expand(2, 3), r"positions have 2 rows, wanted 1 or 1"),
        (
            torch.zeros(1, 1, 3, 2),
            torch.arange(3),
            r"positions: got torch.int64 of shape \(3,\), wanted int64 \[B, T\]",
        ),
        (torch.zeros(1, 1, 3, 2), torch.zeros(1, 3), r"positions: got torch.float32 of shape \(1, 3\)"),
    ],
)
def test_update_says_what_came_and_what_was_wanted(k: Tensor, positions: Tensor | None, message: str) -> None:
    cache = cache_of(AttnWindow(4))
    positions = torch.arange(3)[None] if positions is None else positions
    with pytest.raises(ValueError, match=message):
        cache.update(k, k, positions)
    assert (cache.positions == -1).all()


def test_values_are_checked_like_keys() -> None:
    k = torch.zeros(1, 1, 3, 2)
    with pytest.raises(ValueError, match=r"update: v is \(1, 1, 3, 3\), wanted \(1, 1, 3, 2\)"):
        cache_of().update(k, torch.zeros(1, 1, 3, 3), torch.arange(3)[None])


# --- memory ----------------------------------------------------------------------------------------------------------


def closed_formula(batch: int, kv_heads: int, head_dim: int, slots: int, itemsize: int, rows: int) -> int:
    """Keys, values and positions of every slot, and one slot for the writes of columns that hold no token."""
    return 2 * batch * kv_heads * (slots + 1) * head_dim * itemsize + 8 * rows * (slots + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bytes_are_the_closed_formula(dtype: torch.dtype) -> None:
    for batch, kv_heads, head_dim, window in ((1, 1, 4, AttnWindow(5)), (3, 2, 6, AttnWindow(7, sink_tokens=2))):
        cache = RollingKVCache(batch, kv_heads, head_dim, window=window, dtype=dtype)
        slots = window.sink_tokens + window.size
        assert cache.nbytes == closed_formula(batch, kv_heads, head_dim, slots, dtype.itemsize, 1)
    fixed = RollingKVCache(2, 3, 4, capacity=50, dtype=dtype)
    assert fixed.nbytes == closed_formula(2, 3, 4, 50, dtype.itemsize, 1)


@pytest.mark.parametrize("chunk", [1009, 333, 60])
def test_a_hundred_thousand_tokens_leave_the_memory_as_it_was(chunk: int) -> None:
    """Bytes, storage and slots of a windowed layer after 100k streamed tokens are those of an empty one."""
    window = AttnWindow(60, sink_tokens=4)
    cache = RollingKVCache(1, 1, 2, window=window, capacity=70)
    wanted = closed_formula(1, 1, 2, 70, 4, 1)
    assert cache.nbytes == wanted
    address = cache.memory[0].data_ptr()
    for start in range(0, 100_000, chunk):
        stop = min(start + chunk, 100_000)
        fill(cache, stop, start=start)
        assert cache.nbytes == wanted
    for start in range(100_000, 100_200):
        fill(cache, start + 1, start=start)
    assert cache.nbytes == wanted
    assert cache.memory[0].data_ptr() == address
    assert sorted(cache.positions[0].tolist()) == [*range(4), *range(100_200 - 66, 100_200)]
