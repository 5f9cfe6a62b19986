"""A real model on real text: the same numbers as transformers, however the text is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from emma import TEXT

from longburn import AttnWindow
from longburn.generation import GenerationConfig, generate
from longburn.models import LoadedModel, load_model
from longburn.models.llama import hf_rules
from longburn.weights import save_checkpoint


@pytest.fixture(scope="module")
def theirs(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' model with our dequantised weights, which go to it through a file in its own layout.

    (It can read the GGUF by itself, but takes most of a minute to do so.)
    """
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = smollm2.model.config
    file: Path = tmp_path_factory.mktemp("smollm2") / "model.safetensors"
    save_checkpoint(smollm2.model, file, hf_rules(config))
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                rms_norm_eps=config.rms_norm_eps,
                tie_word_embeddings=True,
                max_position_embeddings=8192,
                rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            )
        )
    found = model.load_state_dict(load_file(file), strict=False, assign=True)
    assert (found.missing_keys, found.unexpected_keys) == (["lm_head.weight"], [])
    model.tie_weights()
    rotary = type(model.model.rotary_emb)(model.config)  # its frequencies are in no file
    model.model.rotary_emb = rotary
    file.unlink()
    return model.eval()


@pytest.fixture(scope="module")
def text(smollm2: LoadedModel) -> list[int]:
    return smollm2.tokenizer.encode(TEXT)


def test_the_file_is_the_model_that_it_says(smollm2: LoadedModel) -> None:
    config = smollm2.model.config
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    assert sizes == (49152, 576, 1536, 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (8192, pytest.approx(1e-5))
    assert config.rope.theta == 100_000.0
    assert smollm2.model.head.weight is smollm2.model.embed.weight
    assert sum(parameter.numel() for parameter in smollm2.model.parameters()) == 134_515_008


def test_logits_equal_those_of_transformers(smollm2: LoadedModel, theirs: Any, text: list[int]) -> None:
    tokens = torch.tensor([text])
    with torch.no_grad():
        wanted = theirs(tokens).logits[0]
        assert (wanted.softmax(-1).gather(1, tokens[0].roll(-1)[:, None]).log()[:-1].mean()) > -4.0  # it reads English
        cache = smollm2.model.init_cache(1)
        chunks = tokens.split([250, 1, 1, 100, len(text) - 352], 1)
        got = torch.cat([smollm2.model.forward_logits(c, cache, all_positions=True)[0] for c in chunks])
    assert (got - wanted).abs().max() <= 1e-3


def test_greedy_text_equals_that_of_transformers(smollm2: LoadedModel, theirs: Any) -> None:
    """200 tokens, each the one that transformers ranks first after the same beginning."""
    prompt = smollm2.tokenizer.encode(chat("Write a short story about a fox who learns to read."))
    events = list(
        generate(smollm2.model, [prompt], config=GenerationConfig(max_new_tokens=200), tokenizer=smollm2.tokenizer)
    )
    said = [event.token for event in events]
    with torch.no_grad():
        wanted = theirs(torch.tensor([prompt + said])).logits[0].argmax(-1).tolist()
    assert said == wanted[len(prompt) - 1 : -1]
    assert "".join(event.text for event in events) == smollm2.tokenizer.decode(said)
    assert len(set(said)) > 60  # a text, not one sentence for ever


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_chunk_sizes_change_no_token(smollm2: LoadedModel, text: list[int]) -> None:
    """Read whole, and, in more than one of the largest chunks, through a window that it rolls over."""
    rolling = load_model(smollm2.path, window=AttnWindow(24, sink_tokens=4, relative_sinks=True)).model
    for model, prompt in ((smollm2.model, text[:40]), (rolling, text[:60])):
        runs = []
        for size in (1, 7, 32, 50):
            config = GenerationConfig(max_new_tokens=8, chunk_size=size)
            runs.append([event.token for event in generate(model, [prompt], config=config)])
        assert runs[0] == runs[1] == runs[2] == runs[3]


def test_bf16_reads_the_same_text(smollm2: LoadedModel, text: list[int]) -> None:
    """Not the same bits, but the same English: perplexity within 2 % of fp32."""
    half = load_model(smollm2.path, dtype=torch.bfloat16).model
    tokens = torch.tensor([text[:200]])
    losses = []
    for model in (smollm2.model, half):
        with torch.no_grad():
            cache = model.init_cache(1)
            logits = model.forward_logits(tokens, cache, all_positions=True)[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).exp().item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
