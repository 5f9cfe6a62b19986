"""The sizes of ACE-Step v1's transformer, read from its `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from longburn.rope import MismatchedRotaryEncoding


@dataclass(frozen=True)
class LyricEncoderConfig:
    """Sizes of the lyric encoder, under the names of its own constructor; the `config.json` does not state them.

    input_size: of the embeddings that come in.
    output_size: M of its layers, and of what comes out.
    attention_heads: H; the head size is M / H.
    linear_units: hidden size of the feed-forward blocks.
    num_blocks: layers.
    """

    input_size: int = 1024
    output_size: int = 1024
    attention_heads: int = 16
    linear_units: int = 4096
    num_blocks: int = 6

    def __post_init__(self) -> None:
        if self.attention_heads < 1 or self.output_size % self.attention_heads:
            raise ValueError(
                f"LyricEncoderConfig: output_size {self.output_size} is not a multiple of attention_heads "
                f"{self.attention_heads}"
            )


# What other versions' configurations say of themselves, and what stands only in the training code.
_CLASS = "ACEStepTransformer2DModel"
_TRAINING_ONLY = ("ssl_encoder_depths", "ssl_names", "ssl_latent_dims")


@dataclass(frozen=True)
class AceStepV1Config:
    """Sizes under the names of the released `config.json`; the defaults are the released values (3.3 B parameters).

    `patch_size` is (the whole height of the latents, 1): a token is a frame. `max_width` and `max_position` are where
    the original's tables end, in frames; here nothing ends there. `lyric_encoder` has no key in the file.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    in_channels: int = 8
    num_layers: int = 24
    inner_dim: int = 2560
    attention_head_dim: int = 128
    num_attention_heads: int = 20
    mlp_ratio: float = 2.5
    out_channels: int = 8
    max_position: int = 32768
    rope_theta: float = 1_000_000.0
    speaker_embedding_dim: int = 512
    text_embedding_dim: int = 768
    lyric_encoder_vocab_size: int = 6693
    lyric_hidden_size: int = 1024
    patch_size: tuple[int, int] = (16, 1)
    max_height: int = 16
    max_width: int = 32768
    lyric_encoder: LyricEncoderConfig = field(default_factory=LyricEncoderConfig)

    def __post_init__(self) -> None:
        if self.inner_dim != self.num_attention_heads * self.attention_head_dim:
            raise ValueError(
                f"AceStepV1Config: inner_dim {self.inner_dim} is not num_attention_heads {self.num_attention_heads} "
                f"times attention_head_dim {self.attention_head_dim}"
            )
        if tuple(self.patch_size) != (self.max_height, 1):
            raise ValueError(
                f"AceStepV1Config: patch_size is {self.patch_size}, wanted ({self.max_height}, 1): the whole height "
                "(max_height) of one frame"
            )
        lyrics = self.lyric_encoder
        if lyrics.input_size != self.lyric_hidden_size:
            raise ValueError(
                f"AceStepV1Config: lyric_hidden_size is {self.lyric_hidden_size}, but the lyric encoder's input_size "
                f"is {lyrics.input_size}"
            )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, lyric_encoder: LyricEncoderConfig | None = None
    ) -> "AceStepV1Config":
        """From the dictionary of a `config.json`. Absent keys have the released values.

        lyric_encoder: its sizes; default the released ones, for embeddings of `lyric_hidden_size`.

        Raises:
            ValueError: another model's or version's configuration, an unknown key, or a value out of range.
        """
        kind = config.get("_class_name", config.get("model_type", _CLASS))
        if kind != _CLASS:
            raise ValueError(
                f"AceStepV1Config: the configuration is of {kind!r}, wanted {_CLASS!r}, the transformer of ACE-Step v1"
            )
        known = {f.name for f in fields(cls)} - {"lyric_encoder"}
        stated = {key: value for key, value in config.items() if not key.startswith("_") and key not in _TRAINING_ONLY}
        if unknown := sorted(stated.keys() - known):
            raise ValueError(f"AceStepV1Config: unknown key {unknown[0]!r}; wanted some of {', '.join(sorted(known))}")
        sizes = {key: _checked(key, value) for key, value in stated.items()}
        hidden = sizes.get("lyric_hidden_size", cls.lyric_hidden_size)
        return cls(**sizes, lyric_encoder=lyric_encoder or LyricEncoderConfig(input_size=hidden))

    @property
    def mlp_hidden(self) -> int:
        """Channels of the feed-forward block behind its gate."""
        return int(self.inner_dim * self.mlp_ratio)

    @property
    def rope(self) -> MismatchedRotaryEncoding:
        """The position encoding of frames, and of places in the condition."""
        return MismatchedRotaryEncoding(self.attention_head_dim, theta=self.rope_theta)


def _checked(key: str, value: Any) -> Any:
    """The value in the field's type."""
    if key == "patch_size":
        if not isinstance(value, list | tuple) or [type(size) for size in value] != [int, int] or min(value) < 1:
            raise ValueError(f"AceStepV1Config: patch_size is {value!r}, wanted two whole numbers of at least 1")
        return tuple(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"AceStepV1Config: {key} is {value!r}, wanted a number above 0")
    if key not in ("mlp_ratio", "rope_theta") and not isinstance(value, int):
        raise ValueError(f"AceStepV1Config: {key} is {value!r}, wanted a whole number of at least 1")
    return value
