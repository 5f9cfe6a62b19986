"""3-D axial RoPE against Wan's construction, rewritten here with complex numbers and explicit loops."""

import pytest
import torch

from longburn.rope import Rope3dEncoding, RotaryEncoding

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def wan_reference(x: torch.Tensor, first_frame: int, grid: tuple[int, int], split: tuple[int, int, int], theta: float):
    """x [H, frames * h * w, D], adjacent channels paired: one complex factor per pair and token, axis after axis."""
    tokens = x.shape[1]
    factors = torch.empty(tokens, x.shape[2] // 2, dtype=torch.complex128)
    for token in range(tokens):
        frame, within = divmod(token, grid[0] * grid[1])
        place = (first_frame + frame, within // grid[1], within % grid[1])
        phases = [
            coordinate * theta ** (-2 * j / size)
            for coordinate, size in zip(place, split, strict=True)
            for j in range(size // 2)
        ]
        factors[token] = torch.polar(torch.ones(len(phases)).double(), torch.tensor(phases, dtype=torch.float64))
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * factors
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize(
    ("head_dim", "split", "expected_split"),
    [(128, None, (44, 42, 42)), (24, None, (8, 8, 8)), (20, None, (8, 6, 6)), (64, (8, 28, 28), (8, 28, 28))],
)
@pytest.mark.parametrize("first_frame", [0, 5, 1023, 400_000])
def test_blocks_of_frames(head_dim, split, expected_split, first_frame: int) -> None:
    grid, frames, theta = (3, 5), 3, 10_000.0
    rope = Rope3dEncoding(head_dim, grid, theta=theta, split=split)
    assert rope.split == expected_split
    assert rope.frame_tokens == 15
    positions = first_frame * 15 + torch.arange(frames * 15)[None]
    x = torch.randn(1, 2, frames * 15, head_dim)
    expected = wan_reference(x[0], first_frame, grid, expected_split, theta)
    in_double = rope.rotate(x.double(), rope.angles(positions, torch.float64))
    torch.testing.assert_close(in_double[0], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(rope.rotate(x, rope.angles(positions))[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_matrix_game_sizes() -> None:
    rope = Rope3dEncoding(128, (22, 40))
    last_of_block = rope.coordinates(torch.tensor([[0, 40, 879, 880, 341 * 2640 - 1, 10**7 * 880 + 41]]))
    assert last_of_block.time.tolist() == [[0, 0, 0, 1, 1022, 10**7]]
    assert last_of_block.row.tolist() == [[0, 1, 21, 0, 21, 1]]
    assert last_of_block.column.tolist() == [[0, 0, 39, 0, 39, 1]]


def test_one_token_per_frame_is_partial_rope_over_time() -> None:
    axial = Rope3dEncoding(64, (1, 1), theta=256.0, split=(8, 28, 28))
    partial = RotaryEncoding(64, theta=256.0, rotary_dim=8, interleaved=True)
    x, positions = torch.randn(2, 3, 4, 64), torch.tensor([[0, 9, 7499, 123_456]])
    torch.testing.assert_close(
        axial.rotate(x, axial.angles(positions)), partial.rotate(x, partial.angles(positions)), rtol=0, atol=0
    )


def test_time_can_be_counted_from_elsewhere() -> None:
    rope = Rope3dEncoding(20, (2, 3))
    positions = 700 * 6 + torch.arange(12)[None]
    time = rope.coordinates(positions).time - 700
    assert rope.angles(positions, time=time).cos.equal(rope.angles(positions - 700 * 6).cos)
    # Scores see differences of time only, so counting from another frame changes none of them.
    q, k = torch.randn(2, 1, 1, 12, 20, dtype=torch.float64)
    scores = [
        rope.rotate(q, angles) @ rope.rotate(k, angles).mT
        for angles in (rope.angles(positions, torch.float64), rope.angles(positions, torch.float64, time=time))
    ]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-10)


def test_each_axis_turns_its_own_channels_only() -> None:
    rope = Rope3dEncoding(20, (2, 3))  # pairs 4 | 3 | 3
    still = rope.angles(torch.tensor([[0]])).cos
    for position, moved in ((6, range(0, 8)), (3, range(8, 14)), (1, range(14, 20))):
        changed = (rope.angles(torch.tensor([[position]])).cos != still).flatten().nonzero().flatten()
        assert changed.tolist() == list(moved)


def test_half_split_is_a_permutation() -> None:
    halves, adjacent = Rope3dEncoding(20, (2, 3), interleaved=False), Rope3dEncoding(20, (2, 3))
    order = torch.arange(20).view(2, -1).T.flatten()
    x, positions = torch.randn(2, 3, 4, 20), torch.randint(0, 10**6, (2, 4))
    torch.testing.assert_close(
        halves.rotate(x, halves.angles(positions))[..., order],
        adjacent.rotate(x[..., order], adjacent.angles(positions)),
        rtol=0,
        atol=0,
    )


def test_no_token_is_finite_and_rows_may_differ() -> None:
    rope = Rope3dEncoding(12, (2, 2))
    positions = torch.tensor([[-1, 0, 5], [8, 9, 10]])
    angles = rope.angles(positions)
    assert angles.cos.shape == (2, 1, 3, 12)
    assert angles.cos.isfinite().all()
    assert angles.sin.isfinite().all()
    assert rope.angles(positions[1:]).sin.equal(angles.sin[1:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rope3dEncoding(15, (2, 2)), "rotary_dim = 15"),
        (lambda: Rope3dEncoding(16, (0, 2)), "grid = (0, 2)"),
        (lambda: Rope3dEncoding(16, (2, 2), split=(8, 4, 2)), "split = (8, 4, 2)"),
        (lambda: Rope3dEncoding(16, (2, 2), split=(6, 5, 5)), "split = (6, 5, 5)"),
        (lambda: Rope3dEncoding(16, (2, 2), split=(8, 8)), "split = (8, 8)"),
        (lambda: Rope3dEncoding(16, (2, 2), theta=1.0), "theta = 1.0"),
        (lambda: Rope3dEncoding(16, (2, 2)).angles(torch.zeros(1, 2)), "Rope3dEncoding.angles: positions are"),
        (
            lambda: Rope3dEncoding(16, (2, 2)).angles(torch.zeros(1, 2).long(), time=torch.zeros(1, 2)),
            "Rope3dEncoding.angles (time)",
        ),
    ],
)
def test_misuse_is_named(make, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the message is compared literally below
        make()
    assert message in str(error.value)
