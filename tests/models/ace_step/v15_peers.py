"""Small ACE-Step 1.5 models of diffusers' own classes with random weights, and ours with the same."""

from typing import Any

import torch
from torch import Tensor, nn

from longburn.models.ace_step.v15 import AceStep15, AceStep15Config, diffusers_rules
from longburn.models.ace_step.v15.names import DIFFUSERS_PARTS
from longburn.weights import StateDictSource, load_checkpoint

ACOUSTIC, WORDS = 8, 24  # channels of latents, size of the text encoder

# The official configuration's keys. "xl" has a transformer wider than its encoders, whose heads do not make its size.
TINY: dict[str, dict[str, Any]] = {
    "2b": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "xl": {
        "hidden_size": 40,
        "intermediate_size": 152,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "encoder_hidden_size": 32,
        "encoder_intermediate_size": 96,
        "encoder_num_attention_heads": 4,
        "encoder_num_key_value_heads": 2,
    },
}
COMMON: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 8,
    "in_channels": 3 * ACOUSTIC,
    "audio_acoustic_hidden_dim": ACOUSTIC,
    "timbre_hidden_dim": ACOUSTIC,
    "text_hidden_dim": WORDS,
    "timbre_fix_frame": 20,
    "num_lyric_encoder_hidden_layers": 3,
    "num_timbre_encoder_hidden_layers": 2,
    "rope_theta": 1_000_000.0,
    "model_version": "turbo",
    "is_turbo": True,
}


def tiny_config(shape: str = "2b") -> AceStep15Config:
    return AceStep15Config.from_config(official_settings(shape))


def official_settings(shape: str = "2b") -> dict[str, Any]:
    return COMMON | TINY[shape]


def diffusers_parts(shape: str = "2b", seed: int = 0) -> dict[str, nn.Module]:
    """Diffusers' four modules: weights N(0, 0.2), norms 1 + N(0, 0.1)."""
    from diffusers import AceStepTransformer1DModel
    from diffusers.pipelines.ace_step import (
        AceStepAudioTokenDetokenizer,
        AceStepAudioTokenizer,
        AceStepConditionEncoder,
    )

    config = tiny_config(shape)
    every = {"head_dim": 16, "sliding_window": 8, "rope_theta": 1_000_000.0}
    inner = {name: getattr(config, f"encoder_{name}") for name in TINY["2b"]} | every
    codec = inner | {"audio_acoustic_hidden_dim": ACOUSTIC}
    parts: dict[str, nn.Module] = {
        "transformer": AceStepTransformer1DModel(
            **{name: getattr(config, name) for name in TINY["2b"]},
            **every,
            num_hidden_layers=4,
            in_channels=3 * ACOUSTIC,
            audio_acoustic_hidden_dim=ACOUSTIC,
            encoder_hidden_size=config.encoder_hidden_size,
            is_turbo=True,
            model_version="turbo",
        ),
        "condition_encoder": AceStepConditionEncoder(
            **inner,
            text_hidden_dim=WORDS,
            timbre_hidden_dim=ACOUSTIC,
            num_lyric_encoder_hidden_layers=3,
            num_timbre_encoder_hidden_layers=2,
        ),
        "audio_tokenizer": AceStepAudioTokenizer(**codec, fsq_dim=config.encoder_hidden_size),
        "audio_token_detokenizer": AceStepAudioTokenDetokenizer(**codec),
    }
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in parts.values():
            for name, parameter in part.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * drawn if "norm" in name else 0.2 * drawn)
    silence = parts["condition_encoder"].silence_latent
    silence.copy_(torch.randn(silence.shape, generator=generator))
    return {name: part.eval() for name, part in parts.items()}


def ours_of(parts: dict[str, nn.Module], shape: str = "2b") -> AceStep15:
    """Our model with diffusers' weights, loaded by the rules."""
    config = tiny_config(shape)
    model = AceStep15(config)
    for directory, rules in diffusers_rules(config).items():
        load_checkpoint(
            model.get_submodule(DIFFUSERS_PARTS[directory]), StateDictSource(parts[directory].state_dict()), rules
        )
    return model.eval()


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_parity(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """No number differs by more than `tolerance` of the largest one."""
    assert got.shape == wanted.shape, f"{tuple(got.shape)} instead of {tuple(wanted.shape)}"
    difference, largest = (got - wanted).abs().max().item(), wanted.abs().max().item()
    assert difference <= tolerance * largest, f"differs by {difference:.2e}, the largest number is {largest:.2e}"
