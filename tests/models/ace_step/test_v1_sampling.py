"""The runs of ACE-Step v1: golden numbers, known flows, the released pipeline written out, and weakened guidance."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longburn.diffusion import SamplingCancelledError, StepInterval
from longburn.models.ace_step.v1 import AceStepV1, AceStepV1Config, LyricEncoderConfig, official_rules
from longburn.models.ace_step.v1.conditioning import velocities
from longburn.models.ace_step.v1.editing import audio_to_audio, extend, mixed_noise, repaint
from longburn.models.ace_step.v1.sampling import LONGEST, Sampling, Velocities, frames_of, text_to_music
from longburn.weights import TensorInfo, load_checkpoint, save_checkpoint

GOLDEN = load_file(Path(__file__).parents[2] / "data" / "ace_step" / "schedulers_guidance.safetensors")
UNGUIDED = StepInterval(scale=1.0)
C, H, FRAMES = 3, 4, 17

Curve = Callable[[Tensor, float], Tensor]


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latents(seed: int, frames: int = FRAMES) -> Tensor:
    return drawn(2, C, H, frames, seed=seed)


def curved(seed: int) -> Curve:
    mix = drawn(H, H, seed=seed) / 2
    return lambda x, t: torch.tanh(torch.einsum("ij,bcjf->bcif", mix, x)) + math.cos(2 * t + seed) * x


BRANCHES = Velocities(curved(1), curved(2), curved(3))

SETTINGS = [
    Sampling(12),
    Sampling(13, guidance="cfg", interval=StepInterval(0.8, 4.0, decay=1.0, lowest=2.0)),
    Sampling(12, guidance="zero_star", interval=StepInterval(1.0, 3.0), omega=0.0),
    Sampling(9, method="heun", guidance="cfg", interval=StepInterval(0.5, 3.0, decay=0.5)),
    Sampling(10, method="pingpong", guidance="apg", interval=StepInterval(0.6, 5.0)),
    Sampling(11, text_scale=5.0, lyric_scale=3.0, shift=1.5),
    Sampling(chosen=(2, 5, 9, 16, 20), interval=StepInterval(0.5, 4.0)),
]


# --- golden numbers and known flows


@pytest.mark.parametrize(("shift", "omega", "steps"), [(1, 0, 9), (3, 10, 12)])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_golden_runs(method: Any, shift: int, omega: int, steps: int) -> None:
    def fixed(seed: int, *shape: int) -> Tensor:
        return torch.from_numpy(np.random.RandomState(seed).standard_normal(size=shape).astype(np.float32))

    mix = fixed(1, 16, 16) / 4
    seen = Velocities(lambda x, t: torch.tanh(torch.einsum("ij,bcjf->bcif", mix, x)) + 0.5 * x * t)
    settings = Sampling(steps, method=method, shift=shift, omega=omega, interval=UNGUIDED)
    got = text_to_music(seen, fixed(2, 2, 8, 16, 20), settings)
    wanted = GOLDEN[f"{method}.shift{shift}.omega{omega}.steps{steps}.final"]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_a_straight_flow_ends_at_the_data(settings: Sampling) -> None:
    """Omega stretches steps of a batch around its mean, so the flow is exact where it is off."""
    x0, noise = latents(2), latents(1)
    settings = copy.copy(settings)
    object.__setattr__(settings, "omega", 0.0)
    zeroed = settings.guidance == "zero_star"

    def to_x0(x: Tensor, t: float) -> Tensor:
        return (x - x0) / t

    got = text_to_music(Velocities(to_x0, to_x0, to_x0), noise, settings)
    torch.testing.assert_close(got, x0, atol=1e-9 if not zeroed else 1e-7, rtol=0)


# --- the released pipeline, written out


def levels_of(steps: int, shift: float, top: float = 1.0, chosen: tuple[int, ...] = ()) -> list[float]:
    def bent(s: Any) -> Any:
        return shift * s / (1 + (shift - 1) * s)

    found = bent(np.linspace(bent(top), bent(0.001), max(chosen, default=steps)))
    found = bent(np.array([found[i - 1] for i in chosen])) if chosen else found
    return [*found.tolist(), 0.0]


class Guided:
    def __init__(self, s: Sampling, total: int) -> None:
        self.s, self.average = s, 0.0
        width = s.interval.width
        self.start, self.end = int(total * ((1 - width) / 2)), int(total * (width / 2 + 0.5))

    def __call__(self, x: Tensor, t: float, i: int) -> Tensor:
        s, cond = self.s, BRANCHES.cond(x, t)
        if not self.start <= i < self.end:
            return cond
        g = s.interval.scale
        if s.interval.decay:
            g -= (g - s.interval.lowest) * (i - self.start) / (self.end - self.start - 1 or 1) * s.interval.decay
        null = BRANCHES.uncond(x, t)
        if s.text_scale > 1 and s.lyric_scale > 1:
            text = BRANCHES.text_only(x, t)
            return null + s.text_scale * (text - null) + s.lyric_scale * (cond - text)
        if s.guidance == "cfg":
            return null + g * (cond - null)
        if s.guidance == "zero_star":
            if i <= s.zero_steps:
                return 0 * cond
            best = torch.stack([(c * n).sum() / ((n * n).sum() + 1e-8) * n for c, n in zip(cond, null, strict=True)])
            return best + g * (cond - best)
        self.average = change = cond - null - 0.75 * self.average
        change = change * torch.clamp(2.5 / change.flatten(2).norm(dim=2)[..., None, None], max=1)
        along = (change * cond).sum((2, 3), keepdim=True) / (cond * cond).sum((2, 3), keepdim=True) * cond
        return cond + (g - 1) * (change - along)


def moved(x: Tensor, dx: Tensor, omega: float) -> Tensor:
    w = 0.9 + 0.2 / (1 + math.exp(-omega / 10))
    return x + (dx - dx.mean()) * w + dx.mean()


def released(x: Tensor, s: Sampling, fresh: list[Tensor], *, levels: list[float] | None = None) -> Tensor:
    levels = levels or levels_of(s.steps, s.shift, chosen=s.chosen)
    guided, i = Guided(s, len(levels) - 1), 0
    for n, (t, after) in enumerate(pairwise(levels)):
        v = guided(x, t, i)
        i += 1
        if s.method == "pingpong":
            x = (1 - after) * (x - t * v) + (after * fresh[n] if after else 0)
        elif s.method == "heun" and after:
            ahead = moved(x, (after - t) * v, s.omega)
            x = moved(x, (after - t) * (v + guided(ahead, after, i)) / 2, s.omega)
            i += 1
        else:
            x = moved(x, (after - t) * v, s.omega)
    return x


def rerun(source: Tensor, noise: Tensor, new: list[bool], s: Sampling, r: float) -> Tensor:
    levels = levels_of(s.steps, s.shift, chosen=s.chosen)
    guided, start = Guided(s, len(levels) - 1), int(max(s.chosen, default=s.steps) * (1 - r))
    x = (1 - levels[start]) * source + levels[start] * noise
    for i in range(start, len(levels) - 1):
        x = x + (levels[i + 1] - levels[i]) * guided(x, levels[i], i)
        for frame, made in enumerate(new):
            if not made:
                x[..., frame] = (1 - levels[i + 1]) * source[..., frame] + levels[i + 1] * noise[..., frame]
    return x


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_text_to_music_is_the_released_loop(settings: Sampling) -> None:
    generator = torch.Generator().manual_seed(4)
    fresh = [torch.randn(latents(1).shape, generator=generator, dtype=torch.float64) for _ in range(20)]
    got = text_to_music(BRANCHES, latents(1), settings, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(got, released(latents(1), settings, fresh), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("settings", SETTINGS[:-1], ids=repr)
def test_audio_to_audio(settings: Sampling, strength: float) -> None:
    """Noise of the level shifted once, a schedule from the level shifted twice, steps counted anew."""
    reference, level = latents(7), 1 - strength
    once = settings.shift * level / (1 + (settings.shift - 1) * level)
    levels = levels_of(int(level * settings.steps), settings.shift, top=level)
    assert levels[0] == pytest.approx(settings.shift * once / (1 + (settings.shift - 1) * once))
    generator = torch.Generator().manual_seed(4)
    fresh = [torch.randn(reference.shape, generator=generator, dtype=torch.float64) for _ in range(20)]
    wanted = released(reference * (1 - once) + latents(1) * once, settings, fresh, levels=levels)
    got = audio_to_audio(
        BRANCHES, reference, latents(1), settings, strength=strength, generator=torch.Generator().manual_seed(4)
    )
    torch.testing.assert_close(got, wanted, atol=1e-8, rtol=1e-8)


EULER = [s for s in SETTINGS if s.method == "euler"]


@pytest.mark.parametrize("settings", EULER, ids=repr)
@pytest.mark.parametrize(("span", "variance"), [((4, 9), 0.5), ((0, 17), 1.0), ((15, 17), 0.9)])
def test_repaint(settings: Sampling, span: tuple[int, int], variance: float) -> None:
    source, noise, other = latents(5), latents(1), latents(6)
    target = noise.clone()
    angle = variance * math.pi / 2
    for frame in range(*span):
        target[..., frame] = math.cos(angle) * noise[..., frame] + math.sin(angle) * other[..., frame]
    if settings.chosen:
        variance = 0.9  # 20 * 0.1 = 2: the last steps of five
        angle = variance * math.pi / 2
        target[..., slice(*span)] = (math.cos(angle) * noise + math.sin(angle) * other)[..., slice(*span)]
    new = [span[0] <= frame < span[1] for frame in range(FRAMES)]
    wanted = rerun(source, target, new, settings, variance)
    got = repaint(BRANCHES, source, noise, other, settings, span=span, variance=variance)
    torch.testing.assert_close(got, wanted, atol=1e-8, rtol=1e-8)
    assert torch.equal(got[..., : span[0]], source[..., : span[0]])
    assert torch.equal(got[..., span[1] :], source[..., span[1] :])


@pytest.mark.parametrize(
    ("left", "right", "canvas"), [(5, 0, 50), (0, 5, 50), (5, 0, 18), (0, 5, 18), (4, 6, 27), (16, 0, 17), (0, 16, 17)]
)
def test_extend(left: int, right: int, canvas: int) -> None:
    """New frames beside as much of the recording as fits, and all of the recording where it was."""
    settings, source, noise, other = SETTINGS[0], latents(5), latents(1), latents(6)
    over = max(left + FRAMES + right - canvas, 0)
    kept = list(range(over, FRAMES)) if right else list(range(FRAMES - over))
    zeros = torch.zeros(2, C, H, FRAMES, dtype=torch.float64)
    padded = torch.cat([zeros[..., :left], source[..., kept], zeros[..., :right]], -1)
    target = torch.cat([other[..., :left], noise[..., kept], other[..., FRAMES - right :]], -1)
    new = [True] * left + [False] * len(kept) + [True] * right
    made = rerun(padded, target, new, settings, 0.7)
    cut = slice(left, left + len(kept))
    wanted = torch.cat([made[..., :left], source, made[..., made.shape[-1] - right :]], -1)
    torch.testing.assert_close(made[..., cut], source[..., kept], atol=1e-12, rtol=0)
    got = extend(BRANCHES, source, noise, other, settings, left=left, right=right, variance=0.7, canvas=canvas)
    assert got.shape == (2, C, H, left + FRAMES + right)
    torch.testing.assert_close(got, wanted, atol=1e-8, rtol=1e-8)


def test_retake_goes_from_one_noise_to_the_other() -> None:
    noise, other = latents(1), latents(2)
    assert torch.equal(mixed_noise(noise, other, 0.0), noise)
    torch.testing.assert_close(mixed_noise(noise, other, 1.0), other)
    half = mixed_noise(noise, other, 0.5)
    torch.testing.assert_close(half, (noise + other) / math.sqrt(2))


def test_heun_counts_evaluations_where_guidance_begins() -> None:
    """Of 8 steps, those from 2 to 5 are guided; of Heun's 15 evaluations, too."""
    asked: list[float] = []

    def uncond(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x

    settings = Sampling(8, method="heun")
    text_to_music(Velocities(lambda x, t: 0.1 * x, uncond), latents(1), settings)
    levels = settings.schedule()
    assert asked == [levels[1], levels[2], levels[2], levels[3]]


def test_default_numbers() -> None:
    assert (frames_of(240), LONGEST, frames_of(1)) == (2583, 2583, 10)
    settings = Sampling()
    assert (len(settings.schedule()), settings.interval.steps(60)) == (61, range(15, 45))


# --- the model, and its weakened branch


def tiny_model() -> AceStepV1:
    config = AceStepV1Config(
        in_channels=2,
        out_channels=2,
        max_height=4,
        patch_size=(4, 1),
        num_layers=4,
        inner_dim=24,
        num_attention_heads=4,
        attention_head_dim=6,
        speaker_embedding_dim=5,
        text_embedding_dim=12,
        lyric_encoder_vocab_size=30,
        lyric_hidden_size=12,
        lyric_encoder=LyricEncoderConfig(
            input_size=12, output_size=16, attention_heads=2, linear_units=24, num_blocks=3
        ),
    )
    model = AceStepV1(config, dtype=torch.float64).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        z = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(1 + 0.1 * z if "norm" in name and name.endswith("weight") else 0.4 * z)
    return model


class Weakened:
    """A checkpoint whose named projections of queries are multiplied by 0.01, as the released hooks multiply them."""

    def __init__(self, model: AceStepV1, names: tuple[str, ...], directory: Path) -> None:
        save_checkpoint(model, directory / "weights.safetensors", official_rules(model.config))
        self.state = load_file(directory / "weights.safetensors")
        for name in names:
            for part in ("weight", "bias"):
                self.state[f"{name}.{part}"] = 0.01 * self.state[f"{name}.{part}"]
        self.tensors = {name: TensorInfo(tuple(x.shape), x.dtype) for name, x in self.state.items()}

    def read(self, name: str) -> Tensor:
        return self.state[name]


def weakened(model: AceStepV1, names: tuple[str, ...], directory: Path) -> AceStepV1:
    other = AceStepV1(model.config, dtype=torch.float64).eval().requires_grad_(False)
    load_checkpoint(other, Weakened(model, names, directory), official_rules(model.config))
    return other


@pytest.mark.parametrize("lyric_layers", [(1, 2), None])
def test_weakened_branches_are_those_of_weakened_weights(lyric_layers: tuple[int, ...] | None, tmp_path: Path) -> None:
    model = tiny_model()
    text, weak_text, ids = drawn(2, 5, 12), drawn(2, 5, 12, seed=2), torch.arange(14).view(2, 7) % 11 + 1
    speaker, x = drawn(2, 5, seed=3), drawn(2, 2, 4, 13, seed=4)
    text_mask, lyric_mask = torch.arange(5) < torch.tensor([[5], [3]]), torch.arange(7) < torch.tensor([[4], [7]])
    masks = {"text_mask": text_mask, "lyric_mask": lyric_mask}
    made = velocities(
        model,
        text,
        ids,
        weak_text=weak_text,
        speaker=speaker,
        **masks,
        weak_lyric_layers=lyric_layers,
        weak_blocks=(1, 3),
        text_only=True,
    )
    named = tuple(f"lyric_encoder.encoders.{n}.self_attn.linear_q" for n in lyric_layers or ())
    blocks = tuple(f"transformer_blocks.{n}.{part}.to_q" for n in (1, 3) for part in ("attn", "cross_attn"))
    lyrics, both = weakened(model, named, tmp_path), weakened(model, named + blocks, tmp_path)
    ids_of_others = ids if lyric_layers else 0 * ids
    negative = weak_text if lyric_layers else 0 * text
    for got, peer, condition in (
        (made.cond, model, model.conditions(text, ids, speaker=speaker, **masks)),
        (made.uncond, both, both.conditions(negative, ids_of_others, **masks)),
        (made.text_only, lyrics, lyrics.conditions(text, ids_of_others, **masks)),
    ):
        torch.testing.assert_close(got(x, 0.6), peer.forward(x, 0.6, condition), atol=1e-10, rtol=1e-10)


def test_a_run_of_the_model_with_everything_on() -> None:
    model = tiny_model()
    seen = velocities(
        model, drawn(2, 5, 12), torch.arange(14).view(2, 7), weak_lyric_layers=(1,), weak_blocks=(2,), text_only=True
    )
    settings = Sampling(6, text_scale=3.0, lyric_scale=2.0)
    got = text_to_music(seen, drawn(2, 2, 4, 13), settings)
    assert got.shape == (2, 2, 4, 13)
    assert got.isfinite().all()


# --- what a caller sees


def test_progress_and_cancelling() -> None:
    told: list[tuple[int, int]] = []
    one = Velocities(lambda x, t: x)
    text_to_music(one, latents(1), Sampling(4, method="heun", interval=UNGUIDED), on_step=lambda *n: told.append(n))
    assert told == [(i + 1, 7) for i in range(7)]
    told.clear()
    repaint(
        one,
        latents(1),
        latents(2),
        latents(3),
        Sampling(8, interval=UNGUIDED),
        span=(2, 3),
        on_step=lambda *n: told.append(n),
    )
    assert told == [(i + 1, 4) for i in range(4)]
    answers = iter([False, True])
    with pytest.raises(SamplingCancelledError, match="after 1 of 4 steps"):
        text_to_music(one, latents(1), Sampling(4, interval=UNGUIDED), cancelled=answers.__next__)


def test_rows_of_a_run_keep_the_type_of_the_noise() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        noise = latents(1).to(dtype)
        some = Velocities(lambda x, t: (0.1 * x).bfloat16(), lambda x, t: (0.2 * x).bfloat16())
        for settings in SETTINGS[:5]:
            assert text_to_music(some, noise, settings).dtype == dtype


S = Sampling(8, interval=UNGUIDED)
ONE = Velocities(curved(1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Sampling(0), "steps must be at least 1"),
        (lambda: Sampling(method="ddim"), "method is 'ddim', wanted one of euler, heun, pingpong"),
        (lambda: Sampling(guidance="adg"), "guidance is 'adg'"),
        (lambda: Sampling(omega=math.inf), "omega is inf"),
        (lambda: Sampling(chosen=(3, 2)), "must ascend"),
        (lambda: Sampling(method="heun", chosen=(2, 3)), "not for heun"),
        (lambda: text_to_music(ONE, latents(1), Sampling(8)), r"steps 2 to 5 of 8 are guided, but velocities.uncond"),
        (lambda: text_to_music(Velocities(*BRANCHES[:2]), latents(1), SETTINGS[5]), "text_only is missing"),
        (lambda: mixed_noise(latents(1), latents(2), 1.2), "variance 1.2"),
        (lambda: mixed_noise(latents(1), latents(2, 4), 0.2), "equal shapes"),
        (lambda: audio_to_audio(ONE, latents(2), latents(1), S, strength=0.95), "leaves 0 of 8 steps"),
        (lambda: audio_to_audio(ONE, latents(2), latents(1), S, strength=-0.1), "strength -0.1"),
        (lambda: audio_to_audio(ONE, latents(2, 5), latents(1), S), "beside noise"),
        (lambda: audio_to_audio(ONE, latents(2), latents(1), SETTINGS[-1]), "none chosen"),
        (lambda: repaint(ONE, latents(2), latents(1), latents(3), S, span=(5, 18)), "span is"),
        (
            lambda: repaint(ONE, latents(2), latents(1), latents(3), S, span=(5, 7), variance=0.0),
            "enters at step 8 of 8",
        ),
        (
            lambda: repaint(ONE, latents(2), latents(1), latents(3), SETTINGS[4], span=(5, 7)),
            "but the method is 'pingpong'",
        ),
        (lambda: extend(ONE, latents(2), latents(1), latents(3), S), "at least one new frame"),
        (lambda: extend(ONE, latents(2), latents(1), latents(3, 2), S, left=3), "with 2 frames of other noise"),
        (lambda: extend(ONE, latents(2), latents(1), latents(3), S, left=3, canvas=3), "on a canvas of 3"),
        (lambda: extend(ONE, latents(2), latents(1), latents(3), S, left=3, right=3, canvas=20), "one side after"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
