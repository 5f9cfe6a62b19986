"""What `inspect` finds in a checkpoint is what loading it would say."""

import json
import shutil
from pathlib import Path

import gpt_oss_peer
import pytest
import torch
from safetensors.torch import load_file, save_file

from longburn.models.gpt_oss import GptOss
from longburn.models.gpt_oss.convert import convert_checkpoint
from longburn.models.inspection import StoredTensor, group_tensors, inspect_checkpoint
from longburn.weights import CheckpointError

ORIGINAL = Path(__file__).parent / "data" / "gpt_oss_tiny_original"


def parameters() -> int:
    """Counted from the sizes in the configuration, by hand."""
    dim, hidden, experts, heads, kv, head, layers, vocabulary = 96, 64, 8, 12, 4, 32, 4, 256
    qkv = (heads + 2 * kv) * head
    attention = qkv * dim + qkv + heads * head * dim + dim + heads
    mlp = experts * (2 * hidden * dim + 2 * hidden + hidden * dim + dim) + experts * dim + experts
    return layers * (attention + mlp + 2 * dim) + 2 * vocabulary * dim + dim


@pytest.mark.parametrize("format", ["original", "hf"])
@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
def test_a_sound_checkpoint(tmp_path: Path, format: str, experts: str) -> None:
    convert_checkpoint(ORIGINAL, tmp_path / "new", format=format, experts=experts, max_shard_size=200_000)
    found = inspect_checkpoint(tmp_path / "new")
    assert found.problems == ()
    company, storage = (
        {"original": "OpenAI", "hf": "Hugging Face"}[format],
        {"mxfp4": "MXFP4", "bf16": "dense"}[experts],
    )
    assert found.architecture == f"GPT-OSS, {company}'s format, {storage} experts"
    assert found.parameters == parameters()
    assert found.config["num_experts"] == 8
    assert found.config["rope"]["theta"] == 150000.0
    written = {name: t for file in (tmp_path / "new").glob("*.safetensors") for name, t in load_file(file).items()}
    assert {(t.name, t.shape, t.nbytes) for t in found.tensors} == {
        (name, tuple(t.shape), t.nbytes) for name, t in written.items()
    }
    assert {t.kind for t in found.tensors} == ({"BF16", "U8"} if experts == "mxfp4" else {"BF16"})
    json.dumps(found.config)


def test_problems_are_those_of_loading(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(ORIGINAL, directory)
    held = load_file(directory / "model.safetensors")
    del held["block.1.attn.sinks"]
    held["block.9.attn.sinks"] = torch.zeros(12)
    held["block.2.attn.out.weight"] = torch.zeros(96, 3)
    save_file(held, directory / "model.safetensors")
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-50])
    found = inspect_checkpoint(directory)
    assert sorted(line.split(":")[0] for line in found.problems) == ["damaged", "mis-shaped", "missing", "surplus"]
    with pytest.raises(CheckpointError) as refused:
        GptOss.from_checkpoint(directory)
    told = [line.strip() for line in str(refused.value).splitlines()[1:]]
    assert sorted(told) == sorted(line.replace("surplus", "unused") for line in found.problems)
    assert len(found.tensors) == 63


def test_a_file_without_a_configuration_or_a_known_model(tmp_path: Path) -> None:
    shutil.copyfile(ORIGINAL / "model.safetensors", tmp_path / "model.safetensors")
    found = inspect_checkpoint(tmp_path / "model.safetensors")
    assert found.architecture is None
    assert len(found.tensors) == 63
    assert "no config.json" in found.problems[0]
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert "mamba" in inspect_checkpoint(tmp_path).problems[0]
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in inspect_checkpoint(tmp_path).problems[0]
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    found = inspect_checkpoint(tmp_path)
    assert found.tensors == ()
    assert "not a readable safetensors file" in found.problems[0]


def test_what_transformers_saves_when_it_names_dense_experts_wrongly(tmp_path: Path) -> None:
    gpt_oss_peer.save(gpt_oss_peer.peer(), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    for name in list(held):
        if name.endswith(("gate_up_proj", "down_proj")):
            held[f"{name}_blocks"] = held.pop(name)
    save_file(held, tmp_path / "model.safetensors")
    assert inspect_checkpoint(tmp_path).problems == ()


def test_groups() -> None:
    def stored(name: str, size: int = 2) -> StoredTensor:
        return StoredTensor(name, (size,), "F32", 4 * size)

    names = [
        "a.weight",
        *(f"layers.{n}.b" for n in (0, 1, 2, 5, 10)),
        *(f"l.{n}.e.{m}.w" for n in (3, 4) for m in (0, 1)),
    ]
    found = group_tensors([*map(stored, names), stored("layers.3.b", 7), stored("x.{}.{0}.y")])
    assert [(g.name, g.copies, g.nbytes) for g in found] == [
        ("a.weight", 1, 8),
        ("layers.{0..2,5,10}.b", 5, 40),
        ("l.{3..4}.e.{0..1}.w", 4, 32),
        ("layers.3.b", 1, 28),
        ("x.{}.{0}.y", 1, 8),
    ]
