import dataclasses
import math

import pytest
import torch

from longburn.sampling import SamplerConfig, sample


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1e-60),  # 0 in float32
        ("repetition_penalty", math.nan),
        ("frequency_penalty", math.nan),
        ("frequency_penalty", 1e300),  # infinite in float32
        ("presence_penalty", math.inf),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {3: math.inf}),
        ("logit_bias", {3: -math.inf}),
        ("logit_bias", {3: math.nan}),
        ("banned_tokens", (4, -2)),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_a_value_out_of_range_is_named(setting, value):
    with pytest.raises(ValueError, match=f"SamplerConfig: {setting}"):
        SamplerConfig(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("top_k", 2.0),
        ("top_k", True),
        ("seed", 1.5),
        ("banned_tokens", (1.0,)),
        ("banned_tokens", ("the",)),
        ("logit_bias", {"the": 1.0}),
    ],
)
def test_a_value_of_the_wrong_type_is_named(setting, value):
    with pytest.raises(TypeError, match=f"SamplerConfig: {setting}"):
        SamplerConfig(**{setting: value})


def test_the_edges_of_the_ranges_are_allowed():
    SamplerConfig(temperature=0, top_p=1, min_p=1, repetition_penalty=0.5, frequency_penalty=-2, presence_penalty=-2)
    SamplerConfig(top_p=1e-9, min_p=0, temperature=1e-30, seed=2**64 - 1)


def test_it_is_frozen_and_shares_nothing_with_the_caller():
    bias, banned = {1: 2.0}, [3]
    config = SamplerConfig(logit_bias=bias, banned_tokens=banned)
    bias[1], banned[0] = 5.0, 0
    assert config.logit_bias == {1: 2.0}
    assert config.banned_tokens == (3,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 5
    assert hash(config) == hash(dataclasses.replace(config))


def test_a_seed_is_drawn_once_and_only_if_missing():
    seeded = SamplerConfig(seed=5)
    assert seeded.resolved() is seeded
    fresh = SamplerConfig(top_k=7)
    first, second = fresh.resolved(), fresh.resolved()
    assert fresh.seed is None
    assert first.seed != second.seed
    assert first.resolved() is first
    assert dataclasses.replace(first, seed=None) == fresh


@pytest.mark.parametrize("settings", [{"logit_bias": {7: 1.0, 9: 1.0}}, {"banned_tokens": (9, 7)}])
def test_an_id_beyond_the_vocabulary_is_named_when_the_vocabulary_is_known(settings):
    config = SamplerConfig(**settings)
    config.check_vocabulary(10)
    with pytest.raises(ValueError, match=r"ids \[7, 9\] but the logits have 7 tokens"):
        sample(torch.zeros(1, 7), config)
