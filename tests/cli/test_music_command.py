"""`longburn music`: what it writes and prints, and what it says to bad input."""

import json
import signal
import wave
from pathlib import Path

import pytest

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
        (("-c", "x", "--lyrics-file", "nowhere.txt"), 1, "nowhere.txt"),
        (("-c", "x", "--lyrics", "la " * 1000, "--no-plan"), 1, "wanted at most 2048"),
        (("-c", "x", "--task", "cover"), 2, "--task and --source belong together"),
        (("-c", "x", "--source", "no.wav", "--task", "cover"), 1, "no.wav"),
        (("-c", "x", "--source", "no.wav", "--task", "repaint", "--start", "1"), 2, "--start and --end"),
        (("-c", "x", "--source", "no.wav", "--task", "extend"), 2, "the seconds to add"),
        (("-c", "x", "--strength", "0.5"), 2, "--strength belongs to --task cover"),
        (("-c", "x", "--steps", "5", "--no-plan"), 2, "--steps is of the base and sft models"),
        (("-c", "x", "--model", "nowhere"), 1, "nowhere: no such directory"),
        (("-c", "x", "-o", "nowhere/x.wav"), 2, "no directory nowhere"),
    ],
    ids=str,
)
def test_bad_input(
    invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = invoke("music", *options)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_another_sample_rate_and_another_generation(invoke, tmp_path: Path) -> None:
    source = tmp_path / "source.wav"
    with wave.open(str(source), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes(bytes(2 * 44100))
    outcome = invoke(*SONG, "--task", "cover", "--source", str(source))
    assert outcome.code == 1
    assert "44100 Hz, wanted 48000 Hz" in outcome.err
    (tmp_path / "v1" / "ace_step_transformer").mkdir(parents=True)
    outcome = invoke(*SONG, "--model", str(tmp_path / "v1"))
    assert outcome.code == 1
    assert "a checkpoint of ACE-Step v1" in outcome.err
