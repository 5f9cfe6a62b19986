"""Matrix-Game 2 as a world model: an action in, twelve pictures out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longburn.interact import WorldStep
from longburn.models.matrix_game_2.config import KEYS
from longburn.models.matrix_game_2.dit import MatrixGame2
from longburn.models.matrix_game_2.rollout import Rollout
from longburn.models.matrix_game_2.settings import RolloutSettings
from longburn.models.matrix_game_2.vae_memory import FrameMemory, StreamedDecoder, to_uint8
from longburn.models.matrix_game_2.vae_recorded import RecordedDecoder

if TYPE_CHECKING:
    from gymnasium.spaces import Space

FPS = 25.0  # of the pictures that the models were trained on
PIXELS = 8  # of a picture to one of a latent frame, each way
TURN = 0.1  # of a view, in one block
_WALK = {"w": ("forward", "forward"), "s": ("back", "back"), "a": ("left", "left"), "d": ("right", "right")}
_LOOK = {"up": ("look up", (1, 0)), "down": ("look down", (-1, 0)), "left": ("look left", (0, -1))}
_LOOK |= {"right": ("look right", (0, 1))}
_RUN = {"w": "jump", "s": "slide", "a": "left-side", "d": "right-side", "left": "turn-left", "right": "turn-right"}


class StartImage(NamedTuple):
    """A start image as the model sees it: pixels `[1, 3, H, W]` in -1 .. 1, CLIP tokens `[1, 257, 1280]`, latents
    `[1, 16, K, H / 8, W / 8]`."""

    picture: Tensor
    clip: Tensor
    latents: Tensor


class MatrixGameWorld:
    """One stream of Matrix-Game 2, for `longburn.interact`.

    An action is `{"keyboard": 0 or 1 a key, "mouse": (pitch, yaw) within -1 .. 1}`, of templerun its number; it is held
    for the twelve pictures (nine at the start) that come of a step. The observation is the last picture.

    Args:
        model: the transformer.
        decoder: from latents to pictures.
        look: from what `reset` is given as `image` to a start image.
        image: of a reset that names none.
        settings: of the session.

    Raises:
        ValueError: a model of no released mode, or settings that do not fit it.
    """

    def __init__(
        self,
        model: MatrixGame2,
        decoder: StreamedDecoder,
        look: Callable[[Any], StartImage],
        *,
        image: Any = None,
        settings: RolloutSettings | None = None,
    ) -> None:
        if model.config.mode not in KEYS:
            raise ValueError(f"MatrixGameWorld: a {model.config.mode} model, wanted one of {', '.join(KEYS)}")
        self.model, self.decoder, self.look, self.image = model, decoder, look, image
        self._pictures = RecordedDecoder(decoder)
        self.mode, self.settings = model.config.mode, settings or RolloutSettings()
        self.settings.check(model.config)
        self._rollout: Rollout | None = None
        self._memory = FrameMemory()
        self._stream: torch.cuda.Stream | None = None

    @property
    def observation_space(self) -> Space[Any]:
        from gymnasium.spaces import Box

        return Box(0, 255, (*self.frame_size, 3), np.uint8)

    @property
    def action_space(self) -> Space[Any]:
        from gymnasium.spaces import Box, Dict, Discrete, MultiBinary

        keys = len(KEYS[self.mode])
        if self.mode == "templerun":
            return Discrete(keys)
        return Dict({"keyboard": MultiBinary(keys), "mouse": Box(-1.0, 1.0, (2,), np.float32)})

    @property
    def frame_size(self) -> tuple[int, int]:
        return PIXELS * self.settings.latent_size[0], PIXELS * self.settings.latent_size[1]

    @property
    def fps(self) -> float:
        return FPS

    @property
    def controls(self) -> Mapping[str, str]:
        return controls_of(self.mode)

    def action_of(self, keys: Sequence[str]) -> Any:
        """Keys that were pressed together; in templerun the last one counts."""
        names = KEYS[self.mode]
        if self.mode == "templerun":
            pressed = [_RUN[key] for key in keys if key in _RUN]
            return names.index(pressed[-1] if pressed else "nomove")
        held = {_WALK[key][1] for key in keys if key in _WALK}
        turns = np.array([_LOOK[key][1] for key in set(keys) if key in self.controls and key in _LOOK] or [(0, 0)])
        mouse = (TURN * turns.sum(0)).astype(np.float32)
        return {"keyboard": np.array([name in held for name in names], dtype=np.int8), "mouse": mouse}

    @torch.no_grad()
    def reset(self, *, seed: int, options: Mapping[str, Any] | None = None) -> WorldStep:
        """Begin at a start image, which is what is seen.

        Args:
            options: "image": whatever `look` reads.
        """
        given = dict(options or {})
        image = given.pop("image", self.image)
        if given:
            raise ValueError(f"MatrixGameWorld.reset: no option {', '.join(map(repr, given))}; there is 'image'")
        if image is None:
            raise ValueError("MatrixGameWorld.reset: no start image; give options={'image': ...}")
        start = self.look(image)
        wanted = (1, 3, *self.frame_size)
        if tuple(start.picture.shape) != wanted:
            raise ValueError(f"MatrixGameWorld.reset: the image is {list(start.picture.shape)}, wanted {list(wanted)}")
        if self._rollout is None:
            self._rollout = Rollout(self.model, start.clip, start.latents, seeds=[seed], settings=self.settings)
        else:
            self._rollout.reset([seed], start.clip, start.latents)
        self._memory.reset()
        frames = _shown(start.picture[:, :, None])
        return WorldStep(frames[-1], frames)

    @torch.no_grad()
    def step(self, action: Any) -> WorldStep:
        """Twelve pictures on, nine at the start.

        Raises:
            ValueError: no reset yet, or an action of another kind; nothing has changed then.
            RuntimeError: a step before was interrupted.
        """
        if self._rollout is None:
            raise ValueError("MatrixGameWorld.step: nothing to go on from; call reset first")
        if self._memory.frames != self._rollout.frames:
            raise RuntimeError("MatrixGameWorld.step: the call before was interrupted before its pictures; call reset")
        latents = self._rollout.step(*self._signals(action))
        frames = self._decoded(latents, self._rollout.ready)
        return WorldStep(frames[-1], frames)

    def _decoded(self, latents: Tensor, ready: torch.cuda.Event | None) -> NDArray[np.uint8]:
        """The block's pictures; on CUDA beside the pass that remembers it, for which nobody has to wait."""
        like = self.decoder.like
        if ready is None or not like.is_cuda:
            return _shown(self._pictures.decode(latents.to(like.device, like.dtype), self._memory))
        self._stream = self._stream or torch.cuda.Stream(like.device)  # type: ignore[no-untyped-call]
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            return _shown(self._pictures.decode(latents.to(like.device, like.dtype), self._memory))

    def _signals(self, action: Any) -> tuple[Any, Any]:
        """Keys and mouse, for `Rollout.step`, which checks their numbers."""
        keys = len(KEYS[self.mode])
        if self.mode == "templerun":
            if isinstance(action, np.ndarray) and not action.shape:
                action = action[()]
            if not isinstance(action, int | np.integer) or not 0 <= action < keys:
                raise ValueError(f"MatrixGameWorld.step: action {action!r}, wanted a number within 0 .. {keys - 1}")
            return [float(i == action) for i in range(keys)], None
        if not isinstance(action, Mapping) or set(action) != {"keyboard", "mouse"}:
            came = sorted(map(str, action)) if isinstance(action, Mapping) else repr(action)
            raise ValueError(f"MatrixGameWorld.step: action {came}, wanted a dictionary of keyboard and mouse")
        return _numbers("keyboard", action["keyboard"]), _numbers("mouse", action["mouse"])


def controls_of(mode: str) -> Mapping[str, str]:
    """What each key does in a model of this mode."""
    if mode == "templerun":
        return MappingProxyType(_RUN)
    walk = {key: word for key, (word, name) in _WALK.items() if name in KEYS[mode]}
    if mode == "gta_drive":
        return walk | {key: f"steer {key}" for key in ("left", "right")}
    return walk | {key: word for key, (word, _) in _LOOK.items()}


def _numbers(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"MatrixGameWorld.step: {name} is no array of numbers ({error})") from error


def _shown(pictures: Tensor) -> NDArray[np.uint8]:
    """`[1, 3, n, H, W]` in -1 .. 1 to `[n, H, W, 3]` on the host."""
    frames: NDArray[np.uint8] = to_uint8(pictures)[0].contiguous().cpu().numpy()
    return frames
