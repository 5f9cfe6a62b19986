"""Audio codes of planned songs against transformers' Qwen3 in fp64, step by step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import planner_peer
import pytest
import torch

from longburn.generation.ahead import DeviceStep
from longburn.models.ace_step.planner import (
    CodeModel,
    CodeTokens,
    Planner,
    PlannerSampling,
    SongPlan,
    SongRequest,
    codes_of,
    generate,
)
from longburn.models.qwen3 import Qwen3
from longburn.text import Tokenizer

SONG = SongRequest("calm piano", "[Verse]\nla la", duration=10.5)
PLAN = SongPlan(bpm=120, caption="A song.", duration=11, keyscale="F# minor", language="en", timesignature="4")
LONGER = SongRequest("a choir that sings of the sea and the wind", "la\nla\nla", negative="noise", duration=13)
GREEDY = PlannerSampling(temperature=0.0)


@pytest.fixture(scope="module")
def peer() -> Any:
    return planner_peer.theirs().double()


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    directory = planner_peer.save(tmp_path_factory.mktemp("planner"), planner_peer.theirs())
    return Planner.from_checkpoint(directory, dtype=torch.float64, codes=planner_peer.CODES)


def expected(planner: Planner, peer: Any, song: SongRequest, plan: SongPlan, sampling: PlannerSampling) -> list[int]:
    """Greedy: the best valid code, `int(5 * duration)` times, both rows continued with it."""
    rows = [planner.prompts.codes(song, plan), planner.prompts.codes_without(song)]
    made, score = list[int](), planner_peer.Guided(peer, rows, sampling.guidance)
    first = planner.tokens.first
    for _ in range(int(5 * song.duration)):
        valid = score(made)[first : first + planner_peer.CODES]
        if sampling.repetition_penalty != 1:
            for code in {token - first for token in made}:
                valid[code] *= sampling.repetition_penalty if valid[code] < 0 else 1 / sampling.repetition_penalty
        made.append(first + int(valid.argmax()))
    return [token - first for token in made]


@pytest.mark.parametrize(
    "settings", [{}, {"guidance": 1.0}, {"repetition_penalty": 1.7}, {"guidance": 3.5, "order": "comfyui"}], ids=str
)
def test_greedy_codes_are_those_of_transformers(planner: Planner, peer: Any, settings: dict[str, Any]) -> None:
    sampling = PlannerSampling(temperature=0.0, **settings)
    wanted = [expected(planner, peer, song, PLAN, sampling) for song in (SONG, LONGER)]
    assert [len(codes) for codes in wanted] == [52, 65]
    assert len(set(wanted[0])) > 2
    assert planner.codes([(SONG, PLAN), (LONGER, PLAN)], sampling) == wanted


@pytest.mark.parametrize("sampling", [PlannerSampling(seed=3), PlannerSampling(seed=8, guidance=1.0, top_k=7)], ids=str)
def test_a_song_is_the_same_alone_and_in_a_batch(planner: Planner, sampling: PlannerSampling) -> None:
    songs = [(SONG, PLAN), (LONGER, PLAN), (SONG, PLAN)]
    together = planner.codes(songs, sampling)
    assert [len(codes) for codes in together] == [52, 65, 52]
    assert together[0] != together[2]
    for i, song in enumerate(songs):
        assert planner.codes([song], replace(sampling, seed=sampling.seed + i)) == [together[i]]


@pytest.mark.parametrize("free_end", [False, True])
def test_running_ahead_gives_the_same(planner: Planner, monkeypatch: pytest.MonkeyPatch, free_end: bool) -> None:
    """The loop that a GPU takes, with the step run as it is instead of from a graph."""
    if free_end:
        monkeypatch.setattr(generate, "LONGEST", 14)
        with torch.no_grad():
            planner.model.head.weight[planner.tokens.end] *= 3
    songs, sampling = [(SONG, PLAN), (LONGER, PLAN)], PlannerSampling(seed=4, repetition_penalty=1.2)
    try:
        wanted = list(planner.stream_codes(songs, sampling, free_end=free_end))
        monkeypatch.setattr(generate, "runs_ahead", lambda cache: True)
        assert list(planner.stream_codes(songs, sampling, free_end=free_end)) == wanted
    finally:
        if free_end:
            with torch.no_grad():
                planner.model.head.weight[planner.tokens.end] /= 3
    if free_end:
        ends = [sum(step[song] is not None for step in wanted) for song in range(2)]
        assert min(ends) < 52
        assert max(ends) < 70
    else:
        assert [step[0] is None for step in wanted] == [False] * 52 + [True] * 13


def test_only_the_rows_of_codes_are_multiplied(planner: Planner, peer: Any) -> None:
    model, first = planner._codes, planner.tokens.first
    assert model.vocab_size == planner_peer.CODES + 1
    prompt = planner.prompts.codes(SONG, PLAN)
    with torch.no_grad():
        cache = model.init_cache(1)
        wanted = peer(torch.tensor([[*prompt, first + 3, first]])).logits[0, -3:]
        rows = [*range(first, first + planner_peer.CODES), planner.tokens.end]
        torch.testing.assert_close(model.read([prompt], cache), wanted[:1, rows], atol=1e-5, rtol=0)
        got = model.forward_logits(torch.tensor([[3, 0]]), cache, all_positions=True)
        torch.testing.assert_close(got[0], wanted[1:, rows], atol=1e-5, rtol=0)


def test_local_ids() -> None:
    tokens = CodeTokens()
    ids = torch.tensor([151668, 151669, 215668, 215669, 217203, 151645, 0])
    local = tokens.local(ids)
    assert local.tolist() == [-1, 0, 63999, -1, -1, 64000, -1]
    assert tokens.tokens_of(local).tolist() == [-1, 151669, 215668, -1, -1, 151645, -1]
    assert tokens.tokens([0, 63999]) == [151669, 215668]
    assert [codes_of(seconds) for seconds in (10, 10.39, 600)] == [50, 51, 3000]


@pytest.mark.cuda
def test_a_step_is_one_graph(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[DeviceStep] = []
    begin = DeviceStep.begin

    def spy(self: DeviceStep, *arguments: Any) -> Any:
        steps.append(self)
        return begin(self, *arguments)

    songs, sampling = [(SONG, PLAN), (LONGER, PLAN)], PlannerSampling(seed=4)
    wanted = planner.codes(songs, sampling)
    on_gpu = Planner(planner.model.to("cuda"), planner.tokenizer, codes=planner_peer.CODES)
    monkeypatch.setattr(DeviceStep, "begin", spy)
    try:
        assert on_gpu.codes(songs, sampling) == wanted
    finally:
        planner.model.to("cpu")
    assert [(step.captures, step.why_not) for step in steps] == [(1, None)]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_bad_songs(planner: Planner) -> None:
    with pytest.raises(ValueError, match="no songs; give at least one"):
        planner.stream_codes([])
    with pytest.raises(ValueError, match="neither the request nor the plan says how long"):
        planner.stream_codes([(SongRequest("x"), SongPlan())])
    with pytest.raises(ValueError, match="duration 700 s, wanted 10 to 600 s"):
        planner.stream_codes([(SongRequest("x"), SongPlan(duration=700))])
    with pytest.raises(ValueError, match="lyrics of 2049 tokens, wanted at most 2048; shorten them"):
        planner.stream_codes([(SongRequest("x", "x" * 2049, duration=10), SongPlan())])
    assert planner.stream_codes([(SongRequest("x", "x" * 2048, duration=10), SongPlan())]) is not None


@pytest.mark.parametrize("duration", [9.99, 600.01, float("nan"), -1, float("inf")])
def test_bad_durations(duration: float) -> None:
    with pytest.raises(ValueError, match=r"duration .* s, wanted 10 to 600 s"):
        codes_of(duration)
    with pytest.raises(ValueError, match=r"duration .* s, wanted 10 to 600 s"):
        SongRequest("x", duration=duration)


def test_weights_of_nan(planner: Planner) -> None:
    from longburn.generation import GenerationError

    with torch.no_grad():
        held = planner.model.norm.weight.clone()
        planner.model.norm.weight.fill_(torch.nan)
    try:
        with pytest.raises(GenerationError, match="no logit of a code is finite"):
            planner.codes([(SONG, PLAN)])
    finally:
        with torch.no_grad():
            planner.model.norm.weight.copy_(held)


def test_models_and_tokenizers_without_codes(planner: Planner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"<\|audio_code_63999\|>"):
        Planner(planner.model, planner.tokenizer)
    assert isinstance(planner.model, Qwen3)
    with pytest.raises(ValueError, match="codes up to token 215668, but the model's vocabulary has"):
        CodeModel(planner.model, CodeTokens())
    with pytest.raises(ValueError, match="code 40, wanted 0 to 39"):
        planner.tokens.tokens([40])
    assert isinstance(planner.tokenizer, Tokenizer)
