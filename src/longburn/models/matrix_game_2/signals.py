"""Keys and mouse as the model hears them: checked, one action a picture, and in windows of twelve pictures."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longburn.models.matrix_game_2.config import BLOCK_FRAMES, MatrixGame2Config

MOUSE_LIMIT = 1.0  # the released models were shown views that turn by 0.1
Signal = Tensor | Sequence[float] | Sequence[Sequence[float]]


class Signals:
    """The actions of B streams, of which only those that a coming block may hear are kept.

    Latent frame l > 0 stands for the pictures 4 l - 3 .. 4 l, and hears the actions of the `window` pictures before
    4 l; before the first picture, the first action counts.
    """

    def __init__(self, config: MatrixGame2Config, batch: int) -> None:
        self.config, self.batch = config, batch
        self._keyboard: Tensor | None = None  # [B, pictures, signals]: the last ones
        self._mouse: Tensor | None = None

    def pictures(self, first: int) -> int:
        """How many pictures a block that starts at this latent frame shows: 9 at the start of a video, else 12."""
        pace = self.config.action_config.vae_time_compression_ratio
        return BLOCK_FRAMES * pace if first else (BLOCK_FRAMES - 1) * pace + 1

    def checked(self, keyboard: Signal, mouse: Signal | None, first: int) -> tuple[Tensor, Tensor | None]:
        """One action a picture of the block, `[B, pictures, signals]` each, in fp32 on the CPU.

        Raises:
            ValueError: another shape, or a number out of range.
        """
        action, n = self.config.action_config, self.pictures(first)
        keys = self._spread("keyboard", keyboard, action.keyboard_dim_in, n)
        if not bool(((keys == 0) | (keys == 1)).all()):
            raise ValueError(
                f"Rollout.step: keyboard holds {_worst(keys - keys.round().clamp(0, 1), keys)}, wanted 0 or 1 a key"
            )
        if self.config.mode == "templerun" and not bool((keys.sum(-1) == 1).all()):
            pressed = int(keys.sum(-1).flatten()[(keys.sum(-1).flatten() != 1).nonzero()[0, 0]])
            raise ValueError(
                f"Rollout.step: keyboard holds {pressed} actions at once; templerun wants exactly one (nomove is one)"
            )
        if not action.enable_mouse:
            if mouse is not None:
                raise ValueError(
                    f"Rollout.step: mouse was given, but the {self.config.mode} model has none; leave it out"
                )
            return keys, None
        moved = self._spread("mouse", [0.0] * action.mouse_dim_in if mouse is None else mouse, action.mouse_dim_in, n)
        if not bool((moved.abs() <= MOUSE_LIMIT).all()):  # NaN is not
            raise ValueError(
                f"Rollout.step: mouse holds {_worst(moved.abs().nan_to_num(torch.inf), moved)}, wanted numbers within "
                f"-{MOUSE_LIMIT} .. {MOUSE_LIMIT} (the models were trained with 0.1)"
            )
        return keys, moved

    def hear(self, keyboard: Tensor, mouse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Take in a block's actions from `checked`; what its frames hear, `[B, 3, window, signals]` each."""
        self._keyboard = self._extended(self._keyboard, keyboard)
        self._mouse = None if mouse is None else self._extended(self._mouse, mouse)
        return self._windows(self._keyboard), None if self._mouse is None else self._windows(self._mouse)

    def reset(self) -> None:
        """Forget all actions."""
        self._keyboard = self._mouse = None

    def _spread(self, name: str, signal: Signal, size: int, n: int) -> Tensor:
        try:
            given = torch.as_tensor(signal)
            if given.is_complex():
                raise TypeError("complex numbers")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"Rollout.step: {name} is no array of numbers ({error}), wanted [{size}]") from error
        given = given.to("cpu", torch.float32)
        B, shape = self.batch, tuple(given.shape)
        if shape not in ((size,), (B, size), (B, n, size)):
            raise ValueError(
                f"Rollout.step: {name} is {shape}, wanted [{size}], [{B}, {size}] or, one a picture, "
                f"[{B}, {n}, {size}] for the {self.config.mode} model"
            )
        return given.expand(B, size)[:, None].expand(B, n, size) if given.dim() < 3 else given

    def _extended(self, held: Tensor | None, new: Tensor) -> Tensor:
        action = self.config.action_config
        if held is None:
            held = new[:, :1].expand(-1, action.window, -1)
        kept = action.window - action.vae_time_compression_ratio + 1
        return torch.cat([held if held.shape[1] == action.window else held[:, -kept:], new], 1)

    def _windows(self, held: Tensor) -> Tensor:
        action = self.config.action_config
        return held.unfold(1, action.window, action.vae_time_compression_ratio)[:, :BLOCK_FRAMES].transpose(2, 3)


def _worst(by: Tensor, values: Tensor) -> float:
    return float(values.flatten()[by.abs().flatten().argmax()])
