"""Qwen3 against transformers: random weights, streamed in any chunks, through files and the commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from longburn.models import load_model
from longburn.models.family import read_family
from longburn.models.inspection import inspect_checkpoint
from longburn.models.llama import hf_rules
from longburn.models.planning import Sizes, plan_memory
from longburn.models.qwen3 import Qwen3, Qwen3Config
from longburn.weights import CheckpointMismatch, save_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 40,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
LENGTH = 61
Made = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Made:
    from transformers import Qwen3Config as TheirConfig
    from transformers import Qwen3ForCausalLM

    def make(**settings: Any) -> tuple[Path, Any]:
        directory = tmp_path_factory.mktemp("qwen3")
        torch.manual_seed(3)
        theirs = Qwen3ForCausalLM(TheirConfig(**SIZES | settings)).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                norm = "norm" in name
                parameter.normal_(1.0 if norm else 0.0, 0.1 if norm else 0.2)
        theirs.save_pretrained(directory)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.save(str(directory / "tokenizer.json"))
        return directory, theirs

    return make


def ids() -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False, "attention_bias": True}, {"head_dim": 24}])
def test_logits_equal_those_of_transformers(write: Made, settings: dict[str, Any]) -> None:
    """In fp64, where what is left is transformers' own fp32 in angles and norms; then in fp32, streamed in chunks."""
    directory, theirs = write(**settings)
    model = load_model(directory).model
    assert isinstance(model, Qwen3)
    with torch.no_grad():
        own = theirs(ids()).logits
        exact = theirs.double()(ids()).logits
        assert exact.std() > 1
        torch.testing.assert_close(load_model(directory, dtype=torch.float64).model(ids()), exact, atol=1e-5, rtol=0)
        rounding = 2 * (own - exact).abs().max().item()
        assert rounding < 1e-4
        torch.testing.assert_close(model(ids()).double(), exact, atol=rounding, rtol=0)
        for chunks in ([LENGTH], [1] * LENGTH, [40, 1, 1, 19], [7, 54]):
            cache = model.init_cache(2)
            parts = [model.forward_logits(c, cache, all_positions=True) for c in ids().split(chunks, 1)]
            torch.testing.assert_close(torch.cat(parts, 1).double(), exact, atol=rounding, rtol=0)


def test_saved_and_loaded_again_by_transformers(write: Made, tmp_path: Path) -> None:
    from transformers import Qwen3ForCausalLM

    directory, theirs = write()
    model = load_model(directory).model
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    save_checkpoint(model, tmp_path / "model.safetensors", hf_rules(model.config))
    again, report = Qwen3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, a), b in zip(theirs.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_inspection_and_plan_know_it(write: Made, tmp_path: Path) -> None:
    directory, theirs = write()
    found = inspect_checkpoint(directory)
    assert found.architecture == "Qwen3, Hugging Face's format"
    assert found.problems == ()
    assert found.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    config = read_family(json.loads((directory / "config.json").read_text()))
    assert sum(plan_memory(Sizes.of(config), 100, itemsize=4).weights.values()) == 4 * found.parameters
    from safetensors.torch import load_file, save_file

    held = load_file(directory / "model.safetensors")
    del held["model.layers.2.self_attn.k_norm.weight"]
    save_file(held, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((directory / name).read_text())
    (problem,) = inspect_checkpoint(tmp_path).problems
    assert problem.startswith("missing: ")
    assert "k_norm" in problem
    with pytest.raises(CheckpointMismatch, match="k_norm"):
        load_model(tmp_path)


def test_the_commands_take_it(write: Made, capsys: pytest.CaptureFixture[str]) -> None:
    from longburn.cli.main import execute

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert execute(arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    directory, theirs = write()
    sampling = ("--max-new-tokens", "4", "--temperature", "0", "--json")
    text = json.loads(run("generate", "--model", str(directory), "--raw", "--prompt", "hello", *sampling))["text"]
    tokenizer = load_model(directory).tokenizer
    tokens = torch.tensor([tokenizer.encode("hello")])
    with torch.no_grad():
        for _ in range(4):
            tokens = torch.cat([tokens, theirs(tokens).logits[:, -1:].argmax(-1)], 1)
    assert text == tokenizer.decode(tokens[0, 5:].tolist())
    assert run("inspect", str(directory)).startswith(f"{directory}: Qwen3")
    assert "weights" in run("plan", str(directory), "--context", "100")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, r"model_type is 'qwen2', wanted 'llama', 'qwen3' or 'gpt_oss'"),
        ({"model_type": ["qwen3"]}, r"model_type is \['qwen3'\], wanted"),
        ({"hidden_act": "gelu"}, r"Qwen3Config: hidden_act is 'gelu', wanted 'silu'"),
        ({"vocab_size": 0}, r"Qwen3Config: vocab_size is 0, wanted a number above 0"),
        ({"use_sliding_window": True}, r"Qwen3Config: layers with a window"),
    ],
)
def test_a_configuration_that_is_not_known(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_family(SIZES | {"model_type": "qwen3"} | change)


def test_head_dim_is_128_where_none_is_stated() -> None:
    stated = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"model_type": "qwen3"}
    assert read_family(stated).head_dim == 128
    assert isinstance(read_family(stated), Qwen3Config)
