"""Encoders against formulas written out."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from longburn.interact import EmbeddingEncoder, LinearEncoder, LinearHead, ObservationEncoder, PatchEncoder


@pytest.mark.parametrize(
    ("space", "observations", "rows"),
    [
        (spaces.Discrete(4, start=2), [2, 5], [[0], [3]]),
        (spaces.MultiDiscrete([3, 2], start=[1, 0]), [[3, 0], [1, 1]], [[2, 3], [0, 4]]),
        (spaces.MultiBinary([1, 2]), [[[0, 1]], [[1, 1]]], [[0, 3], [1, 3]]),
    ],
    ids=str,
)
def test_embeddings_are_summed(space: spaces.Space, observations: list, rows: list[list[int]]) -> None:
    encoder = EmbeddingEncoder(space, 6)
    wanted = torch.stack([sum(encoder.table.weight[i] for i in ids) for ids in rows])[:, None]
    torch.testing.assert_close(encoder.encode(np.array(observations)), wanted)


def test_a_box_is_scaled_and_projected() -> None:
    low, high = np.array([[0.0, -np.inf, -3.4e38]], np.float32), np.array([[4.0, np.inf, 3.4e38]], np.float32)
    encoder = LinearEncoder(spaces.Box(low, high), 5)
    x = encoder.encode(np.array([[[4.0, 7.0, -2.0]], [[1.0, 0.0, 0.5]]], np.float32))
    wanted = encoder.linear(torch.tensor([[1.0, 7.0, -2.0], [-0.5, 0.0, 0.5]]))[:, None]
    torch.testing.assert_close(x, wanted)


def test_patches_in_the_order_of_reading() -> None:
    encoder = PatchEncoder(spaces.Box(0, 255, (4, 6, 3), np.uint8), 8, (2, 3))
    image = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    x = encoder.encode(image)
    assert x.shape == (2, 4, 8)
    weight, bias = encoder.project.weight.flatten(1), encoder.project.bias
    for number, (top, left) in enumerate([(0, 0), (0, 3), (2, 0), (2, 3)]):
        patch = torch.from_numpy(image[1, top : top + 2, left : left + 3]).float() / 127.5 - 1
        wanted = weight @ patch.permute(2, 0, 1).flatten() + bias + encoder.places[number]
        torch.testing.assert_close(x[1, number], wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(encoder.encode(image.astype(np.int64)), x)
    assert encoder.encode(image[:0].astype(np.int64)).shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((1, 4, 6, 3), 0.5), "images of float64, wanted uint8 or other integers within 0 .. 255"),
        (np.ones((1, 4, 6, 3), bool), "images of bool"),
        (np.full((1, 4, 6, 3), None), "images of object"),
        (np.full((1, 4, 6, 3), 300), "images that hold 300, wanted uint8 or other integers within 0 .. 255"),
        (np.full((1, 4, 6, 3), -5), "images that hold -5"),
    ],
    ids=["fractions", "truth", "objects", "too much", "too little"],
)
def test_patches_are_of_bytes(images: np.ndarray, message: str) -> None:
    encoder = PatchEncoder(spaces.Box(0, 255, (4, 6, 3), np.uint8), 8, (2, 3))
    with pytest.raises(ValueError, match=rf"^PatchEncoder\.encode: {message}") as raised:
        encoder.encode(images)
    assert "\n" not in str(raised.value)


def test_they_are_what_the_loop_asks_for() -> None:
    assert isinstance(EmbeddingEncoder(spaces.Discrete(2), 4), ObservationEncoder)
    assert LinearHead(4, 3).logits(torch.zeros(2, 4)).shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmbeddingEncoder(spaces.Box(0, 1), 4), "wanted Discrete, MultiDiscrete or MultiBinary"),
        (lambda: LinearEncoder(spaces.Discrete(3), 4), "wanted a Box"),
        (lambda: PatchEncoder(spaces.Box(0, 255, (4, 6), np.uint8), 4, (2, 2)), "images"),
        (lambda: PatchEncoder(spaces.Box(0, 1, (4, 6, 3), np.float32), 4, (2, 2)), "images, uint8"),
        (lambda: PatchEncoder(spaces.Box(0, 255, (4, 6, 3), np.uint8), 4, (2, 4)), "do not divide images of 4 x 6"),
        (lambda: LinearEncoder(spaces.Box(0, 1, (3,)), 4).encode(np.zeros((2, 4))), r"\[2, 4\], wanted \[B, 3\]"),
        (
            lambda: PatchEncoder(spaces.Box(0, 255, (4, 6, 3), np.uint8), 4, (2, 2)).encode(np.zeros((1, 6, 4, 3))),
            r"observations of shape \[1, 6, 4, 3\], wanted \[B, 4, 6, 3\]",
        ),
    ],
)
def test_what_does_not_fit(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("space", "observations", "message"),
    [
        (spaces.Discrete(5), [4, -1], r"row 1 has -1, which is not in Discrete\(5\)"),
        (spaces.Discrete(5), [5], "row 0 has 5"),
        (spaces.Discrete(5), [1.7], "row 0 has 1.7"),
        (spaces.MultiDiscrete([3, 2]), [[3, 0]], r"row 0 has \[3, 0\]"),
        (spaces.MultiBinary(2), [[0, 1], [0, 256]], r"row 1 has \[0, 256\]"),
        (spaces.MultiBinary(2), [0, 1], r"values of shape \[2\], wanted \[B, 2\]"),
    ],
)
def test_an_embedding_is_one_of_the_space(space: spaces.Space, observations: list, message: str) -> None:
    with pytest.raises(ValueError, match=f"EmbeddingEncoder.encode: {message}"):
        EmbeddingEncoder(space, 4).encode(np.array(observations))
