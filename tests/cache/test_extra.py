"""Numbers that a cache keeps for every token: they stand in the slots of their positions, whatever a stream does."""

import pytest
import torch
from torch import Tensor

from longburn import AttnWindow, CacheManager
from longburn.cache import Extra, RollingKVCache, Step

C = 3


def cache(window: AttnWindow | None = None, *, batch: int = 2, sums: bool = False, **options: object) -> RollingKVCache:
    return RollingKVCache(batch, 2, 4, window=window, extra=Extra(C, sums), **options)  # type: ignore[arg-type]


def number(positions: Tensor) -> Tensor:
    """Of the token at each position `[R, T]` in row b: 1000 b + position, plus 0.25 for every channel, `[2, C, T]`."""
    rows = positions.expand(2, -1) + 1000 * torch.arange(2)[:, None]
    return rows[:, None].float() + 0.25 * torch.arange(C)[:, None]


def write(held: RollingKVCache, positions: Tensor):
    kv = torch.randn(2, 2, positions.shape[1], 4)
    return held.update(kv, kv, positions, extra=number(positions))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 9, 30])
@pytest.mark.parametrize("window", [None, AttnWindow(1), AttnWindow(8), AttnWindow(8, sink_tokens=3)], ids=str)
def test_they_come_back_beside_their_positions(window: AttnWindow | None, chunk: int, packed: bool) -> None:
    held = cache(window, packed=packed)
    for part in torch.arange(300).split(chunk):  # a cache that grows does so on the way
        before = held.previous(part[None])
        at = part[:1, None] - 1
        assert torch.equal(before, number(at)[..., 0] if part[0] else torch.zeros(2, C))
        result = write(held, part[None])
        assert result.extra is not None
        filled = (result.pos >= 0)[0]
        assert result.extra.shape == (2, C, result.pos.shape[1])
        assert torch.equal(result.extra[..., filled], number(result.pos)[..., filled])
        reach = window.size if window is not None and window.size is not None else 300
        wanted = range(max(0, int(part[0]) - reach + 1), int(part[-1]) + 1)
        assert set(wanted) <= set(result.pos[0, filled].tolist())


def test_rows_apart_rewound_and_reset() -> None:
    held = cache(AttnWindow(5, sink_tokens=1), capacity=10)
    write(held, torch.arange(20)[None])
    held.truncate([18, 16])
    again = torch.tensor([[18, 19], [16, -1]])
    assert torch.equal(held.previous(again), number(torch.tensor([[17], [15]]))[..., 0])
    result = write(held, again)
    assert result.extra is not None
    filled = (result.pos >= 0)[:, None].expand(-1, C, -1)
    assert torch.equal(result.extra[filled], number(result.pos)[filled])
    held.reset([1])
    start = torch.tensor([[20], [0]])
    before = held.previous(start)
    assert torch.equal(before[0], number(torch.tensor([[19]]))[0, :, 0])
    assert not before[1].any()
    assert torch.equal(held.previous(torch.tensor([[-1], [-1]])), torch.zeros(2, C))


def test_the_token_before_is_held_by_a_window_of_one() -> None:
    """A token may be written again, and its numbers go on from the one before it, which no query sees."""
    held = cache(AttnWindow(1))
    for p in range(9):
        for _ in range(3):
            assert torch.equal(held.previous(torch.tensor([[p]])), number(torch.tensor([[p - 1]]))[..., 0] * (p > 0))
            write(held, torch.tensor([[p]]))
    assert held.slots == 2
    assert held.slack == 0


def test_sums_move_by_whole_numbers() -> None:
    plain, sums = cache(AttnWindow(50)), cache(AttnWindow(50), sums=True)
    for p in range(200):
        at = torch.tensor([[p]])
        before = sums.previous(at)
        step = torch.full((2, C, 1), 17.0) / torch.tensor([[1], [4], [2**20]])
        kv = torch.randn(2, 2, 1, 4)
        sums.update(kv, kv, at, extra=before[..., None] + step)
        plain.update(kv, kv, at, extra=plain.previous(at)[..., None] + step)
    a, b = sums.memory[-2][..., :50], plain.memory[-2][..., :50]
    moved = (b - a)[..., :1]
    assert torch.equal(a + moved, b)  # these numbers are exact in fp32, and nothing was lost
    assert torch.equal(moved, moved.round())
    assert a.gather(2, plain.positions.argmax(1).view(1, 1, 1).expand(2, C, 1)).max() < 33 * 17
    assert b.max() == 200 * 17


def test_bytes() -> None:
    for dtype, size in ((torch.bfloat16, 4), (torch.float64, 8)):
        with_, without = (RollingKVCache(2, 2, 4, window=AttnWindow(8), dtype=dtype, extra=Extra(c)) for c in (C, 0))
        assert with_.nbytes - without.nbytes == 2 * C * (8 + 1) * size


def test_every_layer_of_a_manager_has_its_own() -> None:
    windows = [AttnWindow(1), AttnWindow(4, sink_tokens=2), AttnWindow()]
    extra = [Extra(C), Extra(), Extra(1, sums=True)]
    caches = CacheManager(1, windows, kv_heads=2, head_dim=4, max_length=20, extra=extra)
    kept = [tuple(tensor.shape) for layer in caches for tensor in layer.memory if tensor.ndim == 3]
    assert kept == [(1, C, 3), (1, 1, 21)]
    assert [layer.slots for layer in caches] == [2, 6, 20]


def test_what_it_refuses() -> None:
    held, kv = cache(), torch.zeros(2, 2, 4, 4)
    at = torch.arange(4)[None]
    wrong = [(None, "none"), (torch.zeros(2, C, 3), r"\(2, 3, 3\)"), (torch.zeros(2, C, 4).double(), "torch.float64")]
    for extra, came in wrong:
        with pytest.raises(
            ValueError, match=rf"update: extra numbers are .*{came}.*wanted \(2, 3, 4\) of torch.float32"
        ):
            held.update(kv, kv, at, extra=extra)
    assert (held.positions == -1).all()
    with pytest.raises(ValueError, match=r"extra numbers are \(2, 3, 4\) of torch.float32, wanted none"):
        RollingKVCache(2, 2, 4).update(kv, kv, at, extra=torch.zeros(2, C, 4))
    with pytest.raises(ValueError, match="gradients do not flow through a cache"):
        held.update(kv, kv, at, extra=torch.zeros(2, C, 4, requires_grad=True))
    with pytest.raises(ValueError, match="positions skip tokens"):
        held.previous(Step.of(torch.tensor([[3]])))
