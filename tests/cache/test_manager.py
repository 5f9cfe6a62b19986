"""The clock of a model's caches."""

import pytest
import torch

from longburn import Attention, AttnWindow, CacheManager
from longburn.cache import Run, Step


def manager(batch: int = 1, windows: tuple[AttnWindow, ...] = (AttnWindow(4),), **settings) -> CacheManager:
    return CacheManager(batch, windows, kv_heads=1, head_dim=2, **settings)


def advance(cache: CacheManager, tokens: int | torch.Tensor) -> Step:
    """A forward: every layer writes, then the clock moves."""
    step = cache.positions(tokens)
    kv = torch.zeros(cache.batch, 1, step.length, 2)
    for layer in cache:
        layer.update(kv, kv, step)
    cache.advance(step)
    return step


def test_one_clock_for_all_rows() -> None:
    cache = manager(batch=3)
    assert (cache.position, cache.row_positions) == (0, (0, 0, 0))
    first, second = advance(cache, 5), advance(cache, 2)
    assert first.positions.tolist() == [[0, 1, 2, 3, 4]]
    assert second.positions.tolist() == [[5, 6]]
    assert second.runs == (Run(5, 2),)
    assert second.bound == 7
    assert (cache.position, cache.row_positions) == (7, (7, 7, 7))


def test_positions_do_not_move_the_clock() -> None:
    cache = manager()
    assert cache.positions(3).positions.tolist() == cache.positions(3).positions.tolist() == [[0, 1, 2]]
    assert cache.position == 0


def test_padding_on_either_side_and_rows_that_pause() -> None:
    cache = manager(batch=3)
    step = advance(cache, torch.tensor([[-1, 7, 7], [7, 7, 7], [7, -1, -1]]))
    assert step.positions.tolist() == [[-1, 0, 1], [0, 1, 2], [0, -1, -1]]
    step = advance(cache, torch.tensor([[7, -1], [-1, -1], [7, 7]]))
    assert step.positions.tolist() == [[2, -1], [-1, -1], [1, 2]]
    assert cache.row_positions == (3, 3, 3)
    step = advance(cache, torch.zeros(3, 2, dtype=torch.int64))  # equal again: still one clock a row
    assert step.positions.expand(3, 2).tolist() == [[3, 4]] * 3


def test_padding_between_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 1 has padding \(-1\) between its tokens; pad on the left or"):
        manager(batch=2).positions(torch.tensor([[7, 7, 7], [7, -1, 7]]))


def test_tokens_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens have 2 rows, the cache 3"):
        manager(batch=3).positions(torch.zeros(2, 4, dtype=torch.int64))


def test_max_length_is_a_promise_that_is_kept() -> None:
    cache = manager(batch=2, windows=(AttnWindow(4), AttnWindow()), max_length=9)
    advance(cache, 8)
    with pytest.raises(ValueError, match=r"2 tokens from position 8 of row 0 pass max_length 9; make the cache longer"):
        cache.positions(2)
    advance(cache, torch.tensor([[1], [-1]]))
    with pytest.raises(ValueError, match=r"1 tokens from position 9 of row 0 pass max_length 9"):
        cache.positions(1)
    assert cache.row_positions == (9, 8)
    advance(cache, torch.tensor([[-1], [1]]))


def test_capacities_follow_from_windows_and_length() -> None:
    windows = (AttnWindow(4, sink_tokens=2), AttnWindow(), AttnWindow(100))
    assert [cache.slots for cache in manager(windows=windows)] == [6, 0, 100]
    assert [cache.slots for cache in manager(windows=windows, slack=3)] == [9, 0, 103]
    assert [cache.slots for cache in manager(windows=windows, max_length=50)] == [6, 50, 50]
    assert [cache.slots for cache in manager(windows=windows, max_length=5)] == [5, 5, 5]
    assert [cache.ring for cache in manager(windows=windows, max_length=50)] == [4, None, None]


def test_bytes_are_the_sum_of_the_layers() -> None:
    cache = CacheManager(
        2, (AttnWindow(4, sink_tokens=2), AttnWindow(9)), kv_heads=3, head_dim=5, dtype=torch.bfloat16, slack=1
    )
    assert cache.nbytes == sum(layer.nbytes for layer in cache)
    assert cache.nbytes == sum(2 * 2 * 3 * slots * 5 * 2 + 8 * slots for slots in (4 + 2 + 1 + 1, 9 + 1 + 1))


def test_it_is_a_sequence_of_its_layers() -> None:
    cache = manager(windows=(AttnWindow(4), AttnWindow(5), AttnWindow()))
    assert len(cache) == 3
    assert [layer.window.size for layer in cache] == [4, 5, None]
    assert [layer.window.size for layer in cache[1:]] == [5, None]
    assert cache[-1].window.size is None


def test_caches_for_layers() -> None:
    layers = [
        Attention(12, 4, kv_heads=2, window=AttnWindow(5), dtype=torch.bfloat16),
        Attention(12, 4, kv_heads=2, dtype=torch.bfloat16),
    ]
    cache = CacheManager.for_layers(layers, 3, slack=2)
    assert (cache.batch, len(cache)) == (3, 2)
    assert [layer.window.size for layer in cache] == [5, None]
    k = torch.zeros(3, 2, 1, 3, dtype=torch.bfloat16)
    assert cache[0].update(k, k, cache.positions(1)).k.shape == (3, 2, 1, 3)
    with pytest.raises(ValueError, match=r"for_layers: .*got 2 layers of 2 kinds"):
        CacheManager.for_layers([layers[0], Attention(12, 4, dtype=torch.bfloat16)], 1)
    with pytest.raises(ValueError, match=r"for_layers: .*got 0 layers"):
        CacheManager.for_layers([], 1)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"batch": 0}, "batch 0"),
        ({"windows": ()}, "0 layers"),
        ({"slack": -1}, "slack -1"),
        ({"max_length": 0}, "max_length 0"),
    ],
)
def test_a_manager_that_cannot_be(settings: dict, part: str) -> None:
    with pytest.raises(ValueError, match=f"CacheManager: .*{part}.*: wanted at least one row, one layer"):
        manager(**settings)


# --- going back ------------------------------------------------------------------------------------------------------


def test_rewind_all_rows_or_each() -> None:
    cache = manager(batch=2, windows=(AttnWindow(),))
    advance(cache, 8)
    cache.rewind(3)
    assert cache.row_positions == (5, 5)
    cache.rewind([1, 0])
    assert cache.row_positions == (4, 5)
    cache.rewind(2)
    assert cache.row_positions == (2, 3)
    assert cache[0].positions[:, :5].tolist() == [[0, 1, -1, -1, -1], [0, 1, 2, -1, -1]]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (9, r"9 tokens of row 0, which stands at position 8"),
        (-1, r"-1 tokens of row 0"),
        ([0, 9], r"9 tokens of row 1, which stands at position 8"),
        ([1, 2, 3], r"3 numbers for 2 rows"),
        (4, r"row 0 back to position 4, but layer 1 \(window 3, slack 2\) can go back to 5 only; .*more slack"),
        ([0, 4], r"row 1 back to position 4, but layer 1"),
    ],
)
def test_a_rewind_that_cannot_be_changes_nothing(tokens: int | list[int], message: str) -> None:
    cache = manager(batch=2, windows=(AttnWindow(), AttnWindow(3)), slack=2)
    advance(cache, 8)
    before = [layer.positions.clone() for layer in cache]
    with pytest.raises(ValueError, match=f"CacheManager.rewind: {message}"):
        cache.rewind(tokens)
    assert cache.row_positions == (8, 8)
    assert all(torch.equal(a, layer.positions) for a, layer in zip(before, cache, strict=True))


def test_reset_one_row_or_all() -> None:
    cache = manager(batch=3)
    advance(cache, 6)
    cache.reset([1])
    assert cache.row_positions == (6, 0, 6)
    assert advance(cache, 2).positions.tolist() == [[6, 7], [0, 1], [6, 7]]
    cache.reset()
    assert cache.row_positions == (0, 0, 0)
    assert advance(cache, 2).positions.expand(3, 2).tolist() == [[0, 1]] * 3
    with pytest.raises(IndexError, match=r"no row 3 in a batch of 3"):
        cache.reset([0, 3])
    with pytest.raises(IndexError, match=r"no row -1"):
        cache.reset([-1])
    assert cache.row_positions == (2, 2, 2)


def test_only_steps_of_the_clock_advance_it() -> None:
    cache = manager()
    with pytest.raises(ValueError, match=r"advance: the step was not handed out by positions\(\)"):
        cache.advance(Step(torch.tensor([[0]]), None, None))


# --- a step ----------------------------------------------------------------------------------------------------------


def test_a_step_reads_positions_on_the_cpu_once() -> None:
    step = Step.of(torch.tensor([[-1, 4, 5], [7, -1, -1], [-1, -1, -1]]))
    assert step.runs == (Run(4, 2, 1), Run(7, 1, 0), Run(0, 0))
    assert (step.bound, step.length) == (8, 3)
    assert Step.of(step) is step
    for irregular in ([[1, 3]], [[3, 2]], [[1, -1, 2]]):
        step = Step.of(torch.tensor(irregular))
        assert step.runs is None
        assert step.bound == max(irregular[0]) + 1
    unread = Step.of(torch.tensor([[1]]), read=False)
    assert (unread.runs, unread.bound) == (None, None)


def test_a_step_from_zero() -> None:
    step = Step.from_zero(3)
    assert step.positions.tolist() == [[0, 1, 2]]
    assert (step.runs, step.bound) == ((Run(0, 3),), 3)


def test_layers_share_what_they_derive_from_a_step() -> None:
    step, made = Step.from_zero(3), []
    for _ in range(3):
        assert step.share("angles", lambda: made.append(1) or "a table") == "a table"
    assert step.share("other", lambda: "another") == "another"
    assert made == [1]
