"""The Llama family against transformers: random weights, every setting of the configuration, through files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from longburn import AttnWindow, RotaryEncoding, WindowPolicy
from longburn.models import load_model
from longburn.models.llama import Llama, LlamaConfig, hf_rules
from longburn.weights import CheckpointError, CheckpointMismatch, SafetensorsSource, load_checkpoint, save_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,  # logits of some units: the default's would be too small to prove anything
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SETTINGS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa": {"num_key_value_heads": 1},
    "head_dim_of_its_own": {"head_dim": 20},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention_bias": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}},
    "yarn_attention_factor": {"rope_parameters": YARN | {"attention_factor": 1.3}},
    "yarn_tied_biases": {"rope_parameters": YARN, "tie_word_embeddings": True, "attention_bias": True, "head_dim": 10},
}
LENGTH = 90  # beyond the trained context, and beyond the one that the scalings stretch

Made = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model of transformers with random weights (norms and biases too), saved by it into a directory."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    def make(**settings: Any) -> tuple[Path, Any]:
        directory = tmp_path_factory.mktemp("model")
        torch.manual_seed(1)
        theirs = LlamaForCausalLM(TheirConfig(**SIZES | settings)).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.dim() == 1:
                    parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
        theirs.save_pretrained(directory)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        bytes_only = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
        bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bytes_only.decoder = decoders.ByteLevel()
        bytes_only.save(str(directory / "tokenizer.json"))
        return directory, theirs

    return make


def ids(batch: int = 2) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (batch, LENGTH), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_logits_equal_those_of_transformers(write: Made, settings: dict[str, Any]) -> None:
    directory, theirs = write(**settings)
    loaded = load_model(directory)
    with torch.no_grad():
        wanted = theirs(ids()).logits
        assert wanted.std() > 0.3
        got = loaded.model(ids())
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
        cache = loaded.model.init_cache(2)
        chunks = ids().split([50, 1, 1, 17, 21], 1)
        parts = [loaded.model.forward_logits(chunk, cache, all_positions=True) for chunk in chunks]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-4, rtol=0)
    assert cache.position == LENGTH


@pytest.mark.parametrize("size", [1, 9])
def test_windows_equal_a_masked_transformers_model(write: Made, size: int) -> None:
    """transformers' Llama has no window, but takes a mask: the same law, drawn by hand."""
    directory, theirs = write()
    at = torch.arange(LENGTH)
    for sinks in (0, 3):
        seen = (at[None] <= at[:, None]) & ((at[:, None] - at[None] < size) | (at[None] < sinks))
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None].expand(2, 1, -1, -1)
        loaded = load_model(directory, window=AttnWindow(size, sink_tokens=sinks))
        with torch.no_grad():
            wanted = theirs(ids(), attention_mask=mask).logits
            torch.testing.assert_close(loaded.model(ids()), wanted, atol=1e-4, rtol=0)
            cache = loaded.model.init_cache(2)
            parts = [loaded.model.forward_logits(c, cache, all_positions=True) for c in ids().split(13, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-4, rtol=0)
        assert [layer.slots for layer in cache] == [size + sinks] * 3


def test_a_policy_gives_every_layer_its_window(write: Made) -> None:
    directory, _ = write()
    config = LlamaConfig.from_hf(json.loads((directory / "config.json").read_text()))
    policy = WindowPolicy.every_other(8, full_on_even=False)
    model = Llama(config, policy=policy)
    load_checkpoint(model, SafetensorsSource(directory), hf_rules(config))
    assert [attention.window.size for attention in model.attentions] == [8, None, 8]
    with torch.no_grad():
        full = model(ids(1))
        cache = model.init_cache(1)
        parts = [model.forward_logits(chunk, cache, all_positions=True) for chunk in ids(1).split(11, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-4, rtol=0)


def test_last_positions_of_ragged_rows(write: Made) -> None:
    """One row of logits for each row's last token, wherever it stands."""
    directory, theirs = write()
    model = load_model(directory).model
    tokens = torch.full((3, 7), -1)
    rows = [ids()[0, :7], ids()[1, :3], ids()[0, 20:24]]
    tokens[0], tokens[1, :3], tokens[2, 3:] = rows
    cache = model.init_cache(3)
    with torch.no_grad():
        got = model.forward_logits(tokens, cache)
        for b, row in enumerate(rows):
            torch.testing.assert_close(got[b], theirs(row[None]).logits[0, -1], atol=1e-4, rtol=0)
    assert cache.row_positions == (7, 3, 4)


def test_commit_false_leaves_the_clock(write: Made) -> None:
    directory, theirs = write()
    model = load_model(directory).model
    cache = model.init_cache(2)
    with torch.no_grad():
        model.forward_logits(ids()[:, :9], cache)
        for _ in range(2):
            model.forward_logits(ids()[:, 40:44], cache, commit=False)
            assert cache.position == 9
        got = model.forward_logits(ids()[:, 9:12], cache, all_positions=True)
        torch.testing.assert_close(got, theirs(ids()[:, :12]).logits[:, 9:], atol=1e-4, rtol=0)


def test_saved_and_loaded_again_by_transformers(write: Made, tmp_path: Path) -> None:
    """The rules work both ways: what we save, transformers loads, with nothing missing and nothing left over."""
    from transformers import LlamaForCausalLM

    for settings in ({}, SETTINGS["yarn_tied_biases"] | {"mlp_bias": True}):
        directory, theirs = write(**settings)
        model = load_model(directory).model
        (tmp_path / "config.json").write_text((directory / "config.json").read_text())
        save_checkpoint(model, tmp_path / "model.safetensors", hf_rules(model.config))
        again, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for (name, a), b in zip(theirs.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(write: Made, dtype: torch.dtype) -> None:
    """bf16 within its rounding of fp32, compared with what transformers itself loses; fp64 all the way down."""
    directory, theirs = write()
    model = load_model(directory, dtype=dtype).model
    cache = model.init_cache(2)
    assert cache[0].memory[0].dtype == dtype
    with torch.no_grad():
        exact = theirs.double()(ids()).logits
        got = model.forward_logits(ids(), cache, all_positions=True)
        assert got.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(got, exact, atol=1e-5, rtol=0)  # transformers' angles and norms are fp32
        else:
            plain = theirs.to(torch.bfloat16)(ids()).logits
            assert (got.double() - exact).abs().mean() <= 1.1 * (plain.double() - exact).abs().mean()


def test_training_reaches_every_parameter(write: Made) -> None:
    """Gradients of the full forward equal those of transformers, through the fused projections too."""
    directory, theirs = write(attention_bias=True)
    model = load_model(directory).model
    tokens = ids()[:, :20]
    for logits in (model(tokens), theirs(tokens).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    own = theirs.model.layers[1].self_attn
    wanted = torch.cat([own.q_proj.weight.grad, own.k_proj.weight.grad, own.v_proj.weight.grad])
    torch.testing.assert_close(model.layers[1].attention.qkv.weight.grad, wanted, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(model.embed.weight.grad, theirs.model.embed_tokens.weight.grad, atol=1e-6, rtol=1e-3)
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- what is refused -------------------------------------------------------------------------------------------------


CONFIG = SIZES | {"model_type": "llama"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, r"model_type is 'mistral', wanted 'llama'"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu', wanted 'silu'"),
        ({"hidden_size": None}, r"the configuration has no 'hidden_size'"),
        ({"vocab_size": None}, r"the configuration has no 'vocab_size'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_medium": 3}}, r"beta_medium"),
        ({"rope_scaling": {"rope_type": "wavelet"}}, r"wavelet"),
    ],
)
def test_a_configuration_that_is_not_known(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf({key: value for key, value in (CONFIG | change).items() if value is not None})


@pytest.mark.parametrize(
    ("change", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": None, "rope_scaling": None}, 10000.0),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000.0),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
    ],
)
def test_the_base_of_rope_has_llamas_default(change: dict[str, Any], theta: float) -> None:
    """The first Llamas' files do not state it; transformers fills in the same number."""
    from transformers import LlamaConfig as TheirConfig

    assert LlamaConfig.from_hf(CONFIG | change).rope.theta == theta
    given = {key: value for key, value in (SIZES | change).items() if value is not None}
    assert TheirConfig(**given).rope_parameters["rope_theta"] == theta


GGUF = {
    "general.architecture": "llama",
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.embedding_length": 48,
    "llama.feed_forward_length": 80,
    "llama.block_count": 3,
    "llama.context_length": 64,
    "llama.vocab_size": 256,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def test_a_configuration_of_a_gguf_file() -> None:
    config = LlamaConfig.from_gguf(GGUF | {"llama.rope.freq_base": 1e5, "llama.rope.dimension_count": 8}, tied=True)
    assert (config.head_dim, config.num_key_value_heads, config.tie_word_embeddings) == (8, 2, True)
    assert config.rope == RotaryEncoding(8, theta=1e5)
    stretched = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    assert LlamaConfig.from_gguf(GGUF | stretched, tied=False).rope.scaling.original_context == 64
    with pytest.raises(ValueError, match=r"general.architecture is 'gemma', wanted 'llama'"):
        LlamaConfig.from_gguf(GGUF | {"general.architecture": "gemma"}, tied=True)
    with pytest.raises(ValueError, match=r"llama.rope.scaling.type is 'su', wanted 'none', 'linear' or 'yarn'"):
        LlamaConfig.from_gguf(GGUF | {"llama.rope.scaling.type": "su"}, tied=True)
    with pytest.raises(ValueError, match=r"no 'llama.block_count'"):
        LlamaConfig.from_gguf({key: value for key, value in GGUF.items() if "block" not in key}, tied=True)


def test_files_that_do_not_fit_their_configuration(write: Made, tmp_path: Path) -> None:
    directory, _ = write()
    config = json.loads((directory / "config.json").read_text())
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "intermediate_size": 81}))
    with pytest.raises(CheckpointMismatch) as error:
        load_model(tmp_path)
    assert any("layers.3." in line for line in error.value.missing)
    assert any("gate_proj" in line for line in error.value.misshapen)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json; wanted a model directory"):
        load_model(tmp_path)


def test_tokens_outside_the_vocabulary_commit_nothing(write: Made) -> None:
    model = load_model(write()[0]).model
    cache = model.init_cache(1)
    with torch.no_grad():
        model.forward_logits(ids(1)[:, :4], cache)
        with pytest.raises(ValueError, match="id 256 at row 0, column 1 is outside the vocabulary of 256 ids"):
            model.forward_logits(torch.tensor([[3, 256]]), cache)
    assert cache.position == 4
