"""The checkpoint of random weights: what is written is what the loader reads, and the model that it makes is sane."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import synthetic_gpt_oss as synthetic
from longburn.kernels.mxfp4 import Mxfp4, dequantize
from longburn.models.gpt_oss import GptOss, GptOssConfig, original_rules
from longburn.weights import in_our_names

SMALL = replace(
    GptOssConfig.gpt_oss_20b(),
    num_hidden_layers=3,
    layer_types=None,
    hidden_size=96,
    intermediate_size=64,
    num_attention_heads=6,
    num_key_value_heads=2,
    num_experts=8,
    vocab_size=300,
    sliding_window=16,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("synthetic") / "model"
    size = synthetic.write(target, SMALL, seed=5)
    assert size == sum(tensor.nbytes for tensor in load_file(target / "model.safetensors").values())
    return target


def test_it_loads_and_every_tensor_is_what_was_drawn(written: Path) -> None:
    model = GptOss.from_checkpoint(written)
    assert model.config == SMALL
    with torch.device("meta"):
        empty = GptOss(SMALL, experts="mxfp4", dtype=torch.bfloat16)
    drawn = in_our_names(synthetic.source(SMALL, 5), empty, original_rules(SMALL, "mxfp4"))
    loaded = model.state_dict()
    assert loaded.keys() == drawn.tensors.keys()
    assert {name for name in loaded if name.endswith("blocks")} == {
        f"layers.{i}.mlp.experts.{half}.blocks" for i in range(3) for half in ("gate_up", "down")
    }
    for name, tensor in loaded.items():
        assert torch.equal(tensor, drawn.read(name)), name


def test_names_are_those_of_the_published_format(written: Path) -> None:
    published = Path(__file__).parents[1] / "models" / "data" / "gpt_oss_tiny_original" / "model.safetensors"
    ours, theirs = load_file(written / "model.safetensors"), load_file(published)
    assert set(ours) == {name for name in theirs if not name.startswith("block.3.")}
    assert all(ours[name].dtype == theirs[name].dtype and ours[name].ndim == theirs[name].ndim for name in ours)


def test_numbers_are_spread_as_they_should_be(written: Path) -> None:
    tensors = load_file(written / "model.safetensors")
    for i in range(3):
        for weight, size in (("mlp1_weight", 96), ("mlp2_weight", 64)):
            blocks, scales = (tensors[f"block.{i}.mlp.{weight}.{half}"] for half in ("blocks", "scales"))
            assert len(blocks.unique()) == 256
            assert len(scales.unique()) == synthetic.SCALES
            assert scales.max() < 255
            values = dequantize(Mxfp4(blocks, scales), torch.float32)
            wanted = synthetic.BRANCH if weight == "mlp2_weight" else 1.0
            assert 0.6 < values.square().mean().sqrt() * size**0.5 / wanted < 1.5
    embedding = tensors["embedding.weight"].float()
    assert embedding.mean().abs() < 0.03
    assert (embedding.std() - 1).abs() < 0.03
    assert (tensors["norm.scale"].float().mean() - 1).abs() < 0.1
    assert (tensors["block.0.attn.qkv.weight"].float().std() * 96**0.5 - 1).abs() < 0.05
    assert not torch.equal(tensors["block.0.attn.qkv.weight"], tensors["block.1.attn.qkv.weight"])


@torch.no_grad()
def test_activations_stay_sane(written: Path) -> None:
    model = GptOss.from_checkpoint(written, dtype=torch.float32)
    sizes: list[float] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: sizes.append(float(out.square().mean().sqrt())))
    logits = model(torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0)))
    assert all(0.7 < size < 1.5 for size in sizes)
    assert 0.3 < logits.std() < 3


def test_seed_and_nothing_else_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "embedding.weight"
    first = synthetic.source(SMALL, 5).read(name)
    monkeypatch.setattr(synthetic, "THREADS", 1)
    assert torch.equal(synthetic.source(SMALL, 5).read(name), first)
    assert not torch.equal(synthetic.source(SMALL, 6).read(name), first)


def test_pieces_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "PIECE", 1000)
    values = synthetic.source(SMALL, 5).read("embedding.weight").flatten()
    assert not torch.equal(values[:1000], values[1000:2000])
    assert (values[-(values.numel() % 1000) :] != 0).any()


def test_nothing_is_overwritten_unasked(written: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    shutil.copytree(written, target)
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"copy holds config\.json and model\.safetensors already"):
        synthetic.write(target, SMALL, seed=6)
    (target / "config.json").unlink()
    with pytest.raises(FileExistsError, match=r"copy holds model\.safetensors already"):
        synthetic.write(target, SMALL, seed=6)
    assert (target / "model.safetensors").read_bytes() == before
    synthetic.write(target, SMALL, seed=6, force=True)
    assert (target / "model.safetensors").read_bytes() != before
    assert GptOss.from_checkpoint(target).config == SMALL


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(OSError, match=r"takes [\d,]+ bytes, the disk has 1 left"):
        synthetic.write(tmp_path / "x", SMALL)
    assert list((tmp_path / "x").iterdir()) == []


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    size = synthetic.write(tmp_path / "x", SMALL, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
