"""Converting GPT-OSS checkpoints: the same bytes after every way there and back, and never half a checkpoint."""

import json
import shutil
from itertools import permutations
from pathlib import Path

import gpt_oss_peer
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

from longburn.kernels.mxfp4 import Mxfp4, dequantize, is_canonical
from longburn.models.gpt_oss import GptOss
from longburn.models.gpt_oss.convert import SCALES, convert_checkpoint
from longburn.weights import CheckpointError, CheckpointMismatch, SafetensorsSource

ORIGINAL = Path(__file__).parent / "data" / "gpt_oss_tiny_original"
KINDS = [(format, experts) for format in ("original", "hf") for experts in ("mxfp4", "bf16")]


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    """The same tensors: names, types, shapes, bytes."""
    one, two = tensors(a), tensors(b)
    return one.keys() == two.keys() and all(
        (t.dtype, t.shape) == (two[name].dtype, two[name].shape)
        and torch.equal(t.contiguous().flatten().view(torch.uint8), two[name].contiguous().flatten().view(torch.uint8))
        for name, t in one.items()
    )


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original model with blocks that no usual quantiser writes: small magnitudes, odd scales, minus zero."""
    directory = tmp_path_factory.mktemp("strange")
    shutil.copyfile(ORIGINAL / "config.json", directory / "config.json")
    (directory / "tokenizer.json").write_text("{}")
    held = load_file(ORIGINAL / "model.safetensors")
    blocks = held["block.1.mlp.mlp1_weight.blocks"]
    blocks[0] &= 0xBB  # magnitudes up to 1.5
    blocks[1, ::2] = 0x80  # zeros and minus zeros, under the scales that they have
    save_file(held, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(("first", "second"), list(permutations(KINDS, 2)), ids=str)
def test_there_and_back_gives_the_same_bytes(strange: Path, tmp_path: Path, first: tuple, second: tuple) -> None:
    for directory, came, kind in (("a", strange, first), ("b", tmp_path / "a", second), ("c", tmp_path / "b", first)):
        convert_checkpoint(came, tmp_path / directory, format=kind[0], experts=kind[1])
    assert same(tmp_path / "a", tmp_path / "c")
    convert_checkpoint(tmp_path / "c", tmp_path / "d", format="original", experts="mxfp4")
    assert same(strange, tmp_path / "d")
    assert (tmp_path / "d" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "b" / SCALES).exists() == (second[1] == "bf16")


def test_only_scales_that_values_do_not_tell_are_kept(strange: Path, tmp_path: Path) -> None:
    for source, wanted in ((ORIGINAL, None), (strange, {"layers.1.mlp.experts.gate_up.scales"})):
        convert_checkpoint(source, tmp_path / source.name, experts="bf16")
        kept = tmp_path / source.name / SCALES
        assert (set(SafetensorsSource(kept).tensors) if kept.exists() else None) == wanted
    held = load_file(strange / "model.safetensors")
    halves = (held[f"block.1.mlp.mlp1_weight.{half}"] for half in ("blocks", "scales"))
    assert not is_canonical(Mxfp4(*halves)).all()


def test_kept_scales_are_not_forced_on_weights_that_changed(strange: Path, tmp_path: Path) -> None:
    convert_checkpoint(strange, tmp_path / "dense", experts="bf16")
    held = load_file(tmp_path / "dense" / "model.safetensors")
    name = "block.1.mlp.mlp1_weight"
    held[name] = held[name] * 1.7  # nothing that the old scales could say
    save_file(held, tmp_path / "dense" / "model.safetensors")
    convert_checkpoint(tmp_path / "dense", tmp_path / "packed", experts="mxfp4")
    got = load_file(tmp_path / "packed" / "model.safetensors")
    values = dequantize(Mxfp4(got[f"{name}.blocks"], got[f"{name}.scales"]), torch.float32)
    assert (values - held[name].float()).abs().max() <= 0.25 * held[name].float().abs().max()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_stay(tmp_path: Path, kind: tuple) -> None:
    convert_checkpoint(ORIGINAL, tmp_path / "new", format=kind[0], experts=kind[1], max_shard_size=100_000)
    tokens = torch.arange(40)[None] * 5 % 256
    with torch.no_grad():
        one, two = (
            GptOss.from_checkpoint(p, dtype=torch.float32).forward(tokens) for p in (ORIGINAL, tmp_path / "new")
        )
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
def test_transformers_reads_what_is_written(tmp_path: Path, experts: str) -> None:
    transformers = pytest.importorskip("transformers")
    convert_checkpoint(ORIGINAL, tmp_path / "hf", format="hf", experts=experts, max_shard_size=200_000)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").model_type == "gpt_oss"
    if experts == "mxfp4":
        settings = json.loads((tmp_path / "hf" / "config.json").read_text())
        assert settings["quantization_config"]["quant_method"] == "mxfp4"
        return
    theirs = transformers.GptOssForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.arange(40)[None] * 5 % 256
    with torch.no_grad():
        ours = GptOss.from_checkpoint(ORIGINAL, dtype=torch.float32).forward(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, rtol=0, atol=2e-4)


def test_what_transformers_wrote_becomes_the_original_format(tmp_path: Path) -> None:
    theirs = gpt_oss_peer.peer()
    gpt_oss_peer.save(theirs, tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "original", format="original")
    tokens = gpt_oss_peer.tokens()
    with torch.no_grad():
        ours = GptOss.from_checkpoint(tmp_path / "original", dtype=torch.float32).forward(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, rtol=0, atol=2e-4)


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    convert_checkpoint(ORIGINAL, tmp_path / "hf", format="hf", max_shard_size=150_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    total = 0
    for file in files:
        held = load_file(file)
        sizes = [tensor.nbytes for tensor in held.values()]
        assert sum(sizes) <= 150_000 or len(sizes) == 1
        assert all(index["weight_map"][name] == file.name for name in held)
        total += sum(sizes)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("damage", ["cut", "missing", "nan", "config"])
def test_nothing_is_left_of_a_conversion_that_fails(tmp_path: Path, damage: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(ORIGINAL, source)
    file = source / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "config":
        (source / "config.json").write_text("{}")
    else:
        held = load_file(file)
        if damage == "missing":
            del held["block.2.attn.sinks"]
        else:
            held["block.2.mlp.mlp2_weight.scales"][1, 2, 0] = 255
        save_file(held, file)
    wanted = {"missing": CheckpointMismatch, "nan": CheckpointError}.get(damage, ValueError)
    with pytest.raises(wanted):
        convert_checkpoint(source, tmp_path / "out" / "target", format="hf", experts="bf16")
    assert not (tmp_path / "out" / "target").exists()
    assert list((tmp_path / "out").iterdir() if (tmp_path / "out").exists() else []) == []


def test_an_interrupted_replacement_keeps_the_old_one(tmp_path: Path) -> None:
    convert_checkpoint(ORIGINAL, tmp_path / "target", format="hf")
    before = tensors(tmp_path / "target")

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(ORIGINAL, tmp_path / "target", experts="bf16", replace=True, progress=interrupt)
    assert before.keys() == tensors(tmp_path / "target").keys()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    convert_checkpoint(ORIGINAL, tmp_path / "target", experts="bf16", replace=True)
    assert "block.0.mlp.mlp1_weight" in tensors(tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_is_not_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "model" / "original"
    shutil.copytree(ORIGINAL, source)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_anna.txt").write_text("Dear Anna")
    (tmp_path / "file").write_text("x")
    for target, replace, why in (
        ("model", False, "exists"),
        ("model", True, "holds the source"),
        ("model/original", True, "holds the source"),
        ("letters", True, "not a model directory"),
        ("file", True, "not a model directory"),
    ):
        with pytest.raises(FileExistsError, match=why):
            convert_checkpoint(source, tmp_path / target, format="hf", replace=replace)
    assert (tmp_path / "letters" / "to_anna.txt").read_text() == "Dear Anna"
    assert same(source, ORIGINAL)


def test_sizes_that_cannot_be_packed(tmp_path: Path) -> None:
    theirs = gpt_oss_peer.peer(intermediate_size=40)
    gpt_oss_peer.save(theirs, tmp_path / "hf")
    with pytest.raises(ValueError, match="intermediate_size is 40, wanted a multiple of 32"):
        convert_checkpoint(tmp_path / "hf", tmp_path / "new", experts="mxfp4")
    assert not (tmp_path / "new").exists()
