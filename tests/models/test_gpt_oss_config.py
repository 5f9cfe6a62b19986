"""The configuration of GPT-OSS: both forms of the file, what agrees, what contradicts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from gpt_oss_peer import SIZES

from longburn.models.gpt_oss import GptOss, GptOssConfig, is_gpt_oss
from longburn.rope import ntk_yarn

# The released files, as far as they say something about the model.
ORIGINAL: dict[str, Any] = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_ONLY_ORIGINAL = {"initial_context_length", "rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta", "num_experts"}
HF: dict[str, Any] = {key: value for key, value in ORIGINAL.items() if key not in _ONLY_ORIGINAL} | {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "hidden_act": "silu",
    "initial_context_length": 4096,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_experts_per_tok": 4,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": YARN,
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


NESTED_5 = without(HF, "rope_scaling", "rope_theta") | {"rope_parameters": YARN | {"rope_theta": 150000.0}}
SAME = {
    "original": ORIGINAL,
    "hf": HF,
    "transformers 5": NESTED_5,
    "both dictionaries": HF | {"rope_parameters": YARN | {"rope_theta": 150000.0}},
    "no limit": without(ORIGINAL, "swiglu_limit"),
    "no layer types": without(HF, "layer_types", "experts_per_token", "initial_context_length", "rms_norm_eps"),
    "all keys": ORIGINAL | HF,
    "nulls": HF | {"rope_parameters": None, "num_experts": None, "swiglu_alpha": None},
    "type": HF | {"rope_scaling": without(YARN, "rope_type", "beta_fast", "beta_slow") | {"type": "yarn"}},
}


@pytest.mark.parametrize("config", SAME.values(), ids=SAME)
def test_every_form_of_the_same_settings(config: dict[str, Any]) -> None:
    got = GptOssConfig.from_config(json.loads(json.dumps(config)))
    assert got == GptOssConfig.gpt_oss_20b()
    assert is_gpt_oss(config)


def test_the_released_models() -> None:
    small, large = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()
    assert (large.num_hidden_layers, large.num_experts) == (36, 128)
    assert [window.size for window in large.policy().windows(36)] == [128, None] * 18
    rope = small.rope
    assert rope.attention_factor == pytest.approx(0.1 * math.log(32) + 1)
    # From the formula: pair 8 as trained, 18 and later stretched by 32, 17 nearly so because the ramp is not rounded.
    plain = [150000 ** (-2 * j / 64) for j in range(32)]
    assert rope.inv_freq[8].item() == pytest.approx(plain[8])
    assert rope.inv_freq[18].item() == pytest.approx(plain[18] / 32)
    assert rope.inv_freq[17].item() == pytest.approx(0.000129318694, rel=1e-6)


def test_parameters_of_the_released_models() -> None:
    """As many as published, counted on the meta device."""
    import torch

    for config, wanted in ((GptOssConfig.gpt_oss_20b(), 20.915e9), (GptOssConfig.gpt_oss_120b(), 116.829e9)):
        with torch.device("meta"):
            dense = GptOss(config, dtype=torch.bfloat16)
            packed = GptOss(config, experts="mxfp4", dtype=torch.bfloat16)
        count = sum(parameter.numel() for parameter in dense.parameters())
        assert count == pytest.approx(wanted, rel=1e-4)
        size = sum(tensor.nbytes for tensor in packed.state_dict().values())
        assert size == {24: 13_761_264_768, 36: 65_248_815_744}[config.num_hidden_layers]


@pytest.mark.parametrize("write", ["to_original", "to_hf"])
@pytest.mark.parametrize("config", [GptOssConfig.gpt_oss_20b(), GptOssConfig.from_config(SIZES)], ids=["20b", "tiny"])
def test_written_and_read_again(config: GptOssConfig, write: str) -> None:
    written = json.loads(json.dumps(getattr(config, write)()))
    if write == "to_original":  # which does not state how far the stretched context reaches: factor times the trained
        written["max_position_embeddings"] = config.max_position_embeddings
    assert GptOssConfig.from_config(written) == config


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    from transformers import GptOssConfig as TheirConfig

    odd = SIZES | {
        "layer_types": ["full_attention"] * 4,
        "swiglu_limit": 3.0,
        "swiglu_alpha": 1.5,
        "rms_norm_eps": 1e-3,
    }
    for settings in (SIZES, odd):
        (tmp_path / "config.json").write_text(json.dumps(GptOssConfig.from_config(settings).to_hf()))
        theirs = TheirConfig.from_pretrained(tmp_path)
        for key, value in settings.items():
            if key not in {"rope_parameters", "initializer_range"}:
                assert getattr(theirs, key) == value, key
        assert {k: v for k, v in theirs.rope_parameters.items() if k != "type"} == SIZES["rope_parameters"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, r"model_type is 'mixtral', wanted 'gpt_oss'"),
        ({"attention_bias": False}, r"attention_bias is False, wanted True"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings is True, wanted False"),
        ({"hidden_size": None}, r"has no 'hidden_size'"),
        ({"num_local_experts": None}, r"has no 'num_experts' or 'num_local_experts'"),
        ({"hidden_size": 28.5}, r"hidden_size is 28.5, wanted a whole number of at least 1"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads is 0, wanted a whole number"),
        ({"experts_per_token": 8}, r"experts_per_token is 8 but num_experts_per_tok is 4; .*keep one"),
        ({"num_experts": 64}, r"num_experts is 64 but num_local_experts is 32; .*keep one"),
        (
            {"initial_context_length": 8192},
            r"initial_context_length is 8192, but rope_scaling says .* = 4096; keep one",
        ),
        ({"rope_scaling_factor": 16.0}, r"rope_scaling_factor is 16.0, but rope_scaling says factor = 32.0"),
        ({"rope_ntk_beta": 16.0}, r"rope_ntk_beta is 16.0, but rope_scaling says beta_fast = 32.0"),
        ({"rope_parameters": YARN | {"rope_theta": 1e4}}, r"rope_theta is given twice, as 10000.0 and as 150000"),
        ({"rope_scaling": YARN | {"beta_medium": 8}}, r"unknown key 'beta_medium'"),
        ({"rope_ntk_gamma": 8}, r"unknown key 'rope_ntk_gamma'"),
        ({"rope_scaling": {"rope_type": "wavelet"}}, r"wavelet"),
        ({"rope_scaling": {"rope_type": "default"}, "rope_scaling_factor": 32.0}, r"but rope_scaling has no YaRN"),
        ({"rope_scaling": None}, r"neither rope_scaling nor rope_parameters, nor 'rope_scaling_factor'"),
        ({"layer_types": ["full_attention"] * 23}, r"layer_types is .*, wanted .* for each of 24 layers"),
        ({"layer_types": ["chunked_attention"] * 24}, r"layer_types is \['chunked_attention'"),
        ({"swiglu_limit": -1}, r"swiglu_limit is -1, wanted a number above 0"),
        ({"rms_norm_eps": "small"}, r"rms_norm_eps is 'small', wanted a number above 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GptOssConfig.from_config(HF | change)


def test_the_original_form_needs_its_keys() -> None:
    for key in ORIGINAL:
        if key != "swiglu_limit":
            with pytest.raises(ValueError, match=key):
                GptOssConfig.from_config(without(ORIGINAL, key))


@pytest.mark.parametrize(
    "settings",
    [{"swiglu_alpha": 1.5}, {"rms_norm_eps": 1e-6}, {"layer_types": ("full_attention",) * 4}],
    ids=lambda settings: next(iter(settings)),
)
def test_the_original_form_cannot_say_everything(settings: dict[str, Any]) -> None:
    config = GptOssConfig.from_config(SIZES | settings)
    with pytest.raises(ValueError, match=f"the format fixes {next(iter(settings))}"):
        config.to_original()


def test_only_yarn_is_written() -> None:
    config = GptOssConfig.from_config(SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    with pytest.raises(ValueError, match="cannot write the RoPE scaling None, only YaRN"):
        config.to_hf()
    assert config.rope != ntk_yarn(16, theta=1e4, factor=32, original_context=4096)
