"""A music maker with small random weights: every part and every step of the real one, and noise for sound."""

import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from longburn.models.ace_step.codecs import Oobleck, OobleckConfig
from longburn.models.ace_step.planner import Planner
from longburn.models.ace_step.v15.config import AceStep15Config
from longburn.models.ace_step.v15.model import AceStep15
from longburn.models.ace_step.v15.music import MusicMaker
from longburn.models.ace_step.v15.texts import TextEncoder
from longburn.models.qwen3 import Qwen3, Qwen3Config
from longburn.text import Tokenizer as PlannerTokenizer

CHANNELS, WORDS, LEVELS = 8, 64, (4, 4, 4)  # of latents, size of the text encoder, and of the audio tokens
CODES = 64
SPREAD = 0.2  # of random weights
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "in_channels": 3 * CHANNELS,
    "audio_acoustic_hidden_dim": CHANNELS,
    "timbre_hidden_dim": CHANNELS,
    "text_hidden_dim": WORDS,
    "num_lyric_encoder_hidden_layers": 2,
    "num_timbre_encoder_hidden_layers": 2,
    "fsq_input_levels": LEVELS,
    "is_turbo": True,
}
CODEC = OobleckConfig(
    encoder_hidden_size=16, decoder_channels=8, channel_multiples=(1, 1, 2, 2, 2), decoder_input_channels=CHANNELS
)


def small_music_maker(seed: int = 0, *, planner: bool = True) -> MusicMaker:
    """Random weights that the seed decides, on the CPU in fp32; some 0.6 million parameters.

    It takes what the real one takes and gives 48 kHz stereo, which is noise: nothing of it was trained.
    """
    config = AceStep15Config.from_config(CONFIG)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        text, lm = (Qwen3(_language_config(small_tokenizer(codes).get_vocab_size())) for codes in (0, CODES))
        model, codec = AceStep15(config), Oobleck(CODEC)
        for module in (model, text, lm):  # a codec's own first weights do
            for name, parameter in module.named_parameters():
                if "norm" in name:
                    parameter.normal_(1, SPREAD / 2)
                elif parameter.dim() > 1:
                    parameter.normal_(0, SPREAD)
        model.silence.normal_()
    made = None
    if planner:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "tokenizer.json"
            small_tokenizer(CODES).save(str(file))
            made = Planner(lm.eval(), PlannerTokenizer.from_file(file), codes=CODES)
    return MusicMaker(model.eval(), codec.eval(), TextEncoder(text.eval(), small_tokenizer(0)), made)


def small_tokenizer(codes: int) -> Tokenizer:
    """Bytes, the tokens of a chat, and those of codes; a text ends where there are no codes."""
    core = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    core.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    core.add_special_tokens([f"<|audio_code_{code}|>" for code in range(codes)])
    if not codes:
        end = ("<|endoftext|>", core.token_to_id("<|endoftext|>"))
        core.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    return core


def _language_config(vocabulary: int) -> Qwen3Config:
    return Qwen3Config.from_hf(
        {
            "model_type": "qwen3",
            "vocab_size": vocabulary,
            "hidden_size": WORDS,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "tie_word_embeddings": True,
        }
    )
