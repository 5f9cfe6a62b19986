"""GPT-OSS against transformers: random weights, every cut of the stream, gradients, bf16."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_oss_peer import SIZES, VOCABULARY, WINDOW, peer, save, tokens

from longburn import AttnWindow
from longburn.generation import AutoregressiveModel
from longburn.models.gpt_oss import GptOss, GptOssConfig

ATOL = 2e-4

# Another geometry: one kv head, top-1, full layers first, three layers, alpha and limit that clamp most activations.
ODD = {
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "num_key_value_heads": 1,
    "num_attention_heads": 5,
    "head_dim": 20,
    "num_experts_per_tok": 1,
    "num_local_experts": 5,
    "hidden_size": 96,
    "intermediate_size": 32,
    "swiglu_limit": 0.5,
    "swiglu_alpha": 1.1,
    "rms_norm_eps": 1e-3,
}
Both = Callable[..., tuple[GptOss, Any]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """The same model as ours, through files, and theirs; each made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, policy: Any = None, **settings: Any) -> Any:
        key = f"{seed} {settings}"
        if key not in made:
            theirs = peer(seed, **settings)
            made[key] = save(theirs, tmp_path_factory.mktemp("gpt_oss")), theirs
        directory, theirs = made[key]
        return GptOss.from_checkpoint(directory, dtype=dtype, policy=policy), theirs

    return make


def streamed(model: GptOss, ids: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, Any]:
    cache = model.init_cache(ids.shape[0])
    with torch.no_grad():
        parts = [model.forward_logits(part, cache, all_positions=True) for part in ids.split(sizes, 1)]
    return torch.cat(parts, 1), cache


def cut(length: int, size: int) -> list[int]:
    return [size] * (length // size) + ([length % size] if length % size else [])


@pytest.mark.parametrize("settings", [{}, ODD], ids=["released", "odd"])
@pytest.mark.parametrize("size", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 5, 45])
def test_logits_equal_those_of_transformers_however_the_stream_is_cut(both: Both, settings: Any, size: int) -> None:
    model, theirs = both(**settings)
    assert isinstance(model, AutoregressiveModel)
    ids = tokens()
    with torch.no_grad():
        wanted = theirs(ids).logits
        assert wanted.std() > 1
        torch.testing.assert_close(model(ids), wanted, atol=ATOL, rtol=0)
    got, cache = streamed(model, ids, cut(45, size))
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0)
    types = model.config.layer_types
    assert [layer.slots for layer, kind in zip(cache, types, strict=True) if kind == "sliding_attention"] == [
        WINDOW for kind in types if kind == "sliding_attention"
    ]
    assert cache.position == 45


@pytest.mark.parametrize("seed", range(4))
def test_random_cuts(both: Both, seed: int) -> None:
    model, theirs = both(seed)
    ids = tokens(length=120, seed=seed)
    g = torch.Generator().manual_seed(seed)
    ends = sorted({*torch.randint(1, 120, (9,), generator=g).tolist(), 120})
    sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    with torch.no_grad():
        wanted = theirs(ids).logits
    got, _ = streamed(model, ids, sizes)
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0)


def test_greedy_tokens_equal_those_of_transformers(both: Both) -> None:
    model, theirs = both()
    prompt = tokens(1, 19)
    with torch.no_grad():
        wanted = theirs.generate(prompt, max_new_tokens=40, do_sample=False)[0, 19:]
        cache, out = model.init_cache(1), []
        logits = model.forward_logits(prompt, cache)
        for _ in wanted:
            out.append(int(logits.argmax()))
            logits = model.forward_logits(torch.tensor([out[-1:]]), cache)
    assert out == wanted.tolist()


@pytest.mark.parametrize("sink_tokens", [0, 3])
def test_windows_in_every_layer_equal_transformers_with_masks(both: Both, sink_tokens: int) -> None:
    """Full layers of transformers take a mask: the window and the kept tokens, drawn by hand."""
    size = 11
    config = both()[0].config
    model, theirs = both(policy=config.policy(AttnWindow(size, sink_tokens=sink_tokens)))
    at = torch.arange(45)

    def mask(size: int, sink_tokens: int) -> torch.Tensor:
        seen = (at[None] <= at[:, None]) & ((at[:, None] - at[None] < size) | (at[None] < sink_tokens))
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None].expand(2, 1, -1, -1)

    masks = {"full_attention": mask(size, sink_tokens), "sliding_attention": mask(WINDOW, 0)}
    with torch.no_grad():
        wanted = theirs(tokens(), attention_mask=masks).logits
        assert (wanted - theirs(tokens()).logits).abs().max() > 0.1
        torch.testing.assert_close(model(tokens()), wanted, atol=ATOL, rtol=0)
    got, cache = streamed(model, tokens(), [20, 1, 1, 13, 10])
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0)
    assert [layer.slots for layer in cache] == [WINDOW, size + sink_tokens] * 2


def test_relative_sinks_leave_the_first_tokens_as_near_as_in_training(both: Both) -> None:
    """Beyond the window a kept token stands at the same distance for ever; up to there nothing changes."""
    config = both()[0].config
    window = AttnWindow(11, sink_tokens=3, relative_sinks=True)
    relative, _ = both(policy=config.policy(window))
    absolute, _ = both(policy=config.policy(AttnWindow(11, sink_tokens=3)))
    got, cache = streamed(relative, tokens(), [20, 1, 1, 13, 10])
    with torch.no_grad():
        full, other = relative(tokens()), absolute(tokens())
    torch.testing.assert_close(got, full, atol=ATOL, rtol=0)
    torch.testing.assert_close(full[:, :14], other[:, :14], atol=ATOL, rtol=0)
    assert (full[:, 20:] - other[:, 20:]).abs().max() > 1e-2
    assert [layer.slots for layer in cache] == [WINDOW, 14] * 2


def test_ragged_rows_and_provisional_steps(both: Both) -> None:
    model, theirs = both()
    rows = [tokens()[0, :19], tokens()[1, :3], tokens()[0, 20:31]]
    ids = torch.full((3, 19), -1)
    ids[0], ids[1, :3], ids[2, 8:] = rows
    cache = model.init_cache(3, slack=24)  # what is written again must not have pushed out what it sees
    with torch.no_grad():
        provisional = model.forward_logits(ids, cache, commit=False)
        assert cache.position == 0
        got = model.forward_logits(ids, cache)
        torch.testing.assert_close(got, provisional, atol=1e-5, rtol=0)
        for b, row in enumerate(rows):
            torch.testing.assert_close(got[b], theirs(row[None]).logits[0, -1], atol=ATOL, rtol=0)
    assert cache.row_positions == (19, 3, 11)


def test_bf16_loses_no_more_than_transformers_in_bf16(both: Both) -> None:
    """By error against fp32, over several models: routing that flips makes a single one noisy."""
    ours, theirs_plain = [], []
    for seed in range(8):
        model, theirs = both(seed, dtype=torch.bfloat16)
        ids = tokens(length=64)
        with torch.no_grad():
            exact = theirs(ids).logits
            plain = copy.deepcopy(theirs).to(torch.bfloat16)(ids).logits
            got, _ = streamed(model, ids, [40, 1, 23])
        assert got.dtype == torch.bfloat16
        ours.append((got.float() - exact).abs())
        theirs_plain.append((plain.float() - exact).abs())
    assert torch.stack(ours).mean() <= 1.1 * torch.stack(theirs_plain).mean()
    assert torch.stack(ours).max() <= 2 * torch.stack(theirs_plain).max()


def test_norms_round_once_as_those_of_transformers(both: Both) -> None:
    """bf16 tells before and after apart: in every norm nearly all bits must agree."""
    model, theirs = both(dtype=torch.bfloat16)
    plain = copy.deepcopy(theirs).to(torch.bfloat16).model
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    pairs = [(model.norm, plain.norm)]
    for ours, layer in zip(model.layers, plain.layers, strict=True):
        pairs += [(ours.attention_norm, layer.input_layernorm), (ours.mlp_norm, layer.post_attention_layernorm)]
    with torch.no_grad():
        for ours, wanted in pairs:
            assert (ours(x) != wanted(x)).float().mean() < 0.002


def test_gradients_equal_those_of_transformers(both: Both) -> None:
    """Of the full forward, to every parameter: router, experts, sinks, norms, the fused projection."""
    model, theirs = both()
    ids = tokens()
    for logits in (model(ids), theirs(ids).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    pairs = {
        "embed.weight": theirs.model.embed_tokens.weight.grad,
        "norm.weight": theirs.model.norm.weight.grad,
        "head.weight": theirs.lm_head.weight.grad,
    }
    for i, layer in enumerate(theirs.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for kind in ("weight", "bias"):
            parts = [getattr(getattr(attention, f"{p}_proj"), kind).grad for p in "qkv"]
            pairs[f"layers.{i}.attention.qkv.{kind}"] = torch.cat(parts)
            pairs[f"layers.{i}.attention.out.{kind}"] = getattr(attention.o_proj, kind).grad
            pairs[f"layers.{i}.mlp.router.{kind}"] = getattr(mlp.router, kind).grad
        pairs[f"layers.{i}.attention.sinks"] = attention.sinks.grad
        pairs[f"layers.{i}.attention_norm.weight"] = layer.input_layernorm.weight.grad
        pairs[f"layers.{i}.mlp_norm.weight"] = layer.post_attention_layernorm.weight.grad
        for name in ("gate_up", "down"):
            pairs[f"layers.{i}.mlp.experts.{name}"] = getattr(mlp.experts, f"{name}_proj").grad.mT
            pairs[f"layers.{i}.mlp.experts.{name}_bias"] = getattr(mlp.experts, f"{name}_proj_bias").grad
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == pairs.keys()
    for name, wanted in pairs.items():
        assert wanted.abs().max() > 1e-4, name
        torch.testing.assert_close(ours[name], wanted, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_a_new_model_learns() -> None:
    """From its own initial weights: the loss of a short repeated text falls to a fraction."""
    torch.manual_seed(0)
    model = GptOss(GptOssConfig.from_config(SIZES | {"num_hidden_layers": 2}))
    ids = tokens(1, 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_tokens_outside_the_vocabulary_commit_nothing(both: Both) -> None:
    model, _ = both()
    cache = model.init_cache(1)
    with torch.no_grad():
        model.forward_logits(tokens(1, 4), cache)
        with pytest.raises(ValueError, match="id 256 at row 0, column 1 is outside the vocabulary of 256 ids"):
            model.forward_logits(torch.tensor([[3, VOCABULARY]]), cache)
    assert cache.position == 4
