"""Decoding with layers that own a bias: no tape is made of what has no compiled twin, and the tokens stay the same."""

import pytest
import torch
from torch import Tensor, nn

from longburn import Attention, AttnWindow, CacheManager, GenerationConfig, SamplerConfig, generate
from longburn.bias.alibi import Alibi
from longburn.bias.curves import DistanceCurves
from longburn.bias.forget import ForgetBias
from longburn.bias.policy import BiasPolicy
from longburn.bias.relative import RelativeBias
from longburn.generation.graph import DecodeStep
from longburn.generation.model import check_tokens, last_of_rows
from longburn.kernels import native
from longburn.kernels.linear import linear

M, HEADS, V = 32, 2, 41
POLICIES = {
    "alibi": lambda: Alibi(HEADS),
    "forget": lambda: ForgetBias(M, HEADS),
    "relative": lambda: RelativeBias(M, HEADS),
    "curves": lambda: DistanceCurves(M, HEADS, curves=2, distances=8),
}


class Biased(nn.Module):
    """Two layers, of which the first sees a window and the other everything."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(V, M)
        policies: list[BiasPolicy] = [POLICIES[name](), POLICIES[name]()]
        windows = (AttnWindow(7, sink_tokens=2), AttnWindow())
        self.layers = nn.ModuleList(
            Attention(M, HEADS, window=w, sinks=True, bias=b) for w, b in zip(windows, policies, strict=True)
        )
        self.head = nn.Linear(M, V)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.4)

    @property
    def vocab_size(self) -> int:
        return V

    def init_cache(self, batch: int, *, max_length: int | None = None) -> CacheManager:
        return CacheManager.for_layers(list(self.layers), batch, max_length=max_length)

    @torch.no_grad()
    def forward_logits(
        self, tokens: Tensor, cache: CacheManager, *, all_positions: bool = False, commit: bool = True
    ) -> Tensor:
        check_tokens(tokens, V)
        step = cache.positions(tokens)
        x = self.embed(tokens.clamp(min=0))
        for layer, kept in zip(self.layers, cache, strict=True):
            x = layer(x, step, cache=kept, residual=x)
        if commit:
            cache.advance(step)
        return linear(x if all_positions else last_of_rows(x, step), self.head.weight, self.head.bias)


@pytest.mark.parametrize("name", POLICIES)
def test_a_recorded_step_gives_the_same_or_steps_aside(name: str) -> None:
    model = Biased(name)
    ours, theirs = model.init_cache(1), model.init_cache(1)
    step = DecodeStep(model, ours)
    prompt = torch.randint(0, V, (1, 9), generator=torch.Generator().manual_seed(1))
    model.forward_logits(prompt, ours), model.forward_logits(prompt, theirs)
    for token in torch.randint(0, V, (80, 1, 1), generator=torch.Generator().manual_seed(2)):
        assert torch.equal(step(token), model.forward_logits(token, theirs))
    assert ours.position == theirs.position == 89
    if name == "alibi" and native.unavailable() is None:
        assert step.tape is not None, step.why_not
    else:
        assert step.tape is None
        assert "no compiled twin" in (step.why_not or "")


@pytest.mark.parametrize("name", POLICIES)
def test_generated_tokens_are_those_of_the_full_forward(name: str) -> None:
    model = Biased(name)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7]]
    chosen: dict[int, list[int]] = {0: [], 1: []}
    for chunk in (512, 3):
        made: dict[int, list[int]] = {0: [], 1: []}
        config = GenerationConfig(max_new_tokens=40, chunk_size=chunk)
        for event in generate(model, prompts, config=config, sampler=SamplerConfig(temperature=0.0)):
            made[event.row].append(event.token)
        assert chunk == 512 or made == chosen
        chosen = made
    for row, prompt in enumerate(prompts):
        for n in (0, 1, 17, 39):
            logits = model.forward_logits(torch.tensor([prompt + chosen[row][:n]]), model.init_cache(1))
            assert int(logits.argmax()) == chosen[row][n]
