"""`longburn convert`: what it prints and how it fails; what it writes is tests/models/test_gpt_oss_convert.py."""

from pathlib import Path

import pytest

ORIGINAL = Path(__file__).parent.parent / "models" / "data" / "gpt_oss_tiny_original"


def test_converts_and_says_what_it_wrote(invoke, tmp_path: Path) -> None:
    outcome = invoke("convert", ORIGINAL, tmp_path / "hf", "--format", "hf", "--experts", "bf16")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"{tmp_path / 'hf'}: 2 files, {size(tmp_path / 'hf')}\n"
    again = invoke("convert", ORIGINAL, tmp_path / "hf", "--format", "hf")
    assert again.code == 1
    assert "exists" in again.err
    assert "--force" in again.err
    assert invoke("convert", ORIGINAL, tmp_path / "hf", "--format", "hf", "--force").code == 0


def size(directory: Path) -> str:
    from longburn.cli.sizes import show_size

    return show_size(sum(file.stat().st_size for file in directory.iterdir()))


@pytest.mark.parametrize(
    "options",
    [(), ("--format", "gguf"), ("--experts", "fp8"), ("--format", "hf", "--max-shard-size", "five")],
)
def test_wrong_usage(invoke, tmp_path: Path, options: tuple[str, ...]) -> None:
    outcome = invoke("convert", ORIGINAL, tmp_path / "new", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_model_of_another_family(invoke, tiny: str, tmp_path: Path) -> None:
    outcome = invoke("convert", tiny, tmp_path / "new", "--format", "original")
    assert (outcome.code, outcome.out) == (1, "")
    assert "model_type is 'llama', wanted 'gpt_oss'" in outcome.err
    outcome = invoke("convert", tmp_path / "nowhere", tmp_path / "new", "--format", "original")
    assert outcome.code == 1
    assert "no config.json" in outcome.err
    assert list(tmp_path.iterdir()) == []
