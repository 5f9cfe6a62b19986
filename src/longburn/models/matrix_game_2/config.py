"""The sizes of a Matrix-Game 2 model, under the names of its `config.json`."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from longburn.rope import Rope3dEncoding, RotaryEncoding

PATCH = 2  # rows and columns of a latent frame that make a token
MASK_CHANNELS = 4  # of the condition: 1 on the first frame of a video, else 0
BLOCK_FRAMES = 3  # latent frames that are made together
CLIP_TOKENS, CLIP_SIZE = 257, 1280  # of the start image, as the vision tower gives them
LATENT_SIZE = (44, 80)  # rows and columns of a latent frame: 352 x 640 pixels

MODES = ("universal", "gta_drive", "templerun")
_SIGNALS = {(4, True): "universal", (2, True): "gta_drive", (7, False): "templerun"}  # keys, and whether a mouse
KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "universal": ("forward", "back", "left", "right"),
        "gta_drive": ("forward", "back"),
        "templerun": ("nomove", "jump", "slide", "turn-left", "turn-right", "left-side", "right-side"),
    }
)
STEPS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"universal": (1000, 666, 333), "gta_drive": (1000, 666, 333), "templerun": (1000, 750, 500, 250)}
)
_SIZES = {  # and their defaults, those of the released models
    "dim": 1536,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "in_dim": 36,
    "out_dim": 16,
    "num_heads": 12,
    "num_layers": 30,
}
_ACTION_SIZES = {
    "heads_num": 16,
    "hidden_size": 128,
    "img_hidden_size": 1536,
    "keyboard_dim_in": 4,
    "keyboard_hidden_dim": 1024,
    "mouse_dim_in": 2,
    "mouse_hidden_dim": 1024,
    "vae_time_compression_ratio": 4,
    "windows_size": 3,
}
_FIXED = {"model_type": "i2v", "qk_norm": True, "cross_attn_norm": True}
_ACTION_FIXED = {"patch_size": [1, PATCH, PATCH], "qk_norm": True, "qkv_bias": False, "enable_keyboard": True}


class Ropes(NamedTuple):
    """Made once and kept: what they turn by is copied to a device the first time, which no recorded pass may do."""

    video: Rope3dEncoding  # over frames, rows and columns
    action: RotaryEncoding  # over latent frames


@dataclass(frozen=True)
class ActionConfig:
    """The modules that listen to mouse and keyboard, in the layers `blocks`.

    `hidden_size` is that of a frame's embedded keys; both attentions have `heads_num` heads. A latent frame hears the
    actions of `window` frames of video before it.
    """

    blocks: tuple[int, ...] = tuple(range(15))
    enable_mouse: bool = True
    heads_num: int = 16
    hidden_size: int = 128
    img_hidden_size: int = 1536
    keyboard_dim_in: int = 4
    keyboard_hidden_dim: int = 1024
    mouse_dim_in: int = 2
    mouse_hidden_dim: int = 1024
    rope_dim_list: tuple[int, int, int] = (8, 28, 28)
    rope_theta: float = 256.0
    vae_time_compression_ratio: int = 4
    windows_size: int = 3

    @property
    def window(self) -> int:
        """Frames of video whose actions a latent frame hears."""
        return self.windows_size * self.vae_time_compression_ratio

    @property
    def head_dim(self) -> int:
        """Of both attentions."""
        return self.keyboard_hidden_dim // self.heads_num


@dataclass(frozen=True)
class MatrixGame2Config:
    """A model's sizes. `local_attn_size` is the window and `sink_size` the kept first frames, in latent frames; the
    window counts both these and the block that is being made.

    Raises:
        ValueError: sizes that do not fit together.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    freq_dim: int = 256
    in_dim: int = 36
    out_dim: int = 16
    num_heads: int = 12
    num_layers: int = 30
    local_attn_size: int = 6
    sink_size: int = 0
    eps: float = 1e-6
    action_config: ActionConfig = field(default_factory=ActionConfig)

    def __post_init__(self) -> None:
        action = self.action_config
        _want(self.dim % self.num_heads == 0 and self.head_dim % 2 == 0, "dim and num_heads", self)
        _want(self.in_dim == 2 * self.out_dim + MASK_CHANNELS, "in_dim: twice out_dim, and 4 of the mask", self)
        _want(self.freq_dim % 2 == 0, "freq_dim: an even number", self)
        _want(action.img_hidden_size == self.dim, "img_hidden_size: dim", self)
        _want(action.keyboard_hidden_dim == action.mouse_hidden_dim, "keyboard_hidden_dim: mouse_hidden_dim", self)
        _want(action.keyboard_hidden_dim % action.heads_num == 0, "heads_num: a divisor of keyboard_hidden_dim", self)
        _want(sum(action.rope_dim_list) == action.head_dim, "rope_dim_list: the channels of a head", self)
        _want(all(0 <= i < self.num_layers for i in action.blocks), "blocks: layers that there are", self)

    @classmethod
    def released(cls, mode: str) -> "MatrixGame2Config":
        """The sizes of a released model: "universal", "gta_drive" or "templerun".

        Raises:
            ValueError: another name.
        """
        if mode not in MODES:
            raise ValueError(f"MatrixGame2Config: no release {mode!r}; there are {', '.join(MODES)}")
        keys, mouse = next(signals for signals, name in _SIGNALS.items() if name == mode)
        action = ActionConfig(keyboard_dim_in=keys, enable_mouse=mouse)
        return cls(local_attn_size=4 if mode == "gta_drive" else 6, action_config=action)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "MatrixGame2Config":
        """From the dictionary of a `config.json`. What it leaves out is as in the released models.

        Raises:
            ValueError: names the key: out of range, or a setting that this architecture does not have.
        """
        given = {key: value for key, value in config.items() if value is not None}
        action = given.get("action_config", {})
        if not isinstance(action, Mapping):
            raise ValueError(f"MatrixGame2Config: action_config is {action!r}, wanted a dictionary")
        for where, fixed in ((given, _FIXED), (action, _ACTION_FIXED)):
            for key, wanted in fixed.items():
                if (came := where.get(key, wanted)) != wanted:
                    raise ValueError(f"MatrixGame2Config: {key} is {came!r}, wanted {wanted!r}")
        rope = _counts(action, "rope_dim_list", (8, 28, 28))
        mouse = bool(action.get("enable_mouse", True))
        if mouse and _counts(action, "mouse_qk_dim_list", rope) != rope:
            raise ValueError(f"MatrixGame2Config: mouse_qk_dim_list is not rope_dim_list, {list(rope)}")
        if len(rope) != 3:
            raise ValueError(f"MatrixGame2Config: rope_dim_list is {list(rope)}, wanted time, height and width")
        keys = _count(action, "keyboard_hidden_dim", 1024)
        sizes = {name: _count(action, name, default) for name, default in _ACTION_SIZES.items()}
        return cls(
            **{name: _count(given, name, default) for name, default in _SIZES.items()},
            local_attn_size=_frames(given),
            sink_size=_count(given, "sink_size", 0, least=0),
            eps=_number(given, "eps", 1e-6),
            action_config=ActionConfig(
                **sizes | {"mouse_hidden_dim": sizes["mouse_hidden_dim"] if mouse else keys},
                blocks=_counts(action, "blocks", tuple(range(15))),
                enable_mouse=mouse,
                rope_dim_list=(rope[0], rope[1], rope[2]),
                rope_theta=_number(action, "rope_theta", 256.0),
            ),
        )

    @property
    def mode(self) -> str:
        """Which of the released models listens to the same signals; "custom" if none does."""
        action = self.action_config
        return _SIGNALS.get((action.keyboard_dim_in, action.enable_mouse), "custom")

    @property
    def head_dim(self) -> int:
        """Of the attention to video and image."""
        return self.dim // self.num_heads

    @property
    def condition_channels(self) -> int:
        """Of what is given beside the noisy latents: the mask, and the latents of the start image."""
        return self.in_dim - self.out_dim

    def ropes(self, grid: tuple[int, int]) -> Ropes:
        """For a video with this (height, width) of a latent frame in tokens.

        In the action modules the channels of height and width always stand at 0, so they do not turn.
        """
        action = self.action_config
        turns = RotaryEncoding(
            action.head_dim, theta=action.rope_theta, rotary_dim=action.rope_dim_list[0], interleaved=True
        )
        return Ropes(Rope3dEncoding(self.head_dim, grid), turns)


def _want(holds: bool, what: str, config: MatrixGame2Config) -> None:
    if not holds:
        raise ValueError(f"MatrixGame2Config: wanted {what}; got {config}")


def _frames(config: Mapping[str, Any]) -> int:
    if (size := config.get("local_attn_size", 6)) == -1:
        raise ValueError(
            "MatrixGame2Config: local_attn_size is -1, that of the bidirectional foundation model, which does not "
            "stream; wanted one of the distilled models"
        )
    return _count({"local_attn_size": size}, "local_attn_size", 6)


def _count(config: Mapping[str, Any], name: str, default: int, *, least: int = 1) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"MatrixGame2Config: {name} is {value!r}, wanted a whole number of at least {least}")
    return value


def _counts(config: Mapping[str, Any], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    values = config.get(name, default)
    if not isinstance(values, list | tuple) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"MatrixGame2Config: {name} is {values!r}, wanted a list of whole numbers of at least 0")
    return tuple(values)


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:  # NaN is not
        raise ValueError(f"MatrixGame2Config: {name} is {value!r}, wanted a finite number above 0")
    return float(value)
