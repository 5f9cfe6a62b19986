"""The whole way from words to sound against diffusers' pipeline, with small random models and a real tokenizer."""

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
from longburn.models.ace_step.planner import SongPlan, SongRequest
from longburn.models.ace_step.planner.prompts import MOST_LYRIC_TOKENS
from longburn.models.ace_step.v15 import music
from longburn.models.ace_step.v15.music import Cover, Extend, MusicMaker, Repaint
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
    thirds = music._thirds(torch.arange(1200.0)[None, :, None], 750)[0, :, 0]
    assert thirds.tolist() == [*range(250), *range(400, 650), *range(950, 1200)]


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
        ({"task": Repaint(randn(1, 300, ACOUSTIC), 5.0, 5.0)}, "wanted start < end"),
        ({"task": Extend(randn(1, 300, ACOUSTIC), 600.0)}, "12.0 s that are heard and 600.0 s to add are 612.0 s"),
        ({"task": Extend(randn(1, 300, ACOUSTIC), 5.0, context=13.0)}, "at most all of it"),
    ],
    ids=str,
)
def test_refusals(peer: Peer, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peer.maker.latents(REQUEST, **arguments)


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
