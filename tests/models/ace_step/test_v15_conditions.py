"""Conditions against diffusers' own encoder."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from v15_peers import ACOUSTIC, WORDS, assert_parity, diffusers_parts, ours_of, randn

from longburn.models.ace_step.v15 import AceStep15, ConditionEncoder
from longburn.models.ace_step.v15.conditions import pack


class Models(NamedTuple):
    peer: nn.Module
    peer_dit: nn.Module
    ours: AceStep15

    @property
    def encoder(self) -> ConditionEncoder:
        return self.ours.encoder


@pytest.fixture(scope="module", params=["2b", "xl"])
def models(request: pytest.FixtureRequest) -> Models:
    parts = diffusers_parts(request.param)
    return Models(parts["condition_encoder"], parts["transformer"], ours_of(parts, request.param))


def mask_of(lengths: list[int], size: int) -> Tensor:
    return torch.arange(size)[None] < torch.tensor(lengths)[:, None]


def theirs_of(
    peer: nn.Module, text: Tensor, text_mask: Tensor, lyrics: Tensor, lyric_mask: Tensor, timbre: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    return peer(text, text_mask.long(), lyrics, lyric_mask.long(), timbre, rows)


@pytest.mark.parametrize(("T", "N"), [(1, 1), (7, 20), (30, 33)])
@torch.no_grad()
def test_one_piece(models: Models, T: int, N: int) -> None:
    """Lyrics and references shorter and longer than the windows of 8."""
    text, lyrics, timbre = randn(1, 5, WORDS), randn(1, T, WORDS, seed=2), randn(1, 1, N, ACOUSTIC, seed=3)
    got = models.encoder(text, lyrics, timbre)
    ones = torch.ones(1, T, dtype=torch.bool)
    wanted, _ = theirs_of(models.peer, text, ones[:, :1].expand(1, 5), lyrics, ones, timbre[0], torch.tensor([0]))
    assert got.mask is None
    assert_parity(got.hidden, wanted)


@torch.no_grad()
def test_a_batch_of_different_lengths(models: Models) -> None:
    """Tokens come first, as diffusers has them; padding may be anything and leaves zeros."""
    text_mask, lyric_mask = mask_of([9, 4, 1], 9), mask_of([13, 30, 2], 30)
    text, lyrics = randn(3, 9, WORDS), randn(3, 30, WORDS, seed=2)
    # The second row has two references, told to diffusers in any order.
    references, rows = randn(4, 20, ACOUSTIC, seed=3), torch.tensor([1, 0, 1, 2])
    wanted, wanted_mask = theirs_of(models.peer, text, text_mask, lyrics, lyric_mask, references, rows)
    timbre = torch.stack([references[[1, 1]], references[[0, 2]], references[[3, 3]]])
    timbre_mask = mask_of([1, 2, 1], 2)
    got = models.encoder(
        text.masked_fill(~text_mask[..., None], float("nan")),
        lyrics.masked_fill(~lyric_mask[..., None], float("nan")),
        timbre,
        text_mask=text_mask,
        lyric_mask=lyric_mask,
        timbre_mask=timbre_mask,
    )
    assert got.mask is not None
    assert got.mask.tolist() == wanted_mask.tolist()
    assert got.mask.sum(1).tolist() == [13 + 1 + 9, 30 + 2 + 4, 2 + 1 + 1]
    assert_parity(got.hidden[got.mask], wanted[got.mask])
    assert not got.hidden[~got.mask].any()


@torch.no_grad()
def test_a_row_of_a_batch_is_what_it_is_alone(models: Models) -> None:
    """Through encoder and transformer, against diffusers on each row without padding."""
    lengths = [(5, 17), (9, 3)]
    text, lyrics, timbre = randn(2, 9, WORDS), randn(2, 17, WORDS, seed=2), randn(2, 1, 20, ACOUSTIC, seed=3)
    x, context = randn(2, 25, ACOUSTIC, seed=4), randn(2, 25, 2 * ACOUSTIC, seed=5)
    text_mask, lyric_mask = (
        mask_of(list(column), n) for column, n in zip(zip(*lengths, strict=True), (9, 17), strict=True)
    )
    held = models.encoder(text, lyrics, timbre, text_mask=text_mask, lyric_mask=lyric_mask)
    got = models.ours.dit(x, 0.8, context, models.ours.dit.conditions(held.hidden, held.mask))
    t = torch.tensor([0.8])
    for b, (words, sung) in enumerate(lengths):
        row = slice(b, b + 1)
        hidden, _ = theirs_of(
            models.peer,
            text[row, :words],
            text_mask[row, :words],
            lyrics[row, :sung],
            lyric_mask[row, :sung],
            timbre[b],
            torch.tensor([0]),
        )
        wanted = models.peer_dit(x[row], t, t, hidden, context[row], return_dict=False)[0]
        assert_parity(got[row], wanted)


@torch.no_grad()
def test_the_null_condition_is_one_token(models: Models) -> None:
    """Diffusers repeats it over the whole sequence, which attention cannot tell from one."""
    x, context, t = randn(2, 21, ACOUSTIC), randn(2, 21, 2 * ACOUSTIC, seed=2), torch.tensor([0.6, 0.6])
    repeated = models.peer.null_condition_emb.expand(2, 13, -1)
    wanted = models.peer_dit(x, t, t, repeated, context, return_dict=False)[0]
    held = models.ours.dit.conditions(models.encoder.null.expand(2, -1, -1))
    assert_parity(models.ours.dit(x, 0.6, context, held), wanted)


def test_packing_keeps_the_order() -> None:
    hidden = torch.arange(2 * 6, dtype=torch.float32).view(2, 6, 1) + 1
    mask = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    packed = pack(hidden, mask)
    assert packed.hidden[..., 0].tolist() == [[2, 3, 6, 0, 0, 0], [7, 0, 0, 0, 0, 0]]
    assert packed.mask is not None
    assert packed.mask.sum(1).tolist() == [3, 1]


@torch.no_grad()
def test_what_encoders_refuse(models: Models) -> None:
    text, lyrics, timbre = randn(2, 3, WORDS), randn(2, 4, WORDS), randn(2, 1, 5, ACOUSTIC)
    encoder = models.encoder
    with pytest.raises(ValueError, match=r"timbre \(2, 5, 8\): wanted \[B, T, 24\], \[B, T', 24\] and \[B, R, N, 8\]"):
        encoder(text, lyrics, timbre[:, 0])
    with pytest.raises(ValueError, match=r"text \(1, 3, 24\), lyrics \(2, 4, 24\)"):
        encoder(text[:1], lyrics, timbre)
    with pytest.raises(ValueError, match=r"lyrics \(2, 4, 23\)"):
        encoder(text, lyrics[..., 1:], timbre)
    with pytest.raises(ValueError, match=r"timbre \(2, 1, 0, 8\)"):
        encoder(text, lyrics, timbre[:, :, :0])
    with pytest.raises(ValueError, match=r"lyric_mask is torch.bool \(2, 3\), wanted bool \(2, 4\)"):
        encoder(text, lyrics, timbre, lyric_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"text_mask is torch.int64 \(2, 3\), wanted bool"):
        encoder(text, lyrics, timbre, text_mask=torch.ones(2, 3, dtype=torch.int64))
