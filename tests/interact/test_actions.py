"""Action codecs: tokens and actions both ways, against spaces' own membership and hand-made numbers."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from longburn.interact import BinsCodec, ContinuousCodec, DiscreteCodec, GaussianSampler, action_codec
from longburn.sampling import SamplerConfig

SPACES = [
    (spaces.Discrete(5), None),
    (spaces.Discrete(3, start=-7), None),
    (spaces.MultiDiscrete([3, 1, 4]), None),
    (spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[5, 0], [-1, 2]]), None),
    (spaces.MultiBinary(4), None),
    (spaces.MultiBinary([2, 3]), None),
    (spaces.Box(-0.1, 0.1, (2,)), 7),
    (spaces.Box(np.array([[0.5, -3.0]], np.float32), np.array([[0.75, 5.0]], np.float32)), 11),
    (spaces.Box(-1e-3, 1e6, (3,), np.float64), 255),
    (spaces.Box(0, 255, (2,), np.uint8), 10),
    (spaces.Box(-2, 2, (1,), np.int8), 5),
    (spaces.Box(-2, 2, (1,), np.int64), 4),
    (spaces.Box(-(2**63), 2**63 - 1, (2,), np.int64), 7),
    (spaces.Box(0, 2**64 - 1, (2,), np.uint64), 256),
]


@pytest.mark.parametrize(("space", "bins"), SPACES, ids=str)
def test_every_token_is_an_action_and_comes_back(space: spaces.Space, bins: int | None) -> None:
    codec = action_codec(space, bins=bins)
    spread = torch.arange(codec.width, dtype=torch.float64)[None]
    ids = [codec.restrict(spread, index).isfinite()[0].nonzero()[:, 0].tolist() for index in range(codec.length)]
    assert [i for component in ids for i in component] == list(range(codec.width))  # every id is one component's
    batch = max(map(len, ids))
    tokens = torch.tensor([[of[row % len(of)] for of in ids] for row in range(batch)])
    actions = codec.action(tokens)
    assert batch_space(space, batch).contains(actions)
    assert torch.equal(codec.tokens(actions), tokens)
    assert batch_space(space, 3).contains(codec.action(codec.idle(3)))


def test_tokens_by_hand() -> None:
    codec = action_codec(spaces.MultiDiscrete([3, 2], start=[10, -1]))
    assert codec.tokens(np.array([[12, -1], [10, 0]])).tolist() == [[2, 3], [0, 4]]
    assert action_codec(spaces.Discrete(2, start=5)).tokens([5, 6]).tolist() == [[0], [1]]
    box = action_codec(spaces.Box(-1.0, 1.0, (1,)), bins=4)
    assert box.tokens([[-1.0], [-0.5], [-0.51], [0.0], [1.0]]).tolist() == [[0], [1], [0], [2], [3]]
    np.testing.assert_allclose(box.action(torch.arange(4)[:, None]), [[-0.75], [-0.25], [0.25], [0.75]])
    whole = action_codec(spaces.Box(0, 9, (1,), np.int64), bins=3)  # 0-3, 4-6, 7-9
    assert whole.tokens([[v] for v in range(10)])[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert whole.action(torch.arange(3)[:, None])[:, 0].tolist() == [1, 5, 8]


@pytest.mark.parametrize(("space", "bins"), SPACES, ids=str)
def test_sampled_actions_land_in_the_bin_around_them(space: spaces.Space, bins: int | None) -> None:
    codec = action_codec(space, bins=bins)
    space.seed(0)
    actions = np.stack([np.asarray(space.sample()) for _ in range(200)])
    back = codec.action(codec.tokens(actions))
    if bins is None:
        np.testing.assert_array_equal(back, actions)
    else:
        high, low = space.high.astype(np.float64), space.low.astype(np.float64)
        within = (
            (high - low) / bins / 2 if np.issubdtype(space.dtype, np.floating) else np.ceil((high - low + 1) / bins)
        )
        assert (np.abs(back.astype(np.float64) - actions) <= within * (1 + 1e-6) + 1e-6).all()


@pytest.mark.filterwarnings("error")
def test_bounds_that_are_as_far_apart_as_can_be() -> None:
    far = 1.7e308
    space = spaces.Box(-far, far, (1,), np.float64)
    bins = action_codec(space, bins=4)
    np.testing.assert_allclose(
        bins.action(torch.arange(4)[:, None]), far * np.array([[-0.75], [-0.25], [0.25], [0.75]])
    )
    assert bins.tokens([[-far], [-0.4 * far], [0.4 * far], [far]])[:, 0].tolist() == [0, 1, 2, 3]
    codec = action_codec(space)
    assert codec.tokens([[-far], [0.0], [far]])[:, 0, 0].tolist() == [-1, 0, 1]
    np.testing.assert_allclose(codec.action(torch.tensor([[[-1.0]], [[0.5]]])), [[-far], [0.5 * far]])
    whole = action_codec(spaces.Box(0, 2**64 - 1, (1,), np.uint64), bins=2)
    assert whole.tokens(np.array([[0], [2**63 - 1], [2**63], [2**64 - 1]], np.uint64))[:, 0].tolist() == [0, 0, 1, 1]
    assert whole.action(torch.tensor([[0], [1]]))[:, 0].tolist() == [2**62 - 1, 2**63 + 2**62 - 1]
    assert action_codec(spaces.Box(0, 9, (1,)), bins=np.int64(3)).width == 3


def test_a_component_of_one_value_is_that_value() -> None:
    space = spaces.Box(np.array([0.5, 0.0], np.float32), np.array([0.5, 1.0], np.float32))
    assert action_codec(space, bins=4).action(torch.tensor([[3, 4]])).tolist() == [[0.5, 0.125]]
    assert action_codec(space).tokens([[0.5, 0.0]]).tolist() == [[[0.0, -1.0]]]


def test_continuous_actions() -> None:
    codec = action_codec(spaces.Box(np.array([0.0, -np.inf], np.float32), np.array([4.0, np.inf], np.float32)))
    assert isinstance(codec, ContinuousCodec)
    assert (codec.length, codec.width) == (1, 4)
    actions = np.array([[1.0, -30.0], [4.0, 2.5]], np.float32)
    assert codec.tokens(actions).tolist() == [[[-0.5, -30.0]], [[1.0, 2.5]]]
    np.testing.assert_array_equal(codec.action(codec.tokens(actions)), actions)
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"component 1 of row 0 is {wrong}, wanted a finite number"):
            codec.action(torch.tensor([[[0.0, wrong]]]))
    with pytest.raises(ValueError, match=r"tokens: component 1 of row 0 is inf"):
        codec.tokens([[1.0, math.inf]])


def test_gaussian_draws() -> None:
    codec = ContinuousCodec(spaces.Box(-np.inf, np.inf, (2,)))
    n = 4000
    rows = codec.sampler([SamplerConfig(seed=seed) for seed in range(n)], "cpu")
    logits = torch.tensor([[3.0, -1.0, math.log(0.5), math.log(2.0)]]).expand(n, -1)
    draw = torch.zeros(n, dtype=torch.int64)
    first, second = rows(logits, draw), rows(logits, draw + 1)
    for drawn in (first, second):
        assert (drawn.mean(0) - torch.tensor([3.0, -1.0])).abs().max() < 0.15
        assert (drawn.std(0) / torch.tensor([0.5, 2.0]) - 1).abs().max() < 0.05
    together = torch.cat([first - logits[:, :2], second - logits[:, :2]], 1).T.corrcoef()
    assert (together - torch.eye(4)).abs().max() < 0.06  # components and draws know nothing of each other
    assert torch.equal(rows(logits, draw), first)
    alone = codec.sampler([SamplerConfig(seed=17)], "cpu")
    assert torch.equal(alone(logits[:1], draw[:1])[0], first[17])
    means = codec.sampler([SamplerConfig(temperature=0, seed=0)] * 2, "cpu")
    assert means(logits[:2], draw[:2]).tolist() == [[3.0, -1.0]] * 2
    with pytest.raises(ValueError, match="temperature and seed only"):
        codec.sampler([SamplerConfig(top_k=3)], "cpu")


def test_what_is_drawn_beyond_the_bounds_is_clipped_for_model_and_environment() -> None:
    space = spaces.Box(-2.0, 6.0, (1,))
    codec = ContinuousCodec(space)
    sampler = codec.sampler([SamplerConfig(seed=0)] * 2, "cpu")
    assert isinstance(sampler, GaussianSampler)
    tokens = sampler(torch.tensor([[50.0, 0.0], [-50.0, 0.0]]), torch.zeros(2, dtype=torch.int64))
    assert tokens.tolist() == [[1.0], [-1.0]]
    assert codec.action(tokens[:, None]).tolist() == [[6.0], [-2.0]]


@pytest.mark.parametrize(
    ("space", "actions", "message"),
    [
        (spaces.Discrete(3), [0, 3], r"row 1 has 3, which is not in Discrete\(3\)"),
        (spaces.Discrete(3), [0.5], "row 0 has 0.5"),
        (spaces.Discrete(3), 1, r"values of shape \[\], wanted \[B\]"),
        (spaces.MultiDiscrete([2, 2]), [[0, 1, 0]], r"values of shape \[1, 3\], wanted \[B, 2\]"),
        (spaces.MultiDiscrete([2, 2]), [[0, 1], [0, -1]], r"row 1 has \[0, -1\]"),
        (spaces.MultiBinary(2), [[0, 2]], r"row 0 has \[0, 2\]"),
        (spaces.MultiBinary(2), [[256, 1]], r"row 0 has \[256, 1\], which is not in MultiBinary\(2\)"),
        (spaces.MultiDiscrete([3, 2], dtype=np.int8), [[2, 1], [257, 1]], r"row 1 has \[257, 1\]"),
        (spaces.MultiDiscrete([2, 2]), [[0.0, 1.0]], r"row 0 has \[0.0, 1.0\]"),
        (spaces.Discrete(3), ["left"], "row 0 has left"),
        (spaces.Box(-0.1, 0.1, (2,)), [[0.0, 0.2]], r"row 0 has \[0.0, 0.2\]"),
        (spaces.Box(-0.1, 0.1, (2,)), [[0.0, math.nan]], "nan"),
        (spaces.Box(-0.1, 0.1, (2,)), [0.0], r"values of shape \[1\], wanted \[B, 2\]"),
    ],
)
def test_actions_of_wrong_shape_or_range(space: spaces.Space, actions: object, message: str) -> None:
    for codec in [action_codec(space)] + ([action_codec(space, bins=3)] if isinstance(space, spaces.Box) else []):
        with pytest.raises(ValueError, match=message) as raised:
            codec.tokens(actions)
        assert "\n" not in str(raised.value)


def test_a_fraction_is_no_action_of_whole_numbers() -> None:
    with pytest.raises(ValueError, match=r"row 0 has \[1.5\]"):
        action_codec(spaces.Box(0, 9, (1,), np.int64), bins=3).tokens([[1.5]])


def test_tokens_that_are_none_of_a_component() -> None:
    with pytest.raises(ValueError, match=r"token 1 of row 0 is 2, wanted 3 \.\. 4"):
        action_codec(spaces.MultiDiscrete([3, 2])).action(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("tokens", [[[0, 3, 4]], [[0]], [0, 3], [[0.5, 3.0]]], ids=str)
def test_tokens_of_another_shape(tokens: list) -> None:
    with pytest.raises(ValueError, match=r"wanted int64 \[B, 2\]: one a component"):
        action_codec(spaces.MultiDiscrete([3, 2])).action(torch.tensor(tokens))
    with pytest.raises(ValueError, match=r"tokens of shape \[.*\], wanted \[B, 1, 2\]"):
        action_codec(spaces.Box(-1, 1, (2,))).action(torch.tensor(tokens))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: action_codec(spaces.Text(5)), "Text is not supported; wanted Discrete"),
        (lambda: action_codec(spaces.Dict(a=spaces.Discrete(2))), "Dict is not supported.*wrappers.TransformAction"),
        (lambda: action_codec(spaces.Discrete(2), bins=4), "only a Box is cut into bins"),
        (lambda: action_codec(spaces.Box(-np.inf, 1, (2,)), bins=4), "no finite bounds"),
        (lambda: action_codec(spaces.Box(0, 1, (2,)), bins=0), "at least one bin"),
        (lambda: action_codec(spaces.Box(0, 1, (2,)), bins=2.5), "2.5 bins of .*a whole number, at least one bin"),
        (lambda: action_codec(spaces.Box(0, 1, (2,)), bins="4"), "'4' bins of .*a whole number"),
        (lambda: action_codec(spaces.Box(0, 1, (2,)), bins=True), "True bins of .*a whole number"),
        (lambda: action_codec(spaces.Box(0, 2, (2,), np.uint8), bins=4), "fewer integers"),
        (lambda: action_codec(spaces.Box(0, 2, (2,), np.uint8)), "wanted a Box of floating-point numbers"),
        (lambda: BinsCodec(spaces.Discrete(2), 3), "wanted a Box"),
        (lambda: DiscreteCodec(spaces.Box(0, 1)), "wanted Discrete"),
    ],
)
def test_unsupported_spaces(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)
