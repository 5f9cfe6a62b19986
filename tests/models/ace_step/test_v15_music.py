"""The whole way from words to sound against diffusers' pipeline, with small random models and a real tokenizer."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from v15_peers import ACOUSTIC, WORDS, assert_parity, diffusers_parts, ours_of, randn

from longburn.diffusion import SamplingCancelledError, draw_noise, seeded
from longburn.models.ace_step.codecs import Oobleck
from longburn.models.ace_step.codecs.level import at_peak
from longburn.models.ace_step.codecs.tiles import Samples
from longburn.models.ace_step.planner import SongPlan, SongRequest
from longburn.models.ace_step.planner.prompts import MOST_LYRIC_TOKENS
from longburn.models.ace_step.v15 import music
from longburn.models.ace_step.v15.conditions import thirds
from longburn.models.ace_step.v15.music import Cover, Extend, MusicMaker, Repaint
from longburn.models.ace_step.v15.prompts import lyrics_text
from longburn.models.ace_step.v15.sampling import Base, Turbo
from longburn.models.ace_step.v15.tasks import frames_of
from longburn.models.ace_step.v15.texts import TextEncoder

SECONDS, FRAMES = 10.03, 251
KNOWN: dict[str, Any] = {"bpm": 97, "keyscale": "F# minor", "timesignature": "3"}
LYRICS = "[verse]\nla la, ♭ and é"


def byte_tokenizer() -> Tokenizer:
    """Bytes as tokens, and an end after every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>"])
    end = core.token_to_id("<|endoftext|>")
    core.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    return core


class Peer:
    """Diffusers' pipeline and ours over the same weights, those of text encoder and codec through files."""

    def __init__(self, directory: Path) -> None:
        from diffusers import AceStepPipeline, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
        from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

        torch.manual_seed(3)
        core = byte_tokenizer()
        settings = Qwen3Config(
            vocab_size=core.get_vocab_size(),
            hidden_size=WORDS,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        )
        text = Qwen3Model(settings).eval()
        codec = AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[2, 4, 4, 6, 10],
            channel_multiples=[1, 2, 2, 2, 2],
            decoder_channels=4,
            decoder_input_channels=ACOUSTIC,
            sampling_rate=48000,
        ).eval()
        for model, name in ((text, "text_encoder"), (codec, "vae")):
            model.save_pretrained(directory / name)
        core.save(str(directory / "text_encoder" / "tokenizer.json"))
        self.parts = diffusers_parts()
        self.pipe = AceStepPipeline(
            vae=codec,
            text_encoder=text,
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>"),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
            **self.parts,
        )
        self.pipe.set_progress_bar_config(disable=True)
        ours = ours_of(self.parts)
        ours.silence = self.parts["condition_encoder"].silence_latent.clone()
        ours.config = replace(ours.config, timbre_fix_frame=750)  # what diffusers' pipeline always takes
        texts = TextEncoder.from_checkpoint(directory / "text_encoder", dtype=torch.float32)
        self.maker = MusicMaker(ours, Oobleck.from_checkpoint(directory / "vae"), texts)

    def theirs(self, **arguments: Any) -> Tensor:
        noise = draw_noise((1, FRAMES, ACOUSTIC), seeded([7]))
        out = self.pipe(
            prompt="a slow waltz", lyrics=LYRICS, latents=noise, vocal_language="de", return_dict=False,
            **KNOWN, **arguments,
        )  # fmt: skip
        return out[0]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return Peer(tmp_path_factory.mktemp("pipeline"))


REQUEST = SongRequest("a slow waltz", LYRICS, language="de", bpm=97, keyscale="F# minor", timesignature="3")


def test_words_to_sound(peer: Peer) -> None:
    wanted = peer.theirs(audio_duration=SECONDS, output_type="latent")
    latents = peer.maker.latents(REQUEST, seconds=SECONDS, seed=7)
    assert_parity(latents, wanted, 2e-5)
    heard = torch.from_numpy(np.asarray(peer.theirs(audio_duration=SECONDS, output_type="np")))
    made = torch.cat([piece.clone() for piece in peer.maker.audio(latents)], 1)[None]
    assert made.shape == (1, 2, 1920 * FRAMES)
    assert_parity(made, heard, 1e-4)
    assert made.abs().max().item() == pytest.approx(10 ** (-1 / 20), rel=1e-5)


def test_codes_and_plan(peer: Peer) -> None:
    """Codes are what a cover is told; what the plan says fills what the request leaves open."""
    codes = torch.randint(0, 64000, (51,), generator=torch.Generator().manual_seed(1)).tolist()
    spelled = "".join(f"<|audio_code_{code}|>" for code in codes)
    noise = draw_noise((1, 255, ACOUSTIC), seeded([7]))
    out = peer.pipe(
        prompt="a slow waltz", lyrics=LYRICS, audio_codes=spelled, audio_duration=10.2, latents=noise,
        vocal_language="de", output_type="latent", return_dict=False, **KNOWN,
    )  # fmt: skip
    plan = SongPlan(bpm=97, keyscale="F# minor", timesignature="3", language="de")
    made = peer.maker.latents(SongRequest("a slow waltz", LYRICS), seconds=10.2, plan=plan, codes=codes, seed=7)
    assert_parity(made, out[0], 2e-5)


def test_silence_follows_codes_that_end_early(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[Tensor] = []

    class Seen(music.DiTVelocity):
        def __init__(self, dit: Any, context: Tensor, *rest: Any, **options: Any) -> None:
            contexts.append(context)
            super().__init__(dit, context, *rest, **options)

    monkeypatch.setattr(music, "DiTVelocity", Seen)
    codes = [*range(50)]
    peer.maker.latents(REQUEST, seconds=SECONDS, codes=codes, seed=7)
    source, mask = contexts[0].split(ACOUSTIC, 2)
    with torch.no_grad():
        assert torch.equal(source[:, :250], peer.maker.model.hints(torch.tensor([codes])))
    assert torch.equal(source[:, 250:], peer.maker.model.silence[:, 250:FRAMES])
    assert bool((mask == 1).all())


def test_repaint_and_extend(peer: Peer) -> None:
    source = randn(1, FRAMES, ACOUSTIC, seed=2)
    made = peer.maker.latents(REQUEST, task=Repaint(source, 2.0, 5.0), seed=7)
    assert made.shape == source.shape
    far = [*range(40), *range(135, FRAMES)]
    assert torch.equal(made[:, far], source[:, far])
    assert not torch.isclose(made[:, 50:125], source[:, 50:125]).all(-1).any()

    longer = peer.maker.latents(REQUEST, task=Extend(source, seconds=4.5, context=6.0), seed=7)
    assert longer.shape[1] == FRAMES + 113
    assert torch.equal(longer[:, : FRAMES - 10], source[:, : FRAMES - 10])
    # What is not heard plays no part.
    other = torch.cat([randn(1, 101, ACOUSTIC, seed=9), source[:, 101:]], 1)
    again = peer.maker.latents(REQUEST, task=Extend(other, seconds=4.5, context=6.0), seed=7)
    assert torch.equal(again[:, 101:], longer[:, 101:])


def test_cover(peer: Peer) -> None:
    """All the way, it is the codes of the recording; not at all, it is the words alone."""
    source = randn(1, 255, ACOUSTIC, seed=2)
    whole = peer.maker.latents(REQUEST, task=Cover(source), seed=7)
    codes = peer.maker.model.tokenizer(source)[1][0].tolist()
    assert torch.equal(whole, peer.maker.latents(REQUEST, seconds=10.2, codes=codes, seed=7))
    never = peer.maker.latents(REQUEST, task=Cover(source, strength=0.0), seed=7)
    assert torch.equal(never, peer.maker.latents(REQUEST, seconds=10.2, seed=7))
    assert not torch.equal(whole, peer.maker.latents(REQUEST, task=Cover(source, closeness=0.5), seed=7))


def test_timbre_is_heard(peer: Peer) -> None:
    timbre = randn(1, 100, ACOUSTIC, seed=4)
    made = peer.maker.latents(REQUEST, seconds=SECONDS, timbre=timbre, seed=7)
    assert not torch.equal(made, peer.maker.latents(REQUEST, seconds=SECONDS, seed=7))
    heard = thirds(torch.arange(1200.0)[None, :, None], 750)[0, :, 0]
    assert heard.tolist() == [*range(250), *range(400, 650), *range(950, 1200)]


def test_listen(peer: Peer) -> None:
    audio = randn(1, 2, 1920 * 60 + 500, seed=5)
    with torch.no_grad():
        wanted = peer.pipe.vae.encode(audio).latent_dist.mean.mT
    assert_parity(peer.maker.listen(audio), wanted, 1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": 9.9}, "duration 9.9 s, wanted 10 to 600"),
        ({}, "no duration"),
        ({"task": Cover(randn(1, 300, ACOUSTIC)), "seconds": 20.0}, "as long as its recording"),
        ({"task": Cover(randn(1, 300, ACOUSTIC)), "codes": [1]}, "codes beside a Cover"),
        ({"task": Cover(randn(1, 300, ACOUSTIC)), "seconds": math.inf}, "as long as its recording"),
        ({"task": Cover(randn(1, 300, ACOUSTIC + 1))}, r"task: latents .* wanted \[1, N, 8\]"),
        ({"seconds": 10, "codes": []}, "0 codes for 10 s, wanted 50"),
        ({"seconds": 10, "codes": [1] * 49}, "49 codes for 10 s, wanted 50"),
        ({"seconds": 10, "codes": [1] * 500}, "500 codes for 10 s, wanted 50"),
        ({"seconds": 10, "codes": [1] * 49 + [64000]}, "code 64000, wanted 0 to 63999"),
        ({"seconds": 10, "codes": [-1] * 50}, "code -1, wanted 0 to 63999"),
        ({"seconds": 10, "timbre": randn(1, 0, ACOUSTIC)}, "timbre: latents .* with N of at least 1"),
        ({"seconds": 10, "timbre": randn(2, 5, ACOUSTIC)}, "timbre: latents .* one by one"),
    ],
    ids=str,
)
def test_refusals(peer: Peer, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str) -> None:
    """Before a text is read or a part of the model has run."""
    monkeypatch.setattr(peer.maker.model, "hints", None)
    monkeypatch.setattr(peer.maker.model.tokenizer, "forward", None)
    monkeypatch.setattr(peer.maker.texts, "caption", None)
    with pytest.raises(ValueError, match=message):
        peer.maker.latents(REQUEST, **arguments)


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        (Cover, {"strength": 1.5}, "Cover: strength is 1.5, wanted a number in"),
        (Cover, {"closeness": math.nan}, "Cover: closeness is nan"),
        (Repaint, {"start": 5.0, "end": 5.0}, "wanted start < end"),
        (Repaint, {"start": 0.0, "end": math.nan}, "wanted start < end"),
        (Repaint, {"start": math.inf, "end": math.inf}, "wanted start < end"),
        (Extend, {"seconds": 600.0}, "12.0 s that are heard and 600.0 s to add are 612.0 s"),
        (Extend, {"seconds": 5.0, "context": 13.0}, "at most all of it"),
        (Extend, {"seconds": -5.0}, "-5.0 s to add under all of 12.0 s; wanted more than 0 s"),
        (Extend, {"seconds": math.inf}, "inf s to add"),
        (Extend, {"seconds": math.nan}, "nan s to add"),
        (Extend, {"seconds": 5.0, "context": math.inf}, "under inf s of 12.0 s"),
        (Extend, {"seconds": 5.0, "context": math.nan}, "under nan s of 12.0 s"),
        (Extend, {"seconds": 5.0, "context": 0.0}, "under more than 0 s"),
    ],
    ids=str,
)
def test_tasks_refuse_numbers(task: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(randn(1, 300, ACOUSTIC), **arguments)


@pytest.mark.parametrize("frames", [75, 249, 15001, 17500])
def test_recordings_of_another_length(frames: int) -> None:
    source = torch.zeros(1, frames, 0)
    for make in (Cover, lambda source: Repaint(source, 0.0, 1.0)):
        with pytest.raises(ValueError, match=f"recording is {frames / 25} s long, wanted 10 to 600 s"):
            make(source)
    with pytest.raises(ValueError, match=r"Extend: latents .* one by one"):
        Extend(torch.zeros(2, 300, 0), 5.0)


def test_endless_spans_are_cut() -> None:
    assert Repaint(torch.zeros(1, 300, 0), 4.0, math.inf).span == (100, 300)
    assert Repaint(torch.zeros(1, 300, 0), -math.inf, 4.0).span == (0, 100)


def test_a_rounding_makes_no_frame(peer: Peer) -> None:
    """16.6 x 25 is above 415 in floating point."""
    assert [frames_of(seconds) for seconds in (10, 16.6, 10.03, 10.04, 600)] == [250, 415, 251, 251, 15000]
    assert frames_of(10 + 1e-5) == 251  # a part of a frame
    source = torch.zeros(1, 415, ACOUSTIC)
    made = peer.maker.latents(REQUEST, task=Repaint(source, 0.0, 1.0), seconds=16.6)
    assert made.shape == source.shape


@pytest.mark.parametrize("settings", [Turbo(method="sde"), Base(steps=3, method="sde")], ids=repr)
def test_the_seed_decides_all_noise(peer: Peer, settings: Turbo | Base) -> None:
    made = [peer.maker.latents(REQUEST, seconds=10, settings=settings, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_lyrics_are_measured_with_what_stands_around_them(peer: Peer) -> None:
    """Before the planner, whose own limit is of the lyrics alone, has made anything; and again when it has chosen."""

    class Counting:
        plans = 0

        def plan(self, *_: Any, **__: Any) -> SongPlan:
            self.plans += 1
            return SongPlan(duration=10, language="unknown")

    planner: Any = Counting()
    maker = MusicMaker(peer.maker.model, peer.maker.codec, peer.maker.texts, planner)
    around = len(peer.maker.texts.tokenizer.encode(lyrics_text("", "en")).ids)
    fits = SongRequest("x", "a" * (MOST_LYRIC_TOKENS - around))
    maker.check_lyrics(fits)
    with pytest.raises(ValueError, match=f"words around them are {MOST_LYRIC_TOKENS + 1} tokens, wanted at most"):
        maker.plan(replace(fits, lyrics=fits.lyrics + "a"))
    assert planner.plans == 0
    with pytest.raises(ValueError, match=f"words around them are {MOST_LYRIC_TOKENS + 5} tokens"):
        maker.plan(fits)  # "unknown" is five letters longer than "en"
    assert planner.plans == 1


def test_audio_is_watched(peer: Peer) -> None:
    """Also while `at_peak` waits for all of it: asked before every piece, told after it."""
    latents = randn(1, 600, ACOUSTIC, seed=2)
    told: list[tuple[int, int]] = []
    for decibels in (None, -1.0):
        told.clear()
        pieces = [p.clone() for p in peer.maker.audio(latents, decibels=decibels, on_piece=lambda *at: told.append(at))]
        assert sum(piece.shape[-1] for piece in pieces) == 600 * 1920
        assert len(told) == 2
        assert told == sorted(told)
        assert told[-1] == (600 * 1920, 600 * 1920)
        told.clear()
        stopped = peer.maker.audio(
            latents, decibels=decibels, on_piece=lambda *at: told.append(at), cancelled=lambda: len(told) == 1
        )
        with pytest.raises(SamplingCancelledError, match=r"cancelled after \d+ of 1152000"):
            list(stopped)
        assert len(told) == 1


def test_listening_is_watched(peer: Peer) -> None:
    """A recording of more than one window."""
    audio, told = torch.zeros(1, 2, 1920 * 600 + 7), []
    latents = peer.maker.listen(audio, on_piece=lambda *at: told.append(at))
    assert latents.shape[1] == 600
    assert len(told) == 2
    assert told[-1] == (600, 600)
    told.clear()
    with pytest.raises(SamplingCancelledError, match=r"listen: cancelled after \d+ of 600"):
        peer.maker.listen(audio, on_piece=lambda *at: told.append(at), cancelled=lambda: len(told) == 1)
    assert len(told) == 1


def test_one_piece_at_a_time(peer: Peer) -> None:
    with pytest.raises(ValueError, match=r"audio: latents \(2, 30, 8\), wanted \[1, N, 8\]"):
        peer.maker.audio(torch.zeros(2, 30, ACOUSTIC))
    with pytest.raises(ValueError, match=r"audio: latents \(1, 8, 30\)"):
        peer.maker.audio(torch.zeros(1, ACOUSTIC, 30))
    with pytest.raises(ValueError, match=r"at_peak: a piece \(2, 2, 5\)"):
        list(at_peak([torch.zeros(2, 2, 5)]))
    for shape in ((1, 1, 5000), (2, 2, 5000), (2, 5000)):
        with pytest.raises(ValueError, match=r"listen: audio .* wanted \[1, 2, T\]"):
            peer.maker.listen(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"listen: audio .* wanted \[1, 2, T\]"):
        peer.maker.listen(Samples(torch.zeros(1, 1, 5000)))


def test_other_refusals(peer: Peer) -> None:
    with pytest.raises(ValueError, match=f"wanted at most {MOST_LYRIC_TOKENS}"):
        peer.maker.latents(SongRequest("x", "la " * 700), seconds=10)
    with pytest.raises(ValueError, match="no planner"):
        peer.maker.plan(REQUEST, 10)
    with pytest.raises(SamplingCancelledError):
        peer.maker.latents(REQUEST, seconds=10, cancelled=lambda: True)
    with pytest.raises(ValueError, match="not finite"):
        list(at_peak([torch.zeros(2, 3), torch.full((2, 1), float("nan"))]))


def test_level_of_silence() -> None:
    (piece,) = at_peak([torch.zeros(2, 5)])
    assert torch.equal(piece, torch.zeros(2, 5))
