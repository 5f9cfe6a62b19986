"""A sampling loop over recorded passes is the loop over the passes themselves, bit for bit."""

import pytest
import torch
from torch import Tensor

from longburn.models.ace_step.v15 import AceStep15Config, AceStepDiT
from longburn.models.ace_step.v15.sampling import Base, Cover, Turbo, sample
from longburn.models.ace_step.v15.small import CONFIG
from longburn.models.ace_step.v15.tasks import DiTVelocity, Passes, context_latents, recorded_passes

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def dit() -> AceStepDiT:
    torch.manual_seed(0)
    config = AceStep15Config.from_config(CONFIG)
    with torch.device("cuda"), torch.no_grad():
        dit = AceStepDiT(config, dtype=torch.bfloat16).eval()
        for parameter in dit.parameters():
            parameter.normal_(1 if parameter.dim() == 1 else 0, 0.2)
    return dit


def randn(dit: AceStepDiT, frames: int, seed: int, rows: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, frames, dit.config.audio_acoustic_hidden_dim, generator=g).cuda()


def run(dit: AceStepDiT, frames: int, tokens: int, seed: int, settings: Turbo | Base, passes: Passes | None) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, tokens, dit.config.encoder_hidden_size, generator=g).cuda().bfloat16()
    led, plain = (context_latents(randn(dit, frames, seed + i).bfloat16()) for i in (0, 1))
    null = hidden[:1, :1] * 0.5 if isinstance(settings, Base) else None
    one, other = (
        DiTVelocity(dit, context, told[None], null=null, passes=passes)
        for context, told in ((led, hidden[0]), (plain, hidden[1]))
    )
    return sample(one, randn(dit, frames, seed + 2), settings, cover=Cover(0.5, other))


@torch.no_grad()
def test_recorded_passes_change_no_bit(dit: AceStepDiT) -> None:
    """Two velocities take turns on one graph; other frames, other conditions and guidance have their own."""
    passes = recorded_passes(dit)
    for frames, tokens, seed, settings in (
        (275, 40, 0, Turbo()),
        (275, 40, 10, Turbo()),
        (301, 40, 20, Turbo()),
        (275, 33, 30, Base(steps=6)),
        (275, 40, 40, Turbo()),
    ):
        wanted = run(dit, frames, tokens, seed, settings, None)
        assert torch.equal(run(dit, frames, tokens, seed, settings, passes), wanted)
    assert passes.why_not is None
    assert passes.captures >= 4
