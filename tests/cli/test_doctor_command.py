"""`longburn doctor`: what it prints. That its answers hold is tests/kernels/test_registry.py."""

import json
import subprocess
import sys

import pytest
import torch

from longburn.kernels import native
from longburn.kernels.native import build

OPERATIONS = ["attend", "append", "angles", "linear", "rms_norm", "route", "experts"]


def ask(invoke, *arguments: object) -> dict:
    outcome = invoke("doctor", "--device", "cpu", *arguments, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


def test_the_layer_of_the_released_model(invoke) -> None:
    found = ask(invoke)
    assert found["shape"]["dtype"] == "bfloat16"
    assert found["versions"]["torch"].startswith(torch.__version__)
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["memory"] > 2**28
    assert list(found["operations"]) == OPERATIONS
    for operation in found["operations"].values():
        reasons = operation["reasons"]
        assert operation["taken"] == next(name for name, reason in reasons.items() if reason is None)
        assert reasons["reference"] is None
    assert found["operations"]["attend"]["reasons"]["flex"] == "needs CUDA, got cpu"


def test_text_says_the_same(invoke) -> None:
    outcome = invoke("doctor", "--device", "cpu", "--window", 128, "--sink-tokens", 4, "--no-sinks")
    assert (outcome.code, outcome.err) == (0, "")
    found = ask(invoke, "--window", 128, "--sink-tokens", 4, "--no-sinks")
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    layer = "1 new of 8,192 tokens, batch 1, 64 heads on 8 of size 64, a window of 128 and 4 sink tokens"
    assert f"one layer on cpu in bfloat16: {layer}" in lines
    for operation, answer in found["operations"].items():
        start = next(n for n, line in enumerate(lines) if line.startswith(f"{operation} "))
        rows = [line.removeprefix(f"{operation} ") for line in lines[start : start + len(answer["reasons"])]]
        assert f"{answer['taken']} taken" in rows
        for name, reason in answer["reasons"].items():
            assert name == answer["taken"] or f"{name} {f'no: {reason}' if reason else 'could, comes later'}" in rows


def test_the_shape_decides(invoke) -> None:
    few, many = ask(invoke), ask(invoke, "--queries", 300, "--keys", 500, "--dim", 64, "--heads", 4, "--kv-heads", 2)
    assert many["shape"] | {"queries": 300, "keys": 500, "dim": 64, "heads": 4, "kv_heads": 2} == many["shape"]
    assert "computes 4 rows at most" in many["operations"]["linear"]["reasons"]["native"]
    if native.unavailable() is None:
        assert (few["operations"]["linear"]["taken"], many["operations"]["linear"]["taken"]) == ("native", "reference")


def test_a_cache_in_fp8(invoke) -> None:
    found = ask(invoke, "--kv-cache", "fp8", "--keys", 300)
    assert "float8" in found["operations"]["attend"]["reasons"]["native"]
    assert found["operations"]["append"]["taken"] == "reference"
    assert "cache in fp8" in invoke("doctor", "--device", "cpu", "--kv-cache", "fp8", "--keys", 300).out


def test_without_a_compiler(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGBURN_NATIVE", "0")
    build.library.cache_clear()
    try:
        found = ask(invoke)
    finally:
        monkeypatch.delenv("LONGBURN_NATIVE")
        build.library.cache_clear()
    assert found["versions"]["native kernels"] == "none: LONGBURN_NATIVE=0 turns it off"
    assert "native" not in {operation["taken"] for operation in found["operations"].values()}
    assert found["operations"]["experts"]["reasons"]["native"] == "LONGBURN_NATIVE=0 turns it off"


def test_without_triton(environment: dict[str, str]) -> None:
    start = 'import sys; sys.modules["triton"] = None; from longburn.cli.main import run; run()'
    command = [sys.executable, "-c", start, "doctor", "--device", "cpu", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    operations = json.loads(done.stdout)["operations"]
    found = {operation["reasons"]["triton"] for operation in operations.values() if "triton" in operation["reasons"]}
    assert found == {"needs the package triton"}
    assert all(operation["taken"] for operation in operations.values())


def test_what_cannot_be_asked_does_not_stop_the_rest(invoke) -> None:
    found = ask(invoke, "--head-dim", 63)
    assert "could not be asked: " in found["operations"]["attend"]["error"]
    assert found["operations"]["experts"]["reasons"]["reference"] is None
    assert "could not be asked: " in invoke("doctor", "--device", "cpu", "--head-dim", 63).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--queries", 9, "--keys", 8), "9 queries of 8 keys"),
        (("--heads", 9, "--kv-heads", 2), "9 heads on 2 kv heads"),
        (("--dim", 100), "dim 100: wanted a multiple of 32"),
        (("--experts", 2, "--experts-per-token", 3), "3 of 2 experts"),
        (("--sink-tokens", 3), "sink tokens without --window"),
        (("--dtype", "int8"), "int8"),
    ],
)
def test_wrong_usage(invoke, arguments: tuple[object, ...], message: str) -> None:
    outcome = invoke("doctor", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_device_that_is_not_there(invoke) -> None:
    outcome = invoke("doctor", "--device", "cuda:99")
    assert (outcome.code, outcome.out) == (1, "")
    assert "--device cuda:99: this PyTorch" in outcome.err
    outcome = invoke("doctor", "--device", "nope")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--device 'nope': wanted auto, cpu, cuda or cuda:N" in outcome.err
