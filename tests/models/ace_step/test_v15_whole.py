"""All parts of ACE-Step 1.5 together: nothing waits for the device, and half precision is close."""

import torch
from torch import Tensor
from v15_peers import ACOUSTIC, WORDS, diffusers_parts, ours_of, randn, tiny_config

from longburn.models.ace_step.v15 import AceStep15


def through(model: AceStep15, like: Tensor) -> dict[str, Tensor]:
    """What every part makes of a ragged batch, in the type and on the device of `like`."""
    B, N = 2, 61
    text, lyrics, timbre, x, context = (
        randn(*shape, seed=seed).to(like)
        for seed, shape in enumerate(
            [(B, 9, WORDS), (B, 30, WORDS), (B, 2, 20, ACOUSTIC), (B, N, ACOUSTIC), (B, N, 2 * ACOUSTIC)]
        )
    )
    text_mask = (torch.arange(9) < torch.tensor([[9], [4]])).to(like.device)
    lyric_mask = (torch.arange(30) < torch.tensor([[17], [30]])).to(like.device)
    held = model.encoder(text, lyrics, timbre, text_mask=text_mask, lyric_mask=lyric_mask)
    conditions = model.dit.conditions(held.hidden, held.mask)
    _, ids = model.tokenizer(x, model.silence)
    hints = model.hints(torch.arange(26).view(2, 13).to(like.device))
    modulation = model.dit.modulation(torch.tensor([0.3, 0.8]).to(like.device))
    return {
        "conditions": held.hidden,
        "one timestep": model.dit(x, 0.3, context, conditions),
        "tabulated": model.dit(x, modulation, context, conditions),
        "ids": ids,
        "hints": hints,
    }


@torch.no_grad()
def test_nothing_reads_the_device() -> None:
    """On a device that has no values, whoever asks for one raises an error."""
    with torch.device("meta"):
        model = AceStep15(tiny_config("xl"))
    model.silence = model.silence.to("meta")
    shapes = {name: tuple(out.shape) for name, out in through(model, torch.empty(0, device="meta")).items()}
    assert shapes == {
        "conditions": (2, 41, 32),
        "one timestep": (2, 61, ACOUSTIC),
        "tabulated": (2, 61, ACOUSTIC),
        "ids": (2, 13),
        "hints": (2, 65, ACOUSTIC),
    }


@torch.no_grad()
def test_half_precision_is_close() -> None:
    parts = diffusers_parts("2b")
    wide, model = through(ours_of(parts), torch.empty(0)), ours_of(parts).bfloat16()
    half = through(model, torch.empty(0, dtype=torch.bfloat16))
    for name, wanted in wide.items():
        assert half[name].dtype == (torch.int64 if name == "ids" else torch.bfloat16)
        if name != "ids":
            off = (half[name].float() - wanted).norm() / wanted.norm()
            assert off < 0.05, f"{name} is off by {off:.3f}"
