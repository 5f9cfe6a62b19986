"""Audio tokens against diffusers' own tokenizer and detokenizer, and as a stream."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from v15_peers import ACOUSTIC, assert_parity, diffusers_parts, ours_of, randn

from longburn.models.ace_step.v15 import AceStep15, FiniteScalarQuantizer

Models = tuple[dict[str, nn.Module], AceStep15]
RELEASED = (8, 8, 8, 5, 5, 5)


@pytest.fixture(scope="module", params=["2b", "xl"])
def models(request: pytest.FixtureRequest) -> Models:
    parts = diffusers_parts(request.param)
    return parts, ours_of(parts, request.param)


@pytest.mark.parametrize(("B", "N"), [(1, 5), (2, 35), (3, 500)])
@torch.no_grad()
def test_tokens_of_whole_groups(models: Models, B: int, N: int) -> None:
    parts, ours = models
    latents = randn(B, N, ACOUSTIC)
    wanted, wanted_ids = parts["audio_tokenizer"].tokenize(latents)
    values, ids = ours.tokenizer(latents)
    assert ids.shape == (B, N // 5)
    assert ids.tolist() == wanted_ids[..., 0].tolist()
    assert ids.unique().numel() > min(ids.numel(), 20) // 2
    assert_parity(values, wanted)


@pytest.mark.parametrize("N", [1, 9, 21])
@torch.no_grad()
def test_silence_fills_the_last_group(models: Models, N: int) -> None:
    parts, ours = models
    latents, silence = randn(2, N, ACOUSTIC), parts["condition_encoder"].silence_latent
    wanted, wanted_ids = parts["audio_tokenizer"].tokenize(latents, silence)
    values, ids = ours.tokenizer(latents, silence)
    assert ids.tolist() == wanted_ids[..., 0].tolist()
    assert_parity(values, wanted)
    with pytest.raises(ValueError, match=rf"AudioTokenizer: {N} frames are no whole groups of 5; give {-N % 5} frames"):
        ours.tokenizer(latents)


@pytest.mark.parametrize(("B", "G"), [(1, 1), (2, 13)])
@torch.no_grad()
def test_frames_of_tokens(models: Models, B: int, G: int) -> None:
    parts, ours = models
    ids = torch.randint(0, 64000, (B, G), generator=torch.Generator().manual_seed(0))
    values = parts["audio_tokenizer"].quantizer.get_output_from_indices(ids)
    wanted = parts["audio_token_detokenizer"](values)
    assert_parity(ours.tokenizer.quantizer.of_ids(ids), values)
    assert_parity(ours.detokenizer(values), wanted)
    assert_parity(ours.hints(ids), wanted)
    assert wanted.shape == (B, 5 * G, ACOUSTIC)


@pytest.mark.parametrize("cuts", [[1] * 12, [5, 7], [2, 3, 1, 6]], ids=str)
@torch.no_grad()
def test_a_stream_is_coded_group_by_group_without_state(models: Models, cuts: list[int]) -> None:
    _, ours = models
    latents = randn(2, 60, ACOUSTIC)
    whole, whole_ids = ours.tokenizer(latents)
    frames = ours.detokenizer(whole)
    pieces = [ours.tokenizer(piece) for piece in latents.split([5 * n for n in cuts], 1)]
    assert torch.equal(torch.cat([ids for _, ids in pieces], 1), whole_ids)
    assert_parity(torch.cat([ours.detokenizer(values) for values, _ in pieces], 1), frames, 1e-6)


def test_ids_count_in_mixed_radix() -> None:
    """Every id of a small codebook: its numbers, written out, and the id that they are quantised to."""
    levels = (3, 2, 4)
    quantizer = FiniteScalarQuantizer(3, levels, torch.float64)
    with torch.no_grad():
        for linear in (quantizer.project_in, quantizer.project_out):
            linear.weight.copy_(torch.eye(3, dtype=torch.float64))
            linear.bias.zero_()
    assert quantizer.codebook_size == 24
    numbers = quantizer.of_ids(torch.arange(24))
    for last, middle, first in itertools.product(range(4), range(2), range(3)):
        wanted = [2 * first / 2 - 1, 2 * middle / 1 - 1, 2 * last / 3 - 1]
        assert numbers[first + 3 * middle + 6 * last].tolist() == pytest.approx(wanted)
    values, ids = quantizer(numbers)
    assert ids.tolist() == list(range(24))
    torch.testing.assert_close(values, numbers)


def closed_form(y: Tensor, levels: tuple[int, ...]) -> list[int]:
    """The published arithmetic, number by number."""
    ids = []
    for row in y.double().tolist():
        index, place = 0, 1
        for number, L in zip(row, levels, strict=True):
            s = 1 + 1 / (L - 1)
            bounded = s * math.tanh(number / s)
            level = int((L - 1) * (min(max(bounded, -1), 1) + 1) / 2 + 0.5)
            index, place = index + place * level, place * L
        ids.append(index)
    return ids


@torch.no_grad()
def test_the_released_codebook() -> None:
    quantizer = FiniteScalarQuantizer(6, RELEASED, torch.float32)
    quantizer.project_in.weight.copy_(torch.eye(6))
    quantizer.project_in.bias.zero_()
    y = 2 * randn(400, 6)
    _, ids = quantizer(y)
    assert quantizer.codebook_size == 64000
    assert ids.tolist() == closed_form(y, RELEASED)
    assert ids.min() >= 0
    assert ids.max() < 64000


@torch.no_grad()
def test_bf16_is_quantised_in_fp32() -> None:
    """Products that are rounded to bf16 would sometimes fall on another level."""
    quantizer = FiniteScalarQuantizer(32, RELEASED, torch.bfloat16)
    quantizer.project_in.weight.copy_(0.2 * randn(6, 32))
    quantizer.project_in.bias.copy_(0.2 * randn(6, seed=3))
    x, project = randn(3000, 32, seed=2).bfloat16(), quantizer.project_in
    values, ids = quantizer(x)
    assert values.dtype == torch.bfloat16
    assert ids.tolist() == closed_form(x.float() @ project.weight.float().T + project.bias.float(), RELEASED)
    assert ids.tolist() != closed_form(project(x), RELEASED)


@torch.no_grad()
def test_what_the_codec_refuses(models: Models) -> None:
    _, ours = models
    with pytest.raises(ValueError, match=r"AudioTokenizer: latents are \(5, 8\), wanted \[B, N, 8\]"):
        ours.tokenizer(randn(5, ACOUSTIC))
    with pytest.raises(ValueError, match=r"give 3 frames of silence"):
        ours.tokenizer(randn(1, 7, ACOUSTIC), randn(1, 2, ACOUSTIC))
    with pytest.raises(ValueError, match=r"AudioDetokenizer: values are \(1, 2, 5\), wanted \[B, G, (64|32)\]"):
        ours.detokenizer(randn(1, 2, 5))
    for wrong in (-1, 64000):
        with pytest.raises(ValueError, match=r"FiniteScalarQuantizer: ids from .* wanted 0 to 63999"):
            ours.hints(torch.tensor([[0, wrong]]))
