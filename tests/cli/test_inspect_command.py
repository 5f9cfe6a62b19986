"""`longburn inspect`: what it prints. What it finds is tests/models/test_inspection.py."""

import json
import shutil
from pathlib import Path

from longburn.weights import CheckpointError, locate

ORIGINAL = Path(__file__).parent.parent / "models" / "data" / "gpt_oss_tiny_original"


def test_a_sound_checkpoint(invoke) -> None:
    outcome = invoke("inspect", ORIGINAL)
    assert (outcome.code, outcome.err) == (0, "")
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert lines[0] == f"{ORIGINAL}: GPT-OSS, OpenAI's format, MXFP4 experts"
    assert "layer_types: sliding_attention, full_attention, ... (4 in all)" in lines
    assert "rope.scaling.factor: 32" in lines
    assert "block.{0..3}.mlp.mlp1_weight.blocks [8, 128, 3, 16] U8 4 192 KiB" in lines
    assert "63 tensors, 1.17 MiB (1,226,336 bytes), 1,046,320 parameters" in lines
    assert lines[-1] == "would load: every tensor is there, whole and in shape"


def test_json_has_every_tensor(invoke) -> None:
    outcome = invoke("inspect", ORIGINAL, "--json")
    found = json.loads(outcome.out)
    assert (outcome.code, found["problems"], found["parameters"]) == (0, [], 1_046_320)
    assert len(found["tensors"]) == 63
    assert sum(tensor["nbytes"] for tensor in found["tensors"]) == found["bytes"]
    assert {"name": "norm.scale", "shape": [96], "kind": "BF16", "nbytes": 192} in found["tensors"]


def test_what_would_not_load_fails(invoke, tmp_path: Path) -> None:
    shutil.copytree(ORIGINAL, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    outcome = invoke("inspect", tmp_path / "model")
    assert outcome.code == 1
    assert "would not load: 1 problem\n  damaged: " in outcome.out
    assert json.loads(invoke("inspect", tmp_path / "model", "--json").out)["problems"]


def test_a_llama(invoke, tiny: str) -> None:
    outcome = invoke("inspect", tiny)
    assert outcome.code == 0
    assert "Llama, Hugging Face's format" in outcome.out


def test_nothing_there(invoke) -> None:
    outcome = invoke("inspect", "no-such-model")
    assert (outcome.code, outcome.out) == (1, "")
    assert "no model 'no-such-model'" in outcome.err
    assert invoke("inspect").code == 2


def test_a_gguf_file_by_name(invoke) -> None:
    try:
        path = locate("smollm2")
    except (CheckpointError, RuntimeError):
        assert "longburn models get" in invoke("models").out
        return
    outcome = invoke("inspect", "smollm2")
    assert outcome.code == 0
    assert outcome.out.startswith(f"{path}: Llama, GGUF\n")
    assert "Q4_1" in outcome.out
