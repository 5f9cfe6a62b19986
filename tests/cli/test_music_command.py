"""`longburn music`: what it writes and prints, and what it says to bad input."""

import json
import signal
import wave
from pathlib import Path

import pytest

from longburn.cli.music_options import MusicOptions

SONG = ("music", "--caption", "a calm piano")


def samples(path: Path) -> int:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (48000, 2, 2)
        return file.getnframes()


def test_a_song_and_what_is_made_of_it(invoke, tmp_path: Path) -> None:
    first, again = tmp_path / "first.wav", tmp_path / "again.wav"
    outcome = invoke(*SONG, "--lyrics", "[verse]\nla la", "-o", str(first), "--json")
    assert outcome.code == 0, outcome.err
    assert "small random weights" in outcome.err
    assert "noise" in outcome.err
    facts = json.loads(outcome.out)
    assert facts["seconds"] == 10.0
    assert facts["plan"]["duration"] == 10
    assert set(facts["work"]) == {"plan", "latents", "audio"}
    assert samples(first) == 480_000
    assert invoke(*SONG, "--lyrics", "[verse]\nla la", "-o", str(again)).code == 0
    assert first.read_bytes() == again.read_bytes()

    longer = tmp_path / "longer.wav"
    outcome = invoke(
        *SONG, "--task", "extend", "--source", str(first), "--duration", "2", "--context", "8", "-o", str(longer)
    )
    assert outcome.code == 0, outcome.err
    assert samples(longer) == 12 * 48_000
    assert "listening" in outcome.err


def test_interrupted(invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older file stays what it was, and nothing unfinished is left."""
    from longburn.models.ace_step.v15.music import MusicMaker

    path = tmp_path / "song.wav"
    path.write_bytes(b"older")
    made = MusicMaker.latents

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return made(*arguments, **options)

    monkeypatch.setattr(MusicMaker, "latents", interrupted)
    outcome = invoke(*SONG, "--no-plan", "-o", str(path))
    assert outcome.code == 130
    assert f"cancelled: {path} was not written" in outcome.err
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "no --caption"),
        (("-c", "x", "--duration", "9"), 2, "duration 9.0 s, wanted 10 to 600 s"),
        (("-c", "x", "--duration", "601"), 2, "duration 601.0 s, wanted 10 to 600 s"),
        (("-c", "x", "--duration", "nan"), 2, "duration nan s"),
        (("-c", "x", "--key", "H major"), 2, "key 'H major'"),
        (("-c", "x", "--language", "xx"), 2, "language 'xx'"),
        (("-c", "x", "--bpm", "29"), 2, "29"),
        (("-c", "x", "--lyrics", "la", "--lyrics-file", "f"), 2, "--lyrics and --lyrics-file both given"),
        (("-c", "x", "--lyrics-file", "nowhere.txt"), 1, "lyrics file nowhere.txt: No such file"),
        (("-c", "x", "--lyrics", "la " * 1000, "--no-plan"), 1, "wanted at most 2048"),
        (("-c", "x", "--task", "cover"), 2, "--task and --source belong together"),
        (("-c", "x", "--source", "no.wav", "--task", "cover"), 1, "no.wav"),
        (("-c", "x", "--source", "no.wav", "--task", "repaint", "--start", "1"), 2, "--start and --end"),
        (("-c", "x", "--source", "no.wav", "--task", "extend"), 2, "the seconds to add"),
        (("-c", "x", "--strength", "0.5"), 2, "--strength belongs to --task cover"),
        (("-c", "x", "--steps", "5", "--no-plan"), 2, "--steps is of the base and sft models"),
        (("-c", "x", "--model", "nowhere"), 1, "nowhere: no such directory"),
        (("-c", "x", "-o", "nowhere/x.wav"), 2, "no directory nowhere"),
        (("-c", "x", "-o", "."), 2, "--output .: a directory; wanted the name of a file"),
        (("-c", "x", "-o", ""), 2, "--output .: a directory"),
        (("-c", "x", "-o", "x" * 250 + ".wav"), 2, "cannot write there: File name too long"),
        (("-c", "x", "--seed", str(2**64)), 2, "less than or equal to 18446744073709551615"),
        (("-c", "x", "--shift", "-1"), 2, "shift"),
        (("-c", "x", "--task", "cover", "--source", "no.wav", "--duration", "20"), 2, "--duration 20.0: a cover is as"),
        (
            ("-c", "x", "--task", "repaint", "--source", "no.wav", "--start=1", "--end=2", "--duration=20"),
            2,
            "--duration 20.0: a repaint is as long as its --source",
        ),
    ],
    ids=str,
)
def test_bad_input(
    invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if code == 2:
        monkeypatch.setattr(MusicOptions, "load", None)
    outcome = invoke("music", *options)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []


def recording(path: Path, samples: int, *, rate: int = 48000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2 * samples))
    return path


@pytest.mark.parametrize(
    ("seconds", "options", "message"),
    [
        (12, ("cover", "--strength", "5"), "Cover: strength is 5.0, wanted a number in [0, 1]"),
        (3, ("cover",), "Cover: the recording is 3.0 s long, wanted 10 to 600 s"),
        (3, ("repaint", "--start", "1", "--end", "2"), "Repaint: the recording is 3.0 s long, wanted 10 to 600 s"),
        (700, ("repaint", "--start", "1", "--end", "2"), "Repaint: the recording is 700.0 s long"),
        (12, ("repaint", "--start", "5", "--end", "3"), "5.0 to 3.0 s of 12.0 s; wanted start < end"),
        (12, ("repaint", "--start", "nan", "--end", "3"), "nan to 3.0 s of 12.0 s"),
        (12, ("extend", "--duration", "-5"), "Extend: -5.0 s to add"),
        (12, ("extend", "--duration", "inf"), "Extend: inf s to add"),
        (12, ("extend", "--duration", "nan"), "Extend: nan s to add"),
        (12, ("extend", "--duration", "5", "--context", "inf"), "under inf s of 12.0 s"),
        (12, ("extend", "--duration", "5", "--context", "13"), "under 13.0 s of 12.0 s"),
    ],
    ids=str,
)
def test_bad_numbers_of_a_task(
    invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, options: tuple[str, ...], message: str
) -> None:
    """Found by the recording's length, before a model is loaded."""
    monkeypatch.setattr(MusicOptions, "load", None)
    source = recording(tmp_path / "source.wav", seconds * 48000)
    outcome = invoke(*SONG, "--source", str(source), "--task", *options, "-o", str(tmp_path / "song.wav"))
    assert outcome.code == 2, outcome.err
    assert message in outcome.err


def test_a_timbre_of_no_frame(invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MusicOptions, "load", None)
    outcome = invoke(*SONG, "--timbre", str(recording(tmp_path / "short.wav", 1919)))
    assert outcome.code == 2
    assert "1919 samples, wanted at least one frame" in outcome.err


@pytest.mark.parametrize(
    ("turbo", "options", "message"),
    [
        (True, ("--steps", "4"), "--steps is of the base and sft models"),
        (False, ("--guidance", "-1"), "guidance_scale is -1.0"),
        (False, ("--shift", "-1"), "shift"),
    ],
)
def test_settings_are_checked_by_the_configuration(
    invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turbo: bool, options: tuple[str, ...], message: str
) -> None:
    from longburn.models.ace_step.v15.small import CONFIG

    monkeypatch.setattr(MusicOptions, "load", None)
    for part in ("acestep-v15-base", "vae", "Qwen3-Embedding-0.6B"):
        (tmp_path / part).mkdir()
    (tmp_path / "acestep-v15-base" / "config.json").write_text(json.dumps({**CONFIG, "is_turbo": turbo}))
    outcome = invoke(*SONG, "--model", str(tmp_path), *options, "-o", str(tmp_path / "song.wav"))
    assert outcome.code == 2, outcome.err
    assert message in outcome.err


def test_lyrics_that_only_the_planner_would_take(invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longburn.models.ace_step.planner import Planner

    monkeypatch.setattr(Planner, "plan", None)
    file = tmp_path / "lyrics.txt"
    file.write_text("a" * 2040)
    outcome = invoke(*SONG, "--lyrics-file", str(file), "-o", str(tmp_path / "song.wav"))
    assert outcome.code == 1
    assert "the lyrics and the words around them are 20" in outcome.err


def test_interrupted_while_audio_is_decoded(invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the piece in work, though the level is only known at the end of all."""
    from longburn.models.ace_step.codecs import Oobleck

    decoded, stream = [], Oobleck.decode_stream

    def interrupted(codec, latents):
        for piece in stream(codec, latents, window=50):
            decoded.append(piece)
            signal.raise_signal(signal.SIGINT)
            yield piece

    monkeypatch.setattr(Oobleck, "decode_stream", interrupted)
    path = tmp_path / "song.wav"
    outcome = invoke(*SONG, "--no-plan", "-o", str(path))
    assert outcome.code == 130, outcome.err
    assert f"cancelled: {path} was not written" in outcome.err
    assert len(decoded) == 1
    assert list(tmp_path.iterdir()) == []


def test_another_sample_rate_and_another_generation(invoke, tmp_path: Path) -> None:
    source = recording(tmp_path / "source.wav", 44100, rate=44100)
    outcome = invoke(*SONG, "--task", "cover", "--source", str(source))
    assert outcome.code == 1
    assert "44100 Hz, wanted 48000 Hz" in outcome.err
    (tmp_path / "v1" / "ace_step_transformer").mkdir(parents=True)
    outcome = invoke(*SONG, "--model", str(tmp_path / "v1"))
    assert outcome.code == 1
    assert "a checkpoint of ACE-Step v1" in outcome.err
