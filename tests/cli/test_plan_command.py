"""`longburn plan`: what it prints. Its arithmetic is tests/models/test_planning.py."""

import json
from pathlib import Path

import pytest

ORIGINAL = Path(__file__).parent.parent / "models" / "data" / "gpt_oss_tiny_original"


def test_a_released_model(invoke) -> None:
    outcome = invoke("plan", "gpt-oss-20b", "--context", 131072, "--batch", 4, "--memory", "80GiB")
    assert (outcome.code, outcome.err) == (0, "")
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert "weights 12.82 GiB 13,761,264,768" in lines
    assert "12 layers, window 128 12.11 MiB 12,693,600" in lines
    assert "12 layers, full 12.01 GiB 12,897,583,200" in lines
    assert any(line.startswith("fits into 80.00 GiB") for line in lines)
    assert any(line.startswith("largest context at batch 4: ") for line in lines)


def test_json_adds_up(invoke) -> None:
    found = json.loads(invoke("plan", "gpt-oss-120b", "--context", 1000, "--memory", "1GiB", "--json").out)
    cache = sum(entry["bytes"] for entry in found["cache"].values())
    assert found["total"] == sum(found["weights"].values()) + cache + found["activations"]
    assert found["largest"] == {"context": 0, "batch": 0}
    assert found["memory"] == 2**30


@pytest.mark.parametrize("config", [ORIGINAL, ORIGINAL / "config.json"])
def test_a_configuration_of_ones_own(invoke, config: Path) -> None:
    outcome = invoke("plan", config, "--context", 100, "--dtype", "fp32", "--window", 20, "--memory", "1GB")
    assert outcome.code == 0
    assert "experts, MXFP4" in outcome.out
    assert "2 layers, window 20 + 4 sink tokens" in outcome.out
    assert "largest context at batch 1: any" in outcome.out
    assert "does not fit into 1.00 MiB" in invoke("plan", config, "--memory", "1MiB").out
    assert "experts, dense" in invoke("plan", config, "--experts", "dense").out


@pytest.mark.parametrize(
    "arguments",
    [(), ("gpt-oss-20b", "--memory", "lots"), ("gpt-oss-20b", "--memory", "0GB"), ("gpt-oss-20b", "--batch", "0")],
)
def test_wrong_usage(invoke, arguments: tuple[str, ...]) -> None:
    outcome = invoke("plan", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1


def test_what_is_not_there(invoke, tmp_path: Path) -> None:
    outcome = invoke("plan", "gpt-oss-21b")
    assert (outcome.code, outcome.out) == (1, "")
    assert "gpt-oss-20b" in outcome.err
    (tmp_path / "other.json").write_text("{}")
    assert "wanted a config.json" in invoke("plan", tmp_path / "other.json").err
