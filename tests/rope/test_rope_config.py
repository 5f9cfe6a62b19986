"""`from_config` against the rotary modules of transformers, in both spellings; and everything it must refuse."""

import copy

import pytest
import torch
from transformers import Gemma3TextConfig, Gemma4TextConfig, GptOssConfig, LlamaConfig, Phi3Config, StableLmConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

from longburn.rope import DynamicNtkScaling, LongRopeScaling, RotaryEncoding, YarnScaling, ntk_yarn

torch.set_num_threads(1)

BASE = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 8192}
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}

SMALL = {**BASE, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "module"),
    [
        (LlamaConfig(**SMALL), LlamaRotaryEmbedding),
        (LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 4.0}), LlamaRotaryEmbedding),
        (LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 4.0}), LlamaRotaryEmbedding),
        (GptOssConfig(), GptOssRotaryEmbedding),
        (StableLmConfig(**SMALL, partial_rotary_factor=0.25), StableLmRotaryEmbedding),
        (
            Phi3Config(
                **SMALL, original_max_position_embeddings=4096, pad_token_id=0, rope_parameters=copy.deepcopy(LONGROPE)
            ),
            Phi3RotaryEmbedding,
        ),
    ],
    ids=["llama", "linear", "dynamic", "gpt-oss", "stablelm", "phi3"],
)
def test_configs_written_by_transformers(config, module) -> None:
    expected = module(config)
    rope = RotaryEncoding.from_config(config.to_dict())
    torch.testing.assert_close(rope.inv_freq.float(), expected.inv_freq, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(float(expected.attention_scaling), rel=1e-12)


@pytest.mark.parametrize(
    ("config", "module"),
    [(Gemma3TextConfig(), Gemma3RotaryEmbedding), (Gemma4TextConfig(), Gemma4TextRotaryEmbedding)],
    ids=["gemma3", "gemma4"],
)
def test_parameters_by_layer_type(config, module) -> None:
    expected = module(config)
    encodings = []
    for layer_type in ("sliding_attention", "full_attention"):
        inv_freq = getattr(expected, f"{layer_type}_inv_freq")
        head_dim = 2 * len(inv_freq)  # Gemma 4's full layers are wider; their size is the model's to pick
        rope = RotaryEncoding.from_config({**config.to_dict(), "head_dim": head_dim}, layer_type=layer_type)
        torch.testing.assert_close(rope.inv_freq.float(), inv_freq, rtol=1e-6, atol=0)
        encodings.append(rope)
    assert encodings[0] != encodings[1]


def test_both_spellings_of_gpt_oss_give_the_same_encoding() -> None:
    old = {"head_dim": 64, "rope_theta": 150000, "rope_scaling": YARN, "max_position_embeddings": 131072}
    new = {"head_dim": 64, "rope_parameters": {**YARN, "rope_theta": 150000}, "max_position_embeddings": 131072}
    both = {**old, **new}
    wanted = ntk_yarn(64, theta=150_000, factor=32.0, original_context=4096, truncate=False)
    for config in (old, new, both):
        rope = RotaryEncoding.from_config(config)
        assert rope == wanted
        assert rope.inv_freq.equal(wanted.inv_freq)


def test_every_yarn_key_arrives() -> None:
    params = {**YARN, "rope_theta": 5e5, "attention_factor": 1.1, "mscale": 0.7, "mscale_all_dim": 0.9}
    rope = RotaryEncoding.from_config({**BASE, "rope_parameters": params})
    assert rope.scaling == YarnScaling(
        32.0, 4096, truncate=False, attention_factor=1.1, mscale=0.7, mscale_all_dim=0.9, beta_fast=32.0, beta_slow=1.0
    )
    assert rope.theta == 5e5


def test_sizes() -> None:
    plain = {**BASE, "rope_theta": 1e4}
    assert RotaryEncoding.from_config(plain) == RotaryEncoding(32)
    assert RotaryEncoding.from_config({**plain, "head_dim": None}) == RotaryEncoding(32)
    assert RotaryEncoding.from_config({**plain, "head_dim": 64}) == RotaryEncoding(64)
    assert RotaryEncoding.from_config({**plain, "partial_rotary_factor": 0.25}) == RotaryEncoding(32, rotary_dim=8)
    nested = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    assert RotaryEncoding.from_config({**BASE, **nested}) == RotaryEncoding(32, rotary_dim=16)
    assert RotaryEncoding.from_config({**plain, "rope_scaling": None, "rope_interleaved": False}) == RotaryEncoding(32)


def test_pairing() -> None:
    plain = {**BASE, "rope_theta": 1e4}
    assert RotaryEncoding.from_config({**plain, "rope_interleaved": True}).interleaved is True
    assert RotaryEncoding.from_config(plain, interleaved=True).interleaved is True
    assert RotaryEncoding.from_config({**plain, "rope_interleave": True}, interleaved=False).interleaved is False


def test_a_flat_dict_holds_for_every_layer_type() -> None:
    config = {**BASE, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert RotaryEncoding.from_config(config, layer_type="full_attention") == RotaryEncoding.from_config(config)


def test_lengths() -> None:
    dynamic = {**BASE, "rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    rope = RotaryEncoding.from_config(dynamic, length=20_000)
    assert rope.scaling == DynamicNtkScaling(2.0, 8192)
    assert rope.inv_freq.equal(RotaryEncoding.from_config(dynamic).for_length(20_000).inv_freq)

    longrope = {**BASE, "rope_theta": 1e4, "original_max_position_embeddings": 2048, "rope_scaling": LONGROPE}
    assert RotaryEncoding.from_config(longrope).scaling == LongRopeScaling([1.0] * 16, [2.0] * 16, 2048, factor=4.0)
    old_name = {**longrope, "rope_scaling": {**LONGROPE, "type": "su"}}
    assert RotaryEncoding.from_config(old_name) == RotaryEncoding.from_config(longrope)


def rope_config(**params) -> dict:
    return {**BASE, "rope_theta": 1e4, "rope_scaling": params}


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        # unknown keys
        (rope_config(**YARN, beta_medium=3), ["'beta_medium'", "'beta_fast'", "'truncate'"]),
        (rope_config(rope_type="linear", factor=2.0, truncate=False), ["'truncate'", "rope_type 'linear'"]),
        (rope_config(factor=2.0), ["'factor'", "rope_type 'default'"]),
        (rope_config(rope_type="default", mrope_section=[8, 4, 4]), ["'mrope_section'"]),
        ({**BASE, "rope_theta": 1e4, "rope_local_base_freq": 1e4}, ["'rope_local_base_freq'", "'rope_theta'"]),
        ({**BASE, "rope_theta": 1e4, "rope_scaling_factor": 32.0}, ["'rope_scaling_factor'"]),
        # unknown types
        (rope_config(rope_type="mrope"), ["'mrope'", "'yarn'", "'longrope'"]),
        # missing keys
        (BASE, ["'rope_theta' is missing"]),
        ({"rope_theta": 1e4, "hidden_size": 64}, ["'num_attention_heads' is missing"]),
        (rope_config(rope_type="linear"), ["'factor' is missing", "'linear'"]),
        (rope_config(rope_type="linear", factor=None), ["'factor' is missing"]),
        (rope_config(rope_type="yarn", factor=2.0), ["'original_max_position_embeddings' is missing"]),
        (
            rope_config(rope_type="llama3", factor=8.0, low_freq_factor=1.0, original_max_position_embeddings=8192),
            ["'high_freq_factor' is missing"],
        ),
        (rope_config(**LONGROPE), ["'original_max_position_embeddings' is missing"]),
        (
            {"head_dim": 32, "rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ["'max_position_embeddings' is missing"],
        ),
        # contradictions
        (
            {**rope_config(rope_type="linear", factor=2.0), "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            ["factor is given twice, as 2.0 and as 4.0"],
        ),
        (rope_config(rope_type="linear", type="yarn", factor=2.0), ["rope_type is given twice"]),
        (
            {**BASE, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
            ["rope_theta is given twice, as 1000000.0 and as 10000.0"],
        ),
        # bad values
        (rope_config(rope_type="linear", factor=0.25), ["factor = 0.25"]),
        (rope_config(rope_type="yarn", factor=-2.0, original_max_position_embeddings=64), ["factor = -2.0"]),
        (rope_config(**{**LONGROPE, "original_max_position_embeddings": 64, "long_factor": [1.0]}), ["long_factor"]),
        ({**BASE, "rope_theta": 1.0}, ["theta = 1.0"]),
        ({**BASE, "rope_theta": "10000"}, ["theta = '10000'"]),
        ({**BASE, "rope_theta": 1e4, "head_dim": 31}, ["rotary_dim = 31", "even"]),
        ({**BASE, "rope_theta": 1e4, "partial_rotary_factor": 0.1}, ["rotary_dim = 3 "]),
        ({**BASE, "rope_theta": 1e4, "partial_rotary_factor": 1.5}, ["partial_rotary_factor = 1.5"]),
        ({**BASE, "rope_theta": 1e4, "partial_rotary_factor": "half"}, ["partial_rotary_factor = 'half'"]),
        ({**BASE, "rope_theta": 1e4, "rope_interleaved": "false"}, ["interleaved = 'false'"]),
    ],
)
def test_refusals_name_the_key(config: dict, fragments: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the message is compared literally below
        RotaryEncoding.from_config(config)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_refusals_by_layer_type() -> None:
    parameters = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "global": None}
    for layer_type in (None, "sliding_attention", "global"):
        with pytest.raises(ValueError, match=rf"layer_type = '?{layer_type}'?; want one of \['full_attention'\]"):
            RotaryEncoding.from_config({**BASE, "rope_parameters": parameters}, layer_type=layer_type)
    with pytest.raises(ValueError, match="unknown key 'rope_theta'"):
        RotaryEncoding.from_config(
            {**BASE, "rope_parameters": {**parameters, "rope_theta": 1e4}}, layer_type="full_attention"
        )
