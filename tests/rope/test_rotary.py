"""Angles against exact arithmetic, the rotation against complex multiplication, and both inside the compiler."""

import copy
import math
import pickle

import mpmath
import pytest
import torch
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotate
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotate

from longburn.rope import Angles, DynamicNtkScaling, LinearScaling, Rope3dEncoding, RotaryEncoding, ntk_yarn

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


FAR = [10_000_000, 10_000_019, 2**24 + 1, 123_456_789, 2**30 + 3]


def positions_of(*positions: int) -> torch.Tensor:
    return torch.tensor([positions])


def by_pair(values: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second channels of all pairs."""
    return (values[..., ::2], values[..., 1::2]) if interleaved else values.chunk(2, -1)


def rotated_in_the_complex_plane(x: torch.Tensor, phase: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The definition: pair (a, b) becomes (a + ib) e^(i phase), in float64."""
    turned = torch.complex(*by_pair(x.double(), interleaved)) * torch.polar(torch.ones_like(phase), phase)
    parts = (turned.real, turned.imag)
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_angles_far_out_against_exact_arithmetic(theta: float, interleaved: bool) -> None:
    dim = 22
    rope = RotaryEncoding(dim, theta=theta, interleaved=interleaved)
    with mpmath.workdps(60):
        phases = [[p * mpmath.mpf(theta) ** (-mpmath.mpf(2 * j) / dim) for j in range(dim // 2)] for p in FAR]
        cos = torch.tensor([[float(mpmath.cos(a)) for a in row] for row in phases], dtype=torch.float64)
        sin = torch.tensor([[float(mpmath.sin(a)) for a in row] for row in phases], dtype=torch.float64)

    def errors(angles: Angles) -> torch.Tensor:
        """Largest error of each position."""
        first_cos, second_cos = by_pair(angles.cos[0, 0].double(), interleaved)
        first_sin, second_sin = by_pair(angles.sin[0, 0].double(), interleaved)
        parts = (first_cos - cos, second_cos - cos, -first_sin - sin, second_sin - sin)
        return torch.stack(parts).abs().amax((0, 2))

    # Two roundings in float64 (of the frequency and of the product), and one of the result to float32.
    in_double = torch.tensor(FAR) * 2.0**-51
    assert (errors(rope.angles(positions_of(*FAR), torch.float64)) <= in_double).all()
    tolerance = in_double + 2.0**-25
    assert (errors(rope.angles(positions_of(*FAR))) <= tolerance).all()

    # Angles formed in float32 miss that by four orders of magnitude and more.
    phase = torch.tensor(FAR).float()[:, None] * rope.inv_freq.float()
    missed = (phase.cos().double() - cos).abs().amax(1)
    assert (missed > 1e4 * tolerance).all()
    assert missed[-1] > 0.1


def test_angles_beyond_the_trained_context_of_yarn() -> None:
    rope = ntk_yarn(64, theta=150_000.0, factor=32.0, original_context=4096, truncate=False)
    positions = positions_of(4095, 4096, 131_071, 131_072, 10_000_001)
    cos = rope.angles(positions).cos[0, 0, :, :32]
    for row, position in zip(cos, positions[0].tolist(), strict=True):
        exact = [1.3465735902799727 * math.cos(position * f) for f in rope.inv_freq.tolist()]
        torch.testing.assert_close(row.double(), torch.tensor(exact, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 14, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_rotation_is_complex_multiplication(interleaved: bool, rotary_dim: int | None, batch: int) -> None:
    dim = rotary_dim or 26
    rope = RotaryEncoding(26, rotary_dim=rotary_dim, interleaved=interleaved)
    x = torch.randn(3, 5, 7, 26, dtype=torch.float64)
    positions = torch.randint(0, 50_000, (batch, 7))
    rotated = rope.rotate(x, rope.angles(positions, torch.float64))
    phase = positions[:, None, :, None] * rope.inv_freq
    expected = rotated_in_the_complex_plane(x[..., :dim], phase, interleaved)
    torch.testing.assert_close(rotated[..., :dim], expected, rtol=0, atol=1e-12)
    assert rotated[..., dim:].equal(x[..., dim:])


def test_pairings_are_those_of_transformers() -> None:
    q, k = torch.randn(2, 3, 5, 16), torch.randn(2, 1, 5, 16)
    positions = torch.randint(0, 100, (2, 5))
    half = RotaryEncoding(16)
    angles = half.angles(positions)
    phase = (positions[..., None] * half.inv_freq).float()
    expected = llama_rotate(q, k, torch.cat((phase, phase), -1).cos(), torch.cat((phase, phase), -1).sin())
    torch.testing.assert_close(half.rotate(q, angles), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half.rotate(k, angles), expected[1], rtol=1e-5, atol=1e-5)

    interleaved = RotaryEncoding(16, interleaved=True)
    expected = gptj_rotate(q.transpose(1, 2), phase.sin(), phase.cos()).transpose(1, 2)
    torch.testing.assert_close(interleaved.rotate(q, interleaved.angles(positions)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotary_dim", [None, 12])
def test_pairings_differ_by_a_permutation_only(rotary_dim: int | None) -> None:
    dim = rotary_dim or 20
    half, interleaved = (RotaryEncoding(20, rotary_dim=rotary_dim, interleaved=flag) for flag in (False, True))
    order = torch.cat((torch.arange(dim).view(2, -1).T.flatten(), torch.arange(dim, 20)))
    x, positions = torch.randn(2, 3, 4, 20), torch.randint(0, 10**7, (2, 4))
    from_half = half.rotate(x, half.angles(positions))[..., order]
    from_interleaved = interleaved.rotate(x[..., order], interleaved.angles(positions))
    torch.testing.assert_close(from_half, from_interleaved, rtol=0, atol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_difference_only(interleaved: bool) -> None:
    rope = RotaryEncoding(32, interleaved=interleaved, scaling=LinearScaling(3.0))
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)

    def score(p: int, j: int) -> float:
        rotated_q = rope.rotate(q, rope.angles(positions_of(p), torch.float64))
        rotated_k = rope.rotate(k, rope.angles(positions_of(j), torch.float64))
        return (rotated_q * rotated_k).sum().item()

    for distance in (0, 1, 77, 5000):
        expected = score(distance, 0)
        for shift in (1, 1000, 1_000_003):
            assert score(distance + shift, shift) == pytest.approx(expected, abs=1e-8)
    assert abs(score(5, 0) - score(6, 0)) > 1e-3


def test_lengths_are_kept_up_to_the_attention_factor() -> None:
    rope = ntk_yarn(48, theta=1e4, factor=4.0, original_context=512, attention_factor=1.25)
    x = torch.randn(1, 2, 3, 48, dtype=torch.float64)
    rotated = rope.rotate(x, rope.angles(positions_of(0, 5, 10**7), torch.float64))
    torch.testing.assert_close(rotated.norm(dim=-1), 1.25 * x.norm(dim=-1), rtol=1e-14, atol=0)


def test_position_zero_changes_nothing_and_no_token_is_finite() -> None:
    rope = RotaryEncoding(8)
    angles = rope.angles(positions_of(0, -1))
    x = torch.randn(2, 1, 2, 8)
    rotated = rope.rotate(x, angles)
    assert rotated[:, :, 0].equal(x[:, :, 0])
    assert rotated.isfinite().all()


def test_chunks_rows_and_heads_do_not_matter() -> None:
    rope = RotaryEncoding(16, rotary_dim=8, scaling=DynamicNtkScaling(2.0, 4), length=40)
    x, positions = torch.randn(2, 3, 11, 16), torch.stack((torch.arange(11), torch.arange(11) + 500))
    whole = rope.rotate(x, rope.angles(positions))
    for row in range(2):
        for chunk in (1, 2, 3, 5):
            parts = [
                rope.rotate(x[row, None, :, s], rope.angles(positions[row, None, s]))
                for s in (slice(i, i + chunk) for i in range(0, 11, chunk))
            ]
            assert torch.cat(parts, 2)[0].equal(whole[row])
    assert rope.rotate(x[:, 1:2], rope.angles(positions)).equal(whole[:, 1:2])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype, interleaved: bool) -> None:
    rope = RotaryEncoding(24, rotary_dim=20, interleaved=interleaved)
    x, positions = torch.randn(2, 3, 4, 24).to(dtype), torch.randint(0, 10**6, (1, 4))
    angles = rope.angles(positions)
    assert angles.cos.dtype == angles.sin.dtype == torch.float32
    assert angles.cos.shape == (1, 1, 4, 20)
    rotated = rope.rotate(x, angles)
    assert rotated.dtype == dtype
    if dtype.itemsize == 2:  # rounded once: what float32 gives, and nothing else
        assert rotated.equal(rope.rotate(x.float(), angles).to(dtype))


def test_any_layout_of_heads() -> None:
    rope = RotaryEncoding(12, interleaved=True)
    fused = torch.randn(2, 5, 7, 12)  # [B, T, heads, D], of which the middle ones are rotated
    x, angles = fused.transpose(1, 2)[:, 2:5], rope.angles(positions_of(3, 4, 5, 6, 7))
    assert rope.rotate(x, angles).equal(rope.rotate(x.contiguous(), angles))


@pytest.mark.parametrize("rotary_dim", [None, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(rotary_dim: int | None, interleaved: bool) -> None:
    rope = RotaryEncoding(8, rotary_dim=rotary_dim, interleaved=interleaved)
    angles = rope.angles(positions_of(7, 9), torch.float64)
    x = torch.randn(1, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope.rotate(x, angles), x)


def test_inference_tensors_do_not_stay_behind() -> None:
    with torch.inference_mode():
        rope = RotaryEncoding(8)
        rope.angles(positions_of(1))
    weight = torch.ones(8, requires_grad=True)
    rope.rotate(weight.expand(1, 1, 1, 8), rope.angles(positions_of(1))).sum().backward()
    assert weight.grad is not None


def rotate_at(rope: RotaryEncoding | Rope3dEncoding, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return rope.rotate(x, rope.angles(positions))


@pytest.mark.parametrize("warm", [False, True])
def test_compiles_in_one_graph_for_several_encodings(warm: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(rotate_at, fullgraph=True, backend="aot_eager", dynamic=False)
    # Same code, same shapes, other frequencies: a constant baked in for the first would be served to the second.
    for rope in (RotaryEncoding(16), RotaryEncoding(16, theta=99.0), Rope3dEncoding(16, (2, 3))):
        x, positions = torch.randn(2, 3, 5, 16), torch.arange(5)[None] + 10_000_000
        if warm:
            rope.angles(positions)
        torch.testing.assert_close(compiled(rope, x, positions), rotate_at(rope, x, positions))


def test_nothing_is_kept_from_a_trace() -> None:
    torch.compiler.reset()
    rope = RotaryEncoding(16)
    on_meta = torch.zeros(1, 3, dtype=torch.int64, device="meta")
    torch.compile(rope.angles, fullgraph=True, backend="aot_eager")(on_meta)
    assert torch.device("meta") not in rope._signed._copies
    rope.angles(on_meta)
    assert torch.device("meta") in rope._signed._copies


@pytest.mark.cuda
@pytest.mark.parametrize("rope", [RotaryEncoding(16, rotary_dim=12), Rope3dEncoding(16, (2, 3))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_rotates_by_the_positions_of_its_replay(rope, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 16, device="cuda").to(dtype)
    positions = torch.arange(5, device="cuda")[None].repeat(2, 1)
    rotate_at(rope, x, positions)  # leaves the frequencies on the device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotated = rotate_at(rope, x, positions)
    positions.add_(10_000_000)
    graph.replay()
    # The tables agree to float32; what is left is the rounding of the result.
    expected = rotate_at(rope, x.cpu(), positions.cpu())
    torch.testing.assert_close(rotated.cpu(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("warm", [False, True])
def test_inductor_on_cuda(warm: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(rotate_at, fullgraph=True, mode="reduce-overhead")
    for rope in (RotaryEncoding(16), RotaryEncoding(16, theta=99.0, interleaved=True)):
        x = torch.randn(2, 3, 5, 16, device="cuda")
        for start in (0, 7, 10_000_000):
            positions = torch.arange(5, device="cuda")[None] + start
            expected = rotate_at(rope, x.cpu(), positions.cpu())
            if warm:
                rope.angles(positions)
            torch.testing.assert_close(compiled(rope, x, positions).cpu(), expected, rtol=1e-5, atol=1e-5)


def test_is_a_value() -> None:
    rope = ntk_yarn(64, theta=150_000.0, factor=32.0, original_context=4096)
    again = ntk_yarn(64, theta=150_000.0, factor=32.0, original_context=4096)
    assert rope == again
    assert hash(rope) == hash(again)
    assert rope != ntk_yarn(64, theta=150_000.0, factor=32.0, original_context=4096, truncate=False)
    assert RotaryEncoding(64) == RotaryEncoding(64, rotary_dim=64)
    for other in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        assert other == rope
        assert other.angles(positions_of(9)).cos.equal(rope.angles(positions_of(9)).cos)
    with pytest.raises(AttributeError):
        rope.theta = 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotaryEncoding(15), "rotary_dim = 15 with head_dim = 15; want an even number"),
        (lambda: RotaryEncoding(16, rotary_dim=18), "rotary_dim = 18"),
        (lambda: RotaryEncoding(16, rotary_dim=5), "rotary_dim = 5"),
        (lambda: RotaryEncoding(16, rotary_dim=0), "rotary_dim = 0"),
        (lambda: RotaryEncoding(16, theta=0.5), "theta = 0.5"),
        (lambda: RotaryEncoding(16, theta=math.inf), "theta = inf"),
        (lambda: RotaryEncoding(16, length=0), "length = 0"),
        (lambda: RotaryEncoding(16).angles(torch.zeros(1, 3)), "torch.float32 [1, 3]; want int64"),
        (lambda: RotaryEncoding(16).angles(torch.arange(3)), "torch.int64 [3]; want int64 [batch or 1, tokens]"),
        (lambda: rotate_at(RotaryEncoding(16), torch.zeros(1, 2, 3, 8), torch.zeros(1, 3).long()), "[1, 2, 3, 8]"),
        (lambda: rotate_at(RotaryEncoding(8), torch.zeros(1, 2, 3, 8), torch.zeros(1, 1).long()), "1 tokens; want x"),
        (lambda: rotate_at(RotaryEncoding(8), torch.zeros(1, 2, 3, 8), torch.zeros(2, 3).long()), "batch 2, 3 tokens"),
        (lambda: rotate_at(RotaryEncoding(8), torch.zeros(2, 3, 8), torch.zeros(1, 3).long()), "x is [2, 3, 8]"),
    ],
)
def test_misuse_is_named(make, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the message is compared literally below
        make()
    assert message in str(error.value)
