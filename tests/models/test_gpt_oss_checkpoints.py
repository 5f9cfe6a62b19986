"""GPT-OSS through files: both formats, packed and dense, shards, wrong names, damage, memory."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_oss_peer import peer, save, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from longburn import AttnWindow
from longburn.kernels.mxfp4 import Mxfp4, dequantize, quantize
from longburn.models import load_model
from longburn.models.gpt_oss import GptOss, GptOssConfig, hf_rules, original_rules
from longburn.weights import CheckpointError, CheckpointMismatch, save_checkpoint

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "gpt_oss_tiny_original"
PACKED = ("mlp1_weight", "mlp2_weight")
Write = Callable[[dict[str, Tensor], Any], Path]


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(DATA / "gpt_oss_tiny_expected.safetensors")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "model.safetensors")


def settings(directory: Path = GOLDEN) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


CONFIG = GptOssConfig.from_config(settings())


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A directory with these tensors in one file."""

    def make(content: dict[str, Tensor], config: Any) -> Path:
        directory = tmp_path / f"checkpoint{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


def check_logits(model: GptOss, expected: dict[str, Tensor], atol: float = 2e-4) -> None:
    with torch.no_grad():
        got = model(expected["tokens"].long())
    torch.testing.assert_close(got, expected["logits_fp32"], atol=atol, rtol=0)


def load(path: Path, **settings: Any) -> GptOss:
    return GptOss.from_checkpoint(path, **{"dtype": torch.float32} | settings)


def storage(model: GptOss) -> str:
    return "mxfp4" if any(name.endswith("blocks") for name in model.state_dict()) else "dense"


TOP_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn.norm.scale": "input_layernorm.weight",
    "attn.sinks": "self_attn.sinks",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.mlp1_weight.blocks": "mlp.experts.gate_up_proj_blocks",
    "mlp.mlp1_weight.scales": "mlp.experts.gate_up_proj_scales",
    "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.mlp2_weight.blocks": "mlp.experts.down_proj_blocks",
    "mlp.mlp2_weight.scales": "mlp.experts.down_proj_scales",
    "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
}


def hf_names(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """The golden checkpoint in Hugging Face's names, by hand."""
    out = {theirs: golden[name] for name, theirs in TOP_NAMES.items()}
    for i in range(4):
        block, layer = f"block.{i}.", f"model.layers.{i}."
        out |= {layer + theirs: golden[block + name] for name, theirs in LAYER_NAMES.items()}
        for kind in ("weight", "bias"):
            parts = golden[f"{block}attn.qkv.{kind}"].split([12 * 32, 4 * 32, 4 * 32])
            out |= {f"{layer}self_attn.{p}_proj.{kind}": part for p, part in zip("qkv", parts, strict=True)}
    assert len(out) == 4 * 19 + 3
    return out


def dense_hf(content: dict[str, Tensor], suffix: str = "") -> dict[str, Tensor]:
    """Experts dense and transposed, as bf16 re-uploads have them; the suffix is a wrong one."""
    out = {name: tensor for name, tensor in content.items() if not name.endswith(("_blocks", "_scales"))}
    for name, blocks in content.items():
        if name.endswith("_blocks"):
            weight = Mxfp4(blocks, content[name.replace("_blocks", "_scales")])
            out[name.removesuffix("_blocks") + suffix] = dequantize(weight, torch.bfloat16).mT
    return out


# --- formats and storages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["mxfp4", "dense", None])
@pytest.mark.parametrize("form", ["original", "hf", "hf dense", "hf mislabelled"])
def test_every_format_gives_the_same_logits(
    golden: dict[str, Tensor], expected: dict[str, Tensor], write: Write, form: str, experts: Any
) -> None:
    content = hf_names(golden)
    config = CONFIG.to_hf()
    path = {
        "original": lambda: write(golden, settings()),
        "hf": lambda: write(content, config),
        "hf dense": lambda: write(dense_hf(content), config),
        "hf mislabelled": lambda: write(dense_hf(content, "_blocks"), config),
    }[form]()
    model = load(path, experts=experts)
    assert storage(model) == experts or (
        experts is None and storage(model) == ("mxfp4" if " " not in form else "dense")
    )
    check_logits(model, expected)


def test_mxfp4_bytes_are_kept_as_they_are(golden: dict[str, Tensor]) -> None:
    state = load(GOLDEN).state_dict()
    for i in range(4):
        for theirs, ours in zip(PACKED, ("gate_up", "down"), strict=True):
            for half in ("blocks", "scales"):
                stored = golden[f"block.{i}.mlp.{theirs}.{half}"]
                assert torch.equal(state[f"layers.{i}.mlp.experts.{ours}.{half}"], stored)


@pytest.mark.parametrize("form", ["original", "hf"])
def test_saved_as_it_was(golden: dict[str, Tensor], write: Write, tmp_path: Path, form: str) -> None:
    """Both formats, byte for byte."""
    content = golden if form == "original" else hf_names(golden)
    config = settings() if form == "original" else CONFIG.to_hf()
    model = load(write(content, config), dtype=torch.bfloat16)
    rules = (original_rules if form == "original" else hf_rules)(CONFIG, "mxfp4")
    save_checkpoint(model, tmp_path / "again.safetensors", rules)
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == content.keys()
    assert all(torch.equal(again[name], content[name]) for name in content)


def test_one_format_is_written_as_the_other(golden: dict[str, Tensor], tmp_path: Path) -> None:
    for storage, wanted in (("mxfp4", hf_names(golden)), ("dense", dense_hf(hf_names(golden)))):
        model = load(GOLDEN, dtype=torch.bfloat16, experts=storage)
        save_checkpoint(model, tmp_path / f"{storage}.safetensors", hf_rules(CONFIG, storage))  # type: ignore[arg-type]
        got = load_file(tmp_path / f"{storage}.safetensors")
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_transformers_reads_what_is_written(
    golden: dict[str, Tensor], expected: dict[str, Tensor], tmp_path: Path, experts: Any
) -> None:
    from transformers import GptOssForCausalLM, Mxfp4Config

    model = load(GOLDEN, dtype=torch.bfloat16, experts=experts)
    save_checkpoint(model, tmp_path / "model.safetensors", hf_rules(CONFIG, experts))
    packed = {"quantization_config": {"quant_method": "mxfp4"}} if experts == "mxfp4" else {}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf() | packed))
    how = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    theirs, report = GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True, **how)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        got = theirs(expected["tokens"].long()).logits
    torch.testing.assert_close(got, expected["logits_fp32"], atol=2e-4, rtol=0)


def test_packing_dense_experts_rounds_them_to_mxfp4(tmp_path: Path) -> None:
    theirs = peer()
    model = load(save(theirs, tmp_path), experts="mxfp4")
    for ours, layer in zip(model.layers, theirs.model.layers, strict=True):
        experts, wanted = ours.mlp.experts, layer.mlp.experts
        for weight, dense in ((experts.gate_up, wanted.gate_up_proj), (experts.down, wanted.down_proj)):
            packed = quantize(dense.detach().mT.to(torch.float32))
            assert torch.equal(weight.blocks, packed.blocks)
            assert torch.equal(weight.scales, packed.scales)
        with torch.no_grad():
            wanted.gate_up_proj.copy_(dequantize(experts.gate_up.value, torch.float32).mT)
            wanted.down_proj.copy_(dequantize(experts.down.value, torch.float32).mT)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, atol=2e-4, rtol=0)


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [True, False])
def test_shards(golden: dict[str, Tensor], expected: dict[str, Tensor], tmp_path: Path, indexed: bool) -> None:
    """Blocks and scales of one weight may lie in different files."""
    names = sorted(golden, key=lambda name: hash(name) % 7)
    shards = {f"model-0000{i}-of-00002.safetensors": names[i::3] for i in range(3)}
    for shard, held in shards.items():
        save_file({name: golden[name] for name in held}, tmp_path / shard)
    if indexed:
        weight_map = {name: shard for shard, held in shards.items() for name in held}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        save_file({"stray": torch.zeros(1)}, tmp_path / "stray.safetensors")  # the index does not name it
    shutil.copy(GOLDEN / "config.json", tmp_path)
    for experts in ("mxfp4", "dense"):
        check_logits(load(tmp_path, experts=experts), expected)


def test_progress_rises_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    GptOss.from_checkpoint(GOLDEN, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {seen[-1][0]}


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_one_error_lists_missing_surplus_misshapen_and_cut_off(
    golden: dict[str, Tensor], tmp_path: Path, experts: Any
) -> None:
    content = dict(golden)
    del content["block.1.attn.sinks"], content["block.2.mlp.mlp2_weight.scales"]
    content["block.0.attn.q_norm"] = torch.ones(3)
    content["block.4.attn.sinks"] = torch.ones(12)
    content["block.3.mlp.gate.bias"] = torch.ones(9)
    content["block.3.mlp.mlp1_weight.blocks"] = golden["block.3.mlp.mlp1_weight.blocks"][:, :, :2].contiguous()
    save_file({"norm.scale": content.pop("norm.scale")}, tmp_path / "b.safetensors")
    save_file(content, tmp_path / "a.safetensors")
    short = (tmp_path / "b.safetensors").read_bytes()[:-1]
    (tmp_path / "b.safetensors").write_bytes(short)
    shutil.copy(GOLDEN / "config.json", tmp_path)
    with pytest.raises(CheckpointMismatch) as caught:
        load(tmp_path, experts=experts)
    error = caught.value
    assert any(
        line.startswith("layers.1.attention.sinks [12]: wanted from block.1.attn.sinks") for line in error.missing
    )
    assert any("block.2.mlp.mlp2_weight" in line for line in error.missing)
    assert any(line.startswith("block.0.attn.q_norm [3]: no rule names it") for line in error.unused)
    assert any(line.startswith("block.4.attn.sinks [12]: the model has no layers.4") for line in error.unused)
    assert any(line.startswith("block.3.mlp.gate.bias [9]") for line in error.misshapen)
    assert any(line.startswith("block.3.mlp.mlp1_weight") for line in error.misshapen)
    (damage,) = error.damaged
    assert damage.startswith("norm.scale [96]: cut off: b.safetensors ends at byte")
    for line in (*error.missing, *error.unused, *error.misshapen, *error.damaged):
        assert line in str(error)


def test_packed_experts_that_are_cut_off_are_named_also_when_they_are_to_be_dense(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / "model.safetensors").read_bytes()[:-300_000])
    for experts in ("mxfp4", "dense"):
        with pytest.raises(CheckpointMismatch, match=r"damaged: .*mlp[12]_weight.* cut off: model.safetensors ends at"):
            load(tmp_path, experts=experts)


def test_values_that_are_not_numbers(golden: dict[str, Tensor], write: Write) -> None:
    nan = golden["block.1.attn.sinks"].clone()
    nan[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"block.1.attn.sinks has 1 values that are not finite"):
        load(write(golden | {"block.1.attn.sinks": nan}, settings()))
    scales = golden["block.2.mlp.mlp1_weight.scales"].clone()
    scales[1, 2, 0] = 255
    path = write(golden | {"block.2.mlp.mlp1_weight.scales": scales}, settings())
    with pytest.raises(
        CheckpointError, match=r"layers.2.mlp.experts.gate_up .*scales that .* NaN|scales that stand for"
    ):
        load(path)
    with pytest.raises(CheckpointError, match=r"block.2.mlp.mlp1_weight has 32 values that are not finite"):
        load(path, experts="dense")


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config.json"):
        load(tmp_path)


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from longburn.models.gpt_oss import GptOss

def high() -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10

torch.ones(8, dtype=torch.bfloat16).float().sum()
before = high()
model = GptOss.from_checkpoint(sys.argv[1], experts=sys.argv[2])
print(high() - before, sum(tensor.nbytes for tensor in model.state_dict().values()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 MB, most of it experts, in six layers; dense it is 730 MB, in tensors too large for malloc to keep."""
    config = GptOssConfig.from_config(
        settings()
        | {"num_hidden_layers": 6, "vocab_size": 30000, "hidden_size": 512, "intermediate_size": 1152}
        | {"num_experts": 32, "head_dim": 64}
    )
    directory = tmp_path_factory.mktemp("large")
    model = GptOss(config, experts="mxfp4", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save_checkpoint(model, directory / "model.safetensors", original_rules(config, "mxfp4"))
    (directory / "config.json").write_text(json.dumps(config.to_original()))
    assert (directory / "model.safetensors").stat().st_size > 200e6
    return directory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_peak_memory_is_what_is_placed_and_one_tensor(large: Path, experts: str) -> None:
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), experts], capture_output=True, text=True, check=True
    )
    peak, placed = (int(number) for number in out.stdout.split())
    largest = {"mxfp4": 30000 * 512 * 2, "dense": 32 * 2304 * 512 * 2}[experts]  # embedding; gate and up of a layer
    assert peak <= placed + largest + 16e6, (peak / 1e6, placed / 1e6)  # 16 MB: code that is loaded meanwhile


# --- by name ----------------------------------------------------------------------------------------------------------


def test_load_model_by_directory(golden: dict[str, Tensor], expected: dict[str, Tensor], write: Write) -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    directory = write(golden, settings())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.save(str(directory / "tokenizer.json"))
    loaded = load_model(directory)
    assert isinstance(loaded.model, GptOss)
    check_logits(loaded.model, expected)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("window")) == "window"
    windowed = load_model(directory, window=AttnWindow(20, sink_tokens=2, relative_sinks=True)).model
    assert [layer.slots for layer in windowed.init_cache(1)] == [16, 22, 16, 22]
