"""How a session with Matrix-Game 2 runs."""

from dataclasses import dataclass
from typing import Any

from longburn.diffusion import Schedule
from longburn.models.matrix_game_2.config import LATENT_SIZE, PATCH, STEPS, MatrixGame2Config
from longburn.models.matrix_game_2.frames import FrameWindow, number, numbers, settle, whole
from longburn.models.matrix_game_2.sampler import SHIFT, noise_levels


@dataclass(frozen=True)
class RolloutSettings:
    """How a session runs. The defaults are those of the released model.

    Args:
        window: latent frames that a block sees, itself and kept ones among them; None: the model's `local_attn_size`.
        sink_frames: first frames that are kept for ever; None: the model's `sink_size`.
        relative_sinks, past_log_weights: see `FrameWindow`.
        steps: of the sampler, counted from 1000 down; None: those of the model's mode.
        shift: of the sampler.
        packed: keep the video's keys and values as fp8, half the memory.
        latent_size: rows and columns of a latent frame, an eighth of a picture's.
        record: replay CUDA graphs once the window is full.

    Raises:
        ValueError: a setting of another type, or an odd latent_size.
    """

    window: int | None = None
    sink_frames: int | None = None
    relative_sinks: bool = False
    past_log_weights: tuple[float, ...] = ()
    steps: tuple[int, ...] | None = None
    shift: float = SHIFT
    packed: bool = False
    latent_size: tuple[int, int] = LATENT_SIZE
    record: bool = True

    def __post_init__(self) -> None:
        for name in ("window", "sink_frames"):
            if getattr(self, name) is not None:
                settle(self, name, whole, "a whole number of latent frames")
        if self.steps is not None:
            settle(self, "steps", _wholes, "falling whole numbers")
        settle(self, "past_log_weights", numbers, "numbers or -inf, one an age")
        settle(self, "shift", number, "a number above 0")
        settle(self, "latent_size", _pair, "two even numbers, rows and columns")
        H, W = self.latent_size
        if H % PATCH or W % PATCH or min(H, W) < PATCH:
            raise ValueError(
                f"RolloutSettings: latent_size is {(H, W)}, wanted even numbers (pictures are 8 times as large)"
            )

    def check(self, config: MatrixGame2Config) -> None:
        """See that a model can run so.

        Raises:
            ValueError: it cannot.
        """
        self.window_of(config)
        self.levels_of(config)

    def window_of(self, config: MatrixGame2Config) -> FrameWindow:
        """What a block sees, where the settings leave it to the model.

        Raises:
            ValueError: see `FrameWindow`.
        """
        return FrameWindow(
            config.local_attn_size if self.window is None else self.window,
            config.sink_size if self.sink_frames is None else self.sink_frames,
            self.relative_sinks,
            self.past_log_weights,
        )

    def levels_of(self, config: MatrixGame2Config) -> Schedule:
        """The sampler's levels.

        Raises:
            ValueError: see `noise_levels`.
        """
        steps = STEPS.get(config.mode, STEPS["universal"]) if self.steps is None else self.steps
        return noise_levels(steps, shift=self.shift)


def _wholes(values: Any) -> tuple[int, ...]:
    return tuple(whole(value) for value in values)


def _pair(values: Any) -> tuple[int, int]:
    H, W = _wholes(values)
    return H, W
