"""Frequencies against the papers' formulas in Python floats and against transformers, at both of its precisions."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longburn.rope import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    ProportionalScaling,
    RotaryEncoding,
    YarnScaling,
    ntk_yarn,
)

torch.set_num_threads(1)


class InFloat64(TorchFunctionMode):
    """Runs someone else's float32 code in float64, so that it can be compared to more than seven digits."""

    def __enter__(self):
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{key: widen(value) for key, value in (kwargs or {}).items()})


SHORT = [1.0 + 0.01 * j for j in range(24)]
LONG = [1.0 + 0.9 * j for j in range(24)]

# name: (rope_parameters, our scaling, max_position_embeddings, declared length)
CASES = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, LinearScaling(4.0), 2048, None),
    "dynamic, inside": ({"rope_type": "dynamic", "factor": 3.0}, DynamicNtkScaling(3.0, 2048), 2048, 100),
    "dynamic, beyond": ({"rope_type": "dynamic", "factor": 3.0}, DynamicNtkScaling(3.0, 2048), 2048, 7001),
    "yarn": (
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
        YarnScaling(16.0, 4096),
        65536,
        None,
    ),
    "yarn, GPT-OSS": (
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        YarnScaling(32.0, 4096, truncate=False),
        131072,
        None,
    ),
    "yarn, betas": (
        {
            "rope_type": "yarn",
            "factor": 5.0,
            "beta_fast": 20.5,
            "beta_slow": 0.3,
            "original_max_position_embeddings": 1000,
        },
        YarnScaling(5.0, 1000, beta_fast=20.5, beta_slow=0.3),
        5000,
        None,
    ),
    "yarn, ramp clamped at both ends": (
        {
            "rope_type": "yarn",
            "factor": 5.0,
            "beta_fast": 90.0,
            "beta_slow": 1e-9,
            "original_max_position_embeddings": 300,
        },
        YarnScaling(5.0, 300, beta_fast=90.0, beta_slow=1e-9),
        1500,
        None,
    ),
    "yarn, no ramp": (
        {
            "rope_type": "yarn",
            "factor": 5.0,
            "beta_fast": 2.0,
            "beta_slow": 2.0,
            "truncate": False,
            "original_max_position_embeddings": 1000,
        },
        YarnScaling(5.0, 1000, beta_fast=2.0, beta_slow=2.0, truncate=False),
        5000,
        None,
    ),
    "yarn, attention_factor": (
        {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.75, "original_max_position_embeddings": 4096},
        YarnScaling(8.0, 4096, attention_factor=0.75),
        32768,
        None,
    ),
    "yarn, DeepSeek-V2": (
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "mscale": 0.707,
            "mscale_all_dim": 1.3,
            "original_max_position_embeddings": 4096,
        },
        YarnScaling(40.0, 4096, mscale=0.707, mscale_all_dim=1.3),
        163840,
        None,
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        Llama3Scaling(8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        131072,
        None,
    ),
    "longrope, short": (
        {
            "rope_type": "longrope",
            "factor": 32.0,
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": 4096,
        },
        LongRopeScaling(SHORT, LONG, 4096, factor=32.0),
        131072,
        4096,
    ),
    "longrope, long": (
        {
            "rope_type": "longrope",
            "factor": 32.0,
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": 4096,
        },
        LongRopeScaling(SHORT, LONG, 4096, factor=32.0),
        131072,
        4097,
    ),
    "longrope, attention_factor": (
        {
            "rope_type": "longrope",
            "factor": 32.0,
            "attention_factor": 1.5,
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": 4096,
        },
        LongRopeScaling(SHORT, LONG, 4096, factor=32.0, attention_factor=1.5),
        131072,
        None,
    ),
    "proportional": (
        {"rope_type": "proportional", "partial_rotary_factor": 0.3, "factor": 2.0},
        ProportionalScaling(0.3, factor=2.0),
        4096,
        None,
    ),
}


def reference_config(params: dict, max_positions: int, theta: float = 150_000.0) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max_positions,
        rope_parameters={**params, "rope_theta": theta},
    )


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    params, scaling, max_positions, length = CASES[name]
    config = reference_config(params, max_positions)
    rope = RotaryEncoding(48, theta=150_000.0, scaling=scaling, length=length)

    init = ROPE_INIT_FUNCTIONS[params["rope_type"]]
    single, factor = init(config, torch.device("cpu"), seq_len=length)
    assert single.dtype == torch.float32
    assert rope.inv_freq.dtype == torch.float64
    torch.testing.assert_close(rope.inv_freq, single.double(), rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(float(factor), rel=1e-12)

    with InFloat64():
        double, _ = init(config, torch.device("cpu"), seq_len=length)
    assert double.dtype == torch.float64
    torch.testing.assert_close(rope.inv_freq, double, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_tables_are_those_of_transformers(name: str) -> None:
    params, scaling, max_positions, length = CASES[name]
    length = length or (4096 if params["rope_type"] == "longrope" else max_positions)
    rope = RotaryEncoding(48, theta=150_000.0, scaling=scaling, length=length)
    # transformers takes the length from the largest position it is shown, so the last one must be length - 1.
    positions = torch.tensor([[0, 1, 2, 3, 5, 8, length // 3, length // 2, length - 2, length - 1]])
    config = reference_config(params, max_positions)
    angles = rope.angles(positions)

    with InFloat64():
        cos, sin = LlamaRotaryEmbedding(config).double()(torch.zeros(1, dtype=torch.float64), positions)
    assert cos.dtype == torch.float64
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat_interleave(24)
    torch.testing.assert_close(angles.cos[:, 0].double(), cos, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(angles.sin[:, 0].double(), sin * sign, rtol=1e-6, atol=1e-7)

    # As shipped, in float32, its tables are good to this tolerance for the first few positions only.
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    torch.testing.assert_close(angles.cos[:, 0, :6], cos[:, :6], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(angles.sin[:, 0, :6], sin[:, :6] * sign.float(), rtol=1e-6, atol=1e-6)


THETA, DIM = 10_000.0, 40  # no powers of two


def plain(j: int, theta: float = THETA) -> float:
    return theta ** (-2 * j / DIM)


def yarn_paper(j: int) -> float:
    """Equations 17 to 23 of arXiv:2309.00071 with the index ramp of its published code."""
    scale, context, alpha, beta = 8.0, 3000, 1.5, 24.0

    def index_of(turns: float) -> float:
        # f_j * context = 2 pi turns, solved for j
        return DIM / 2 * math.log(context / (2 * math.pi * turns), THETA)

    low, high = math.floor(index_of(beta)), math.ceil(index_of(alpha))
    gamma = 1 - min(max((j - low) / (high - low), 0.0), 1.0)
    return (1 - gamma) * plain(j) / scale + gamma * plain(j)


def llama3_code(j: int) -> float:
    scale, context, low, high = 8.0, 8192, 1.0, 4.0
    wavelength = 2 * math.pi / plain(j)
    if wavelength < context / high:
        return plain(j)
    if wavelength > context / low:
        return plain(j) / scale
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * plain(j) / scale + smooth * plain(j)


@pytest.mark.parametrize(
    ("scaling", "length", "formula", "attention_factor"),
    [
        (None, None, plain, 1.0),
        (LinearScaling(2.5), None, lambda j: plain(j) / 2.5, 1.0),
        (NtkScaling(4.0), None, lambda j: plain(j, THETA * 4.0 ** (DIM / (DIM - 2))), 1.0),
        (DynamicNtkScaling(2.0, 512), 511, plain, 1.0),
        (DynamicNtkScaling(2.0, 512), 2048, lambda j: plain(j, THETA * 7.0 ** (DIM / (DIM - 2))), 1.0),
        (YarnScaling(8.0, 3000, beta_fast=24.0, beta_slow=1.5), None, yarn_paper, 0.1 * math.log(8.0) + 1),
        (YarnScaling(1.0, 3000), None, plain, 1.0),
        (YarnScaling(8.0, 3000, beta_fast=24.0, beta_slow=1.5, mscale=1.0, mscale_all_dim=1.0), None, yarn_paper, 1.0),
        (Llama3Scaling(8.0, 8192, 1.0, 4.0), None, llama3_code, 1.0),
        (
            LongRopeScaling(SHORT[:20], LONG[:20], 64, factor=16.0),
            65,
            lambda j: plain(j) / LONG[j],
            math.sqrt(1 + math.log(16) / math.log(64)),
        ),
        (LongRopeScaling(SHORT[:20], LONG[:20], 64, factor=1.0), None, lambda j: plain(j) / SHORT[j], 1.0),
        (ProportionalScaling(0.25), None, lambda j: plain(j) if j < 5 else 0.0, 1.0),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "frequencies") else "",
)
def test_frequencies_are_those_of_the_papers(scaling, length, formula, attention_factor) -> None:
    rope = RotaryEncoding(DIM, theta=THETA, scaling=scaling, length=length)
    expected = torch.tensor([formula(j) for j in range(DIM // 2)], dtype=torch.float64)
    torch.testing.assert_close(rope.inv_freq, expected, rtol=1e-12, atol=0)
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-14)


def test_gpt_oss_numbers() -> None:
    rope = ntk_yarn(64, theta=150_000.0, factor=32.0, original_context=4096, truncate=False)
    published = {
        0: 1.0,
        1: 0.689044297,
        2: 0.47478205,
        4: 0.225418001,
        8: 0.0508132726,
        9: 0.0317056961,
        12: 0.00679495931,
        16: 0.000456483918,
        17: 0.000129318694,
        18: 3.83088118e-05,
        24: 4.09997847e-06,
        31: 3.0235114e-07,
    }
    for pair, inv_freq in published.items():
        assert rope.inv_freq[pair].item() == pytest.approx(inv_freq, rel=1e-6)
    assert rope.attention_factor == pytest.approx(1.3465735902799727, rel=1e-15)
    rounded_ends = ntk_yarn(64, theta=150_000.0, factor=32.0, original_context=4096)
    assert abs(rounded_ends.inv_freq[17] / rope.inv_freq[17] - 1).item() == pytest.approx(0.76, abs=0.01)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    inv_freq, base = YarnScaling(32.0, 4096).frequencies(150_000.0, 64)[0], RotaryEncoding(64, theta=150_000.0).inv_freq
    assert inv_freq[0] == base[0]
    assert inv_freq[-1] == base[-1] / 32.0


def test_a_declared_length_is_the_only_thing_that_moves_the_base() -> None:
    rope = RotaryEncoding(32, scaling=DynamicNtkScaling(2.0, 64))
    far = torch.tensor([[1000, 3]])
    torch.testing.assert_close(rope.angles(far).cos[..., 1, :], rope.angles(far[:, 1:]).cos[..., 0, :], rtol=0, atol=0)
    longer = rope.for_length(1001)
    assert rope.length is None
    assert (longer.inv_freq[1:] < rope.inv_freq[1:]).all()
    assert longer.for_length(64).inv_freq.equal(rope.inv_freq)


def test_frequencies_are_real_numbers_under_a_meta_device() -> None:
    settings = [scaling for _, scaling, _, _ in CASES.values()]
    with torch.device("meta"):
        ropes = [RotaryEncoding(48, scaling=scaling) for scaling in settings]
    assert all(rope.inv_freq.device.type == "cpu" for rope in ropes)
    assert all(rope.angles(torch.tensor([[5]])).cos.isfinite().all() for rope in ropes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(0.5), "LinearScaling: factor = 0.5; want a number >= 1"),
        (lambda: LinearScaling(-2.0), "factor = -2.0"),
        (lambda: LinearScaling(float("nan")), "factor = nan"),
        (lambda: LinearScaling("8"), "factor = '8'"),
        (lambda: LinearScaling(None), "factor = None"),
        (lambda: NtkScaling(0.0), "NtkScaling: factor = 0.0"),
        (lambda: NtkScaling(2.0).frequencies(1e4, 2), "rotary_dim = 2"),
        (lambda: DynamicNtkScaling(0.9, 10), "DynamicNtkScaling: factor = 0.9"),
        (lambda: DynamicNtkScaling(2.0, 0), "original_context = 0"),
        (lambda: YarnScaling(0.5, 4096), "YarnScaling: factor = 0.5"),
        (lambda: YarnScaling(2.0, -1), "original_context = -1"),
        (lambda: YarnScaling(2.0, 4096, beta_fast=1.0, beta_slow=32.0), "beta_fast = 1.0 is below beta_slow = 32.0"),
        (lambda: YarnScaling(2.0, 4096, beta_slow=0.0), "beta_slow = 0.0; want a number > 0"),
        (lambda: YarnScaling(2.0, 4096, beta_fast=None), "beta_fast = None"),
        (lambda: YarnScaling(2.0, 4096, truncate="false"), "truncate = 'false'"),
        (lambda: YarnScaling(2.0, 4096, mscale=1.0), "give both or neither"),
        (lambda: YarnScaling(2.0, 4096, mscale_all_dim=1.0), "give both or neither"),
        (lambda: YarnScaling(2.0, 4096, mscale=0.0, mscale_all_dim=1.0), "mscale = 0.0"),
        (lambda: YarnScaling(2.0, 4096, attention_factor=-1.0), "attention_factor = -1.0"),
        (lambda: Llama3Scaling(8.0, 8192, 4.0, 4.0), "high_freq_factor = 4.0; want a number > 4.0"),
        (lambda: Llama3Scaling(8.0, 8192, 0.0, 4.0), "low_freq_factor = 0.0"),
        (lambda: LongRopeScaling([1.0], [1.0], 1, factor=2.0), "original_context = 1"),
        (lambda: LongRopeScaling([1.0, -1.0], [1.0, 1.0], 10, factor=2.0), "short_factor"),
        (lambda: LongRopeScaling([1.0, 1.0], 3.0, 10, factor=2.0), "long_factor = 3.0"),
        (
            lambda: LongRopeScaling([1.0] * 4, [1.0] * 3, 10, factor=2.0).frequencies(1e4, 8),
            "long_factor has 3 numbers; want rotary_dim / 2 = 4",
        ),
        (
            lambda: RotaryEncoding(16, scaling=LongRopeScaling([1.0] * 4, [1.0] * 8, 10, factor=2.0)),
            "short_factor has 4 numbers; want rotary_dim / 2 = 8",
        ),
        (lambda: ProportionalScaling(1.5), "proportion = 1.5; want a number > 0 and <= 1"),
    ],
)
def test_bad_values_are_named(make, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the message is compared literally below
        make()
    assert message in str(error.value)
