"""The sampling loops of ACE-Step 1.5: known flows, the released loops written out, and diffusers' pipeline."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from v15_peers import ACOUSTIC, WORDS, diffusers_parts, ours_of, randn

from longburn.diffusion import SamplingCancelledError, angle_based, turbo_schedule
from longburn.models.ace_step.v15 import AceStep15
from longburn.models.ace_step.v15.sampling import Base, Cover, Repaint, Turbo, sample
from longburn.models.ace_step.v15.tasks import DiTVelocity, context_latents, frame_span

Settings = Turbo | Base
SETTINGS = [
    Turbo(),
    Turbo(shift=1, method="heun"),
    Turbo(levels=(1.0, 0.6, 0.3), method="sde"),
    Base(steps=7, guidance_scale=1.0),
    Base(steps=6, shift=3.0, method="heun"),
    Base(steps=6, shift=2.0, method="sde"),
    Base(steps=9, shift=2.0, guidance="adg", guidance_scale=3.0),
    Base(steps=5, method="heun", guidance="adg", guidance_scale=3.0),
    Base(steps=8, interval=(0.25, 0.6)),
    Base(steps=8, method="heun", interval=(0.25, 0.6)),
]


def noise_like(B: int = 2, N: int = 21, C: int = 4) -> Tensor:
    return randn(B, N, C).double()


def curved(seed: int) -> Callable[[Tensor, float], Tensor]:
    """A velocity that bends with x and t; of twice the rows, the second half has another one."""
    mix, other = randn(4, 4, seed=seed).double() / 2, randn(4, 4, seed=seed + 1).double() / 2

    def velocity(x: Tensor, t: float) -> Tensor:
        half = x.shape[0] // 2 if x.shape[0] == 4 else x.shape[0]
        cond = torch.tanh(x[:half] @ mix) + math.cos(2 * t) * x[:half]
        return torch.cat([cond, torch.sin(x[half:] @ other) - t * x[half:]])

    return velocity


# --- flows whose end is known


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_a_straight_flow_ends_at_the_data(settings: Settings) -> None:
    """To any velocity that points at one x0, every method is exact, guided or not: both branches agree."""
    x0, noise = randn(2, 21, 4, seed=2).double(), noise_like()
    calls: list[tuple[int, float]] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        calls.append((x.shape[0], t))
        # At t = 0, where Heun corrects the last step, the flow's own constant velocity.
        return (noise - x0).repeat(x.shape[0] // 2, 1, 1) if t == 0 else (x - x0.repeat(x.shape[0] // 2, 1, 1)) / t

    got = sample(velocity, noise, settings, generator=torch.Generator().manual_seed(3))
    steps = len(settings.schedule()) - 1
    if settings.method == "heun" and isinstance(settings, Base):
        torch.testing.assert_close(got, x0, atol=1e-4, rtol=0)  # ADG's thousandth and its float32 parts
        assert len(calls) == 2 * steps
    elif settings == Base(steps=6, shift=2.0, method="sde"):
        pass  # it lies to the model about the level
    else:
        torch.testing.assert_close(got, x0, atol=1e-4, rtol=0)
        assert len(calls) == (2 * steps - 1 if settings.method == "heun" else steps)
    guided = isinstance(settings, Base) and settings.guidance_scale > 1
    for rows, t in calls:
        inside = guided and settings.interval[0] <= t <= settings.interval[1]
        assert rows == (4 if inside else 2)


def test_heun_is_of_second_order() -> None:
    """Halving the steps of base divides the error by 4 (Euler: 2)."""
    noise = torch.ones(1, 1, 1, dtype=torch.float64)
    truth = math.exp(-math.sin(3) / 3)

    def error(method: Any, steps: int) -> float:
        got = sample(lambda x, t: math.cos(3 * t) * x, noise, Base(steps, method=method, guidance_scale=1))
        return abs(got.item() - truth)

    for method, factor in (("euler", 2), ("heun", 4)):
        assert error(method, 200) / error(method, 400) == pytest.approx(factor, rel=0.05)


# --- the released loops, written out


def apg_once(cond: Tensor, null: Tensor, scale: float, state: dict[str, Tensor]) -> Tensor:
    change = cond - null - 0.75 * state.get("average", 0 * cond)
    state["average"] = change
    change = change * torch.clamp(2.5 / change.norm(dim=1, keepdim=True), max=1)
    along = (change * cond).sum(1, keepdim=True) / (cond * cond).sum(1, keepdim=True) * cond
    return cond + (scale - 1) * (change - along)


def released(
    velocity: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    settings: Settings,
    cover: Cover | None = None,
    repaint: Repaint | None = None,
    fresh: list[Tensor] | None = None,
) -> Tensor:
    """What the released loops do, one line after the other."""
    turbo = isinstance(settings, Turbo)
    ts, x = list(settings.schedule()[:-1]), noise
    if cover and cover.noise_strength > 0:
        near = min(ts, key=lambda t: abs(t - (1 - cover.noise_strength)))
        x = near * noise + (1 - near) * cover.source
        ts = ts[ts.index(near) :]
    N, state = len(ts), {}
    scale = 1.0 if turbo else settings.guidance_scale

    def guided(v: Callable[[Tensor, float], Tensor], x: Tensor, t: float, plain: bool) -> Tensor:
        if scale <= 1:
            return v(x, t)
        cond, null = v(torch.cat([x, x]), t).chunk(2)
        if not settings.interval[0] <= t <= settings.interval[1]:
            return cond
        if settings.guidance == "adg" and t > 0:
            return angle_based(x, cond, null, t, scale)  # itself held to its formula in tests/diffusion
        return null + scale * (cond - null) if plain or t == 0 else apg_once(cond, null, scale, state)

    for i, t in enumerate(ts):
        if cover and i >= int(N * cover.strength):
            velocity = cover.otherwise
        after = ts[i + 1] if i + 1 < N else 0.0
        v = guided(velocity, x, t, False)
        if turbo and i == N - 1:
            x = x - t * v
            break
        if settings.method == "sde":
            if not turbo:
                after = 1 - (i + 1) / N
            x = (1 - after) * (x - t * v) + (after * fresh[i] if after > 0 else 0)
        elif settings.method == "heun":
            v = (v + guided(velocity, x - (t - after) * v, after, True)) / 2
            x = x - (t - after) * v
        else:
            x = x - (t - after) * v
        if repaint and i < round(repaint.held * N):
            kept = after * noise + (1 - after) * repaint.source
            x[:, : repaint.span[0]], x[:, repaint.span[1] :] = kept[:, : repaint.span[0]], kept[:, repaint.span[1] :]
    if repaint and repaint.blend:
        start, end = repaint.span
        for frame in range(x.shape[1]):
            left, right = min(repaint.blend, start), min(repaint.blend, x.shape[1] - end)
            if frame < start:
                share = max((frame - (start - left) + 1) / (left + 1), 0)
            else:
                share = 1.0 if frame < end else max((end + right - frame) / (right + 1), 0)
            x[:, frame] = share * x[:, frame] + (1 - share) * repaint.source[:, frame]
    return x


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize("task", ["plain", "cover", "repaint", "noisy", "held"])
def test_released_loops(settings: Settings, task: str) -> None:
    noise, source = noise_like(), randn(2, 21, 4, seed=9).double()
    cover = {
        "cover": Cover(0.6, curved(30)),
        "noisy": Cover(0.7, curved(30), noise_strength=0.45, source=source),
    }.get(task)
    repaint = {"repaint": Repaint(source, (5, 11), blend=7), "held": Repaint(source, (0, 11), held=1.0)}.get(task)
    steps = len(settings.schedule()) - 1
    generator = torch.Generator().manual_seed(3)
    fresh = [torch.randn(noise.shape, generator=generator, dtype=noise.dtype) for _ in range(steps)]
    wanted = released(curved(20), noise.clone(), settings, cover, repaint, fresh)
    got = sample(curved(20), noise, settings, cover=cover, repaint=repaint, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)  # the ramp is of float32


def test_what_repaint_keeps() -> None:
    """Away from the span the source comes back exactly; within it, nothing of it does; between, the ramp of 3."""
    source = torch.full((1, 20, 1), 100.0)
    repaint = Repaint(source, (8, 12), blend=3)
    got = sample(lambda x, t: x / t, randn(1, 20, 1), Turbo(), repaint=repaint)  # flows to 0
    torch.testing.assert_close(
        got[0, :, 0] / 100,
        torch.tensor([1.0] * 5 + [0.75, 0.5, 0.25] + [0.0] * 4 + [0.25, 0.5, 0.75] + [1.0] * 5),
        atol=1e-5,
        rtol=0,
    )


# --- the tiny model against diffusers' pipeline


class Tape(nn.Module):
    """Stands where the pipeline has its VAE: "encodes" any sound to given latents."""

    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(sampling_rate=48000, downsampling_ratios=(1920,))

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents

    def encode(self, audio: Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: self.latents.mT))


class Peer:
    def __init__(self) -> None:
        self.parts = diffusers_parts()
        self.ours: AceStep15 = ours_of(self.parts)
        self.ours.silence = self.parts["condition_encoder"].silence_latent.clone()
        self.text, self.lyrics = randn(2, 6, WORDS, seed=4), randn(2, 9, WORDS, seed=5)
        self.plain_text = randn(2, 6, WORDS, seed=14)

    def theirs(self, turbo: bool, source: Tensor | None, **arguments: Any) -> Tensor:
        from diffusers import AceStepPipeline, FlowMatchEulerDiscreteScheduler

        def encode_prompt(instruction: str, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            text = self.plain_text if instruction.startswith("Fill") and source is not None else self.text
            return text, torch.ones(2, 6), self.lyrics, torch.ones(2, 9)

        pipe = AceStepPipeline(
            vae=None if source is None else Tape(source),
            text_encoder=None,
            tokenizer=None,
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
            **self.parts,
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.is_turbo, pipe.encode_prompt = turbo, encode_prompt
        audio = None if source is None else torch.zeros(2, 1920 * source.shape[1])
        out = pipe(prompt=["", ""], lyrics="", src_audio=audio, output_type="latent", return_dict=False, **arguments)
        return out[0]

    def velocity(self, context: Tensor, *, plain: bool = False) -> DiTVelocity:
        ours = self.ours
        timbre = ours.silent(750)[None].expand(2, -1, -1, -1)
        hidden = ours.encoder(self.plain_text if plain else self.text, self.lyrics, timbre).hidden
        return DiTVelocity(ours.dit, context, hidden, null=ours.encoder.null)


@pytest.fixture(scope="module")
def peer() -> Peer:
    return Peer()


FRAMES = 30


@pytest.mark.parametrize("shift", [1.0, 3.0])
@torch.no_grad()
def test_text_to_music_of_turbo_is_diffusers(peer: Peer, shift: float) -> None:
    noise = randn(2, FRAMES, ACOUSTIC, seed=6)
    wanted = peer.theirs(True, None, latents=noise, audio_duration=FRAMES / 25, shift=shift)
    velocity = peer.velocity(context_latents(peer.ours.silent(FRAMES).expand(2, -1, -1)))
    torch.testing.assert_close(sample(velocity, noise, Turbo(shift=shift)), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("shift", "interval"), [(1.0, (0.0, 1.0)), (2.5, (0.3, 0.77))])
@torch.no_grad()
def test_text_to_music_of_base_is_diffusers(peer: Peer, shift: float, interval: tuple[float, float]) -> None:
    """Guidance with momentum over 10 steps. diffusers counts its interval from noise."""
    noise = randn(2, FRAMES, ACOUSTIC, seed=6)
    wanted = peer.theirs(
        False,
        None,
        latents=noise,
        audio_duration=FRAMES / 25,
        shift=shift,
        num_inference_steps=10,
        guidance_scale=4.0,
        cfg_interval_start=1 - interval[1],
        cfg_interval_end=1 - interval[0],
    )
    velocity = peer.velocity(context_latents(peer.ours.silent(FRAMES).expand(2, -1, -1)))
    settings = Base(10, shift, guidance_scale=4.0, interval=interval)
    torch.testing.assert_close(sample(velocity, noise, settings), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", ["repaint", "lego", "extract", "cover"])
@torch.no_grad()
def test_tasks_with_a_source_are_diffusers(peer: Peer, task: str) -> None:
    """Without what diffusers leaves out: holding the source and blending into it."""
    frames, ours = 63, peer.ours
    source, noise = randn(2, frames, ACOUSTIC, seed=7), randn(2, frames, ACOUSTIC, seed=8)
    span = frame_span(0.5, 1.3, frames) if task in ("repaint", "lego") else None
    wanted = peer.theirs(True, source, latents=noise, task_type=task, repainting_start=0.5, repainting_end=1.3)
    given = source
    if task == "cover":
        quantized, _ = peer.parts["audio_tokenizer"].tokenize(source, ours.silence)
        given = peer.parts["audio_token_detokenizer"](quantized)[:, :frames]
    context = context_latents(given, span=span, silence=ours.silent(frames) if task == "repaint" else None)
    torch.testing.assert_close(sample(peer.velocity(context), noise, Turbo()), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_one_batch_of_both_conditions_is_two_calls(peer: Peer) -> None:
    x, context = randn(2, 7, ACOUSTIC), randn(2, 7, 2 * ACOUSTIC, seed=2)
    velocity = peer.velocity(context)
    both = velocity(torch.cat([x, x]), 0.7)
    torch.testing.assert_close(both[:2], velocity(x, 0.7), atol=1e-6, rtol=1e-6)
    null = peer.ours.dit.conditions(peer.ours.encoder.null.expand(2, 1, -1))
    torch.testing.assert_close(both[2:], peer.ours.dit(x, 0.7, context, null), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="x has 3 rows, wanted 2 or 4"):
        velocity(randn(3, 7, ACOUSTIC), 0.7)


# --- what a caller sees


def test_progress_and_cancelling() -> None:
    told: list[tuple[int, int]] = []
    sample(lambda x, t: x, noise_like(), Turbo(), on_step=lambda *step: told.append(step))
    assert told == [(i + 1, 8) for i in range(8)]
    answers = iter([False] * 3 + [True])
    with pytest.raises(SamplingCancelledError, match="after 3 of 5 steps"):
        sample(lambda x, t: x, noise_like(), Base(5, guidance_scale=1.0), cancelled=answers.__next__)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_run_keeps_the_type_of_the_noise(dtype: torch.dtype) -> None:
    noise = noise_like().to(dtype)
    for settings in SETTINGS:
        assert sample(lambda x, t: (x * 0.1).bfloat16(), noise, settings).dtype == dtype
    repaint = Repaint(noise.float(), (3, 5))
    assert sample(lambda x, t: x.bfloat16(), noise, Turbo(), repaint=repaint).dtype == dtype


def test_levels_reach_the_model_as_they_are() -> None:
    seen: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        return x

    sample(velocity, noise_like(), Turbo(shift=2))
    assert seen == list(turbo_schedule(shift=2)[:-1])


@pytest.mark.parametrize(
    ("seconds", "span"), [((0.5, 1.3), (12, 32)), ((-2, 0.1), (0, 2)), ((1, 99), (25, 63)), ((0.5, 0.501), (12, 13))]
)
def test_seconds_to_frames(seconds: tuple[float, float], span: tuple[int, int]) -> None:
    assert frame_span(*seconds, 63) == span


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Turbo(method="rk4"), "Turbo: method is 'rk4', wanted one of euler, heun, sde"),
        (lambda: Turbo(levels=()), "wants 1 to 20 levels"),
        (lambda: Base(0), "steps must be at least 1"),
        (lambda: Base(method="dpm"), "Base: method is 'dpm'"),
        (lambda: Base(guidance="cfg"), "wanted apg or adg"),
        (lambda: Base(guidance_scale=math.nan), "guidance_scale is nan"),
        (lambda: Base(interval=(0.8, 0.2)), "interval is"),
        (lambda: Cover(strength=0.5), "there is no `otherwise`"),
        (lambda: Cover(noise_strength=0.5), "but there is none"),
        (lambda: Cover(noise_strength=1.5), "noise_strength is 1.5"),
        (lambda: Repaint(noise_like(), (5, 5)), r"span is \(5, 5\), wanted 0 <= start < end <= 21"),
        (lambda: Repaint(noise_like(), (5, 22)), "span is"),
        (lambda: Repaint(noise_like(), (5, 9), held=2.0), "held 2.0"),
        (lambda: sample(curved(1), noise_like()[0], Turbo()), r"wanted \[B, N, C\]"),
        (
            lambda: sample(curved(1), noise_like(), Turbo(), repaint=Repaint(noise_like(N=20), (2, 3))),
            "repaint's source",
        ),
        (lambda: frame_span(3, 2, 63), "wanted start < end"),
        (lambda: frame_span(3, 4, 63), "wanted start < end within"),
        (lambda: context_latents(noise_like(), span=(3, 30)), "span is"),
        (lambda: context_latents(noise_like(), silence=noise_like(1)), "with span None"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
