"""The planner's formulas against what models, caches and forwards really allocate."""

from collections.abc import Callable

import gpt_oss_peer
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from longburn.cache import AttnWindow, WindowPolicy
from longburn.models.decoder import Decoder
from longburn.models.gpt_oss import GptOss, GptOssConfig
from longburn.models.llama import Llama, LlamaConfig
from longburn.models.planning import Sizes, activation_bytes, largest, plan_memory, weight_bytes
from longburn.rope import RotaryEncoding

TIGHT = 1.6  # the bound on activations is at most this many times what is measured (1.06 to 1.45 where it was tried)


def llama(**settings) -> LlamaConfig:
    sizes = {
        "vocab_size": 503,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 512,
    }
    return LlamaConfig(**sizes | settings, rope=RotaryEncoding(24))


def gpt_oss(**settings) -> GptOssConfig:
    return GptOssConfig.from_config(gpt_oss_peer.SIZES | settings)


def build(config: LlamaConfig | GptOssConfig, window: AttnWindow | None, dtype: torch.dtype, experts: str) -> Decoder:
    if isinstance(config, GptOssConfig):
        return GptOss(config, policy=config.policy(window), experts=experts, dtype=dtype)
    return Llama(config, policy=WindowPolicy.uniform(window or AttnWindow()), dtype=dtype)


def on_meta(*arguments) -> Decoder:
    with torch.device("meta"):
        return build(*arguments)


MODELS = {
    "llama": llama,
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    "llama_biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "gpt_oss": gpt_oss,
    "gpt_oss_odd": lambda: gpt_oss(num_hidden_layers=5, num_local_experts=7, num_experts_per_tok=3),
    "gpt_oss_20b": GptOssConfig.gpt_oss_20b,
    "gpt_oss_120b": GptOssConfig.gpt_oss_120b,
}
Make = Callable[[], LlamaConfig | GptOssConfig]


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_weights(make: Make, dtype: torch.dtype, experts: str) -> None:
    model = on_meta(make(), None, dtype, experts)
    held = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    assert sum(weight_bytes(Sizes.of(make()), dtype.itemsize, experts).values()) == sum(held.values())


def test_weights_of_the_released_models() -> None:
    """The sizes of the published files."""
    for make, size in ((GptOssConfig.gpt_oss_20b, 13_761_264_768), (GptOssConfig.gpt_oss_120b, 65_248_815_744)):
        assert sum(weight_bytes(Sizes.of(make()), 2).values()) == size


@pytest.mark.parametrize("window", [None, AttnWindow(16), AttnWindow(32, sink_tokens=4)], ids=str)
@pytest.mark.parametrize(("context", "batch"), [(1, 1), (7, 3), (8, 1), (33, 2), (36, 2), (37, 2), (5000, 4)])
@pytest.mark.parametrize("make", [llama, gpt_oss, GptOssConfig.gpt_oss_20b])
def test_caches(make: Make, context: int, batch: int, window: AttnWindow | None) -> None:
    cache = on_meta(make(), window, torch.bfloat16, "mxfp4").init_cache(batch, max_length=context)
    caches = plan_memory(Sizes.of(make(), window), context, batch).caches
    assert sum(size for _, size in caches.values()) == cache.nbytes
    assert sum(layers for layers, _ in caches.values()) == len(cache)


def peak(run: Callable[[], object]) -> int:
    """The most bytes that were held at once during a call, beyond what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize(("batch", "chunk", "before"), [(1, 256, 0), (2, 200, 100), (1, 256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "llama_windowed", "gpt_oss_dense", "gpt_oss_mxfp4"])
def test_activations(kind: str, dtype: torch.dtype, batch: int, chunk: int, before: int) -> None:
    """Every expert is chosen by every token, which is what the bound allows for."""
    window = AttnWindow(64, sink_tokens=4) if kind == "llama_windowed" else None
    if kind.startswith("llama"):
        config: LlamaConfig | GptOssConfig = llama(hidden_size=240, intermediate_size=640)
    else:
        config = gpt_oss(num_local_experts=3, num_experts_per_tok=3, hidden_size=256, intermediate_size=288)
    experts = kind.removeprefix("gpt_oss_") if kind.startswith("gpt_oss") else "dense"
    torch.manual_seed(0)
    model = build(config, window, dtype, experts)
    tokens = torch.randint(model.vocab_size, (batch, chunk + before))
    cache = model.init_cache(batch, max_length=chunk + before)
    with torch.no_grad():
        if before:
            model.forward_logits(tokens[:, :before], cache)
        measured = peak(lambda: model.forward_logits(tokens[:, before:], cache))
    bound = activation_bytes(Sizes.of(config, window), chunk, batch, dtype.itemsize, experts)
    assert measured <= bound <= TIGHT * measured


def test_largest() -> None:
    for limit in (0, 1, 2, 99, 100):
        assert largest(lambda n, limit=limit: n <= limit, 100) == limit


def test_what_fits_really_fits() -> None:
    sizes = Sizes.of(GptOssConfig.gpt_oss_20b())
    memory = 80 * 2**30
    context = largest(lambda n: plan_memory(sizes, n, 4).total <= memory, 2**40)
    assert plan_memory(sizes, context, 4).total <= memory < plan_memory(sizes, context + 1, 4).total
