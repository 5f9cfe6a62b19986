"""A session with Matrix-Game 2: actions in, blocks of latent video out, for as long as one likes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longburn.models.matrix_game_2.config import (
    BLOCK_FRAMES,
    CLIP_SIZE,
    CLIP_TOKENS,
    MASK_CHANNELS,
    PATCH,
)
from longburn.models.matrix_game_2.dit import MatrixGame2
from longburn.models.matrix_game_2.frames import Caches, place_of
from longburn.models.matrix_game_2.passes import Passes
from longburn.models.matrix_game_2.sampler import BlockNoise
from longburn.models.matrix_game_2.settings import RolloutSettings
from longburn.models.matrix_game_2.signals import Signal, Signals


@dataclass(frozen=True)
class _Made:
    """What a finished frame was made of, to be read again."""

    latent: Tensor  # [B, 16, H, W]
    condition: Tensor  # [B, 20, H, W]
    keyboard: Tensor  # [B, window, signals]
    mouse: Tensor | None


class Rollout:
    """B streams that go on in step, each with noise of its own. Memory and time of a block stay the same for ever.

    Without kept frames the model sees differences of time only, so no stream is too long for it.

    Args:
        model: the transformer.
        clip: the start images' tokens `[B, 257, 1280]`, from the vision tower.
        start: their latents `[B, 16, K, H, W]`: those of a video that begins with the image and is grey then. The last
            one stands for all further frames.
        seeds: one a stream; None draws one.
        settings: see there.

    Attributes:
        frames: latent frames made so far.

    Raises:
        ValueError: shapes that disagree, or settings that do not fit the model.
    """

    def __init__(
        self,
        model: MatrixGame2,
        clip: Tensor,
        start: Tensor,
        *,
        seeds: Sequence[int | None] = (0,),
        settings: RolloutSettings | None = None,
    ) -> None:
        self.model, self.settings = model, settings or RolloutSettings()
        config, chosen, device = model.config, self.settings, model.device
        if not seeds:
            raise ValueError("Rollout: no seeds, wanted one a stream")
        batch = self.batch = len(seeds)
        self._check(clip, start, None)
        window, levels = chosen.window_of(config), chosen.levels_of(config)
        H, W = chosen.latent_size
        tokens = (H // PATCH) * (W // PATCH)
        self.window = window
        with torch.no_grad():
            self.caches = Caches(config, window, batch, tokens, dtype=model.dtype, device=device, packed=chosen.packed)
            self._passes = Passes(model, self.caches, model.look(clip.to(device)), (H, W), levels, record=chosen.record)
        self._noise = BlockNoise(tuple(self._passes.x.shape), len(levels) - 1, seeds, device)
        self._signals = Signals(config, batch)
        self._start = start.to(device, model.dtype, copy=True)
        self._origin = 0  # the frame at which `start` begins
        self._oldest = 0  # the first of the frames that were written one after the other
        self._made: dict[int, _Made] = {}
        self._whole = True  # False in the middle of a change
        self.frames = 0

    @property
    def pictures(self) -> int:
        """How many pictures the next block shows: 9 at the start of a video, else 12."""
        return self._signals.pictures(self.frames)

    @property
    def ready(self) -> torch.cuda.Event | None:
        """On CUDA, passed as soon as the last block's latents are there, so that another stream may decode them while
        this one still remembers them."""
        return self._passes.ready

    @property
    def recorded(self) -> bool:
        """Whether blocks are replayed as CUDA graphs."""
        return self._passes.recorded

    @property
    def why_not(self) -> str | None:
        """Why blocks are never replayed, or None."""
        return self._passes.why_not

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return self.caches.nbytes

    @torch.no_grad()
    def step(self, keyboard: Signal, mouse: Signal | None = None) -> Tensor:
        """Make the next block.

        Args:
            keyboard: 0 or 1 a key: `[keys]` for all streams, `[B, keys]`, or one a picture, `[B, pictures, keys]`.
            mouse: likewise, pitch and yaw within -1 .. 1 (the models were trained with 0.1); None: it rests.

        Returns:
            Latents `[B, 16, 3, H, W]`, fp32 at least, on the model's device. The host does not wait for them, and they
            are there before the block is remembered: see `ready`.

        Raises:
            ValueError: actions of another shape or out of range. Nothing has changed then.
            RuntimeError: a step before was interrupted.
        """
        self._check_whole("step")
        keys, moved = self._signals.checked(keyboard, mouse, self.frames)
        self._whole = False
        heard_keys, heard_mouse = self._signals.hear(keys, moved)
        passes, first = self._passes, self.frames
        self._noise.send(passes.x, passes.fresh)
        passes.first.fill_(first)
        passes.keyboard.copy_(heard_keys)
        if passes.mouse is not None and heard_mouse is not None:
            passes.mouse.copy_(heard_mouse)
        for i in range(BLOCK_FRAMES):
            passes.condition[:, :, i] = self._condition(first + i)
        latents = passes.run(full=self._full(first))
        self.frames += BLOCK_FRAMES
        self._keep(first, latents.clone(), passes.condition.clone(), heard_keys, heard_mouse)
        self._noise.draw()  # while the device works
        self._whole = True  # half a draw could not be gone on from either
        return latents

    @torch.no_grad()
    def reanchor(self, clip: Tensor, start: Tensor | None = None) -> None:
        """Go on under another image: all that the next block sees is read again beside it, then forgotten as it was.

        Args:
            clip: the new image's tokens `[B, 257, 1280]`.
            start: its latents, which condition the frames from here on as those of a first image do; None: the frames
                to come stay conditioned as they were.

        Raises:
            ValueError: shapes that disagree. Nothing has changed then.
            RuntimeError: a step before was interrupted.
        """
        self._check_whole("reanchor")
        self._check(clip, start, self._image_tokens)
        self._whole = False
        device, dtype = self.model.device, self.model.dtype
        self._passes.look(self.model.look(clip.to(device)))
        if start is not None:
            self._start, self._origin = start.to(device, dtype, copy=True), self.frames
        self.caches.reset()
        self._oldest = max(self.frames - self.window.frames + BLOCK_FRAMES, 0)
        kept = [frame for frame in range(self.window.sink_frames) if frame < min(self._oldest, self.frames)]
        for group in _by_blocks(kept):
            self._read_again(group)
        for ring in (*self.caches.keyboard, *self.caches.mouse):  # which keep no first frames
            ring.reset()
        for group in _by_blocks(range(self._oldest, self.frames)):
            self._read_again(group)
        self._whole = True

    @torch.no_grad()
    def reset(self, seeds: Sequence[int | None], clip: Tensor | None = None, start: Tensor | None = None) -> None:
        """Begin again, in the same memory.

        Args:
            seeds: one a stream.
            clip, start: of other images; None: those of the last time.

        Raises:
            ValueError: not one seed a stream, or shapes that disagree. Nothing has changed then.
        """
        if len(seeds) != self.batch:
            raise ValueError(f"Rollout.reset: {len(seeds)} seeds, wanted one for each of {self.batch} streams")
        passes, device = self._passes, self.model.device
        self._check(clip, start, self._image_tokens)
        noise = BlockNoise(tuple(passes.x.shape), len(passes.fresh), seeds, device)
        if clip is not None:
            passes.look(self.model.look(clip.to(device)))
        if start is not None:
            self._start = start.to(device, self.model.dtype, copy=True)
        self._noise = noise
        self.caches.reset()
        self._signals.reset()
        self._made.clear()
        self.frames = self._origin = self._oldest = 0
        self._whole = True

    def _check_whole(self, operation: str) -> None:
        if not self._whole:
            raise RuntimeError(f"Rollout.{operation}: the call before was interrupted halfway; reset() begins again")

    def _full(self, first: int) -> bool:
        """Whether every slot of every ring is filled once the block from `first` on is written."""
        return first + BLOCK_FRAMES - self._oldest >= self.window.frames

    def _condition(self, frame: int) -> Tensor:
        """Mask and start image at a frame, `[B, 20, H, W]`."""
        at = frame - self._origin
        image = self._start[:, :, min(at, self._start.shape[2] - 1)]
        mask = image.new_full((self.batch, MASK_CHANNELS, *image.shape[2:]), float(at == 0))
        return torch.cat([mask, image], 1)

    def _keep(self, first: int, latents: Tensor, condition: Tensor, keyboard: Tensor, mouse: Tensor | None) -> None:
        """Remember what these frames were made of, and forget it of those that nobody will read again."""
        for i in range(BLOCK_FRAMES):
            moved = None if mouse is None else mouse[:, i]
            self._made[first + i] = _Made(latents[:, :, i], condition[:, :, i], keyboard[:, i], moved)
        oldest = self.frames - self.window.frames + BLOCK_FRAMES
        for frame in [frame for frame in self._made if self.window.sink_frames <= frame < oldest]:
            del self._made[frame]

    def _read_again(self, group: Sequence[int]) -> None:
        """Write finished frames, one after the other, to the caches."""
        model, passes = self.model, self._passes
        made = [self._made[frame] for frame in group]

        def of(parts: Sequence[Tensor], dim: int) -> Tensor:
            return torch.stack(list(parts), dim).to(model.device, model.dtype)

        mouse = [frame.mouse for frame in made if frame.mouse is not None]
        first = torch.full((1,), group[0], device=model.device)
        place = place_of(passes.ropes, self.window, first, len(group), full=False, dtype=model.dtype)
        prepared = model.prepare(
            place,
            self.caches,
            of([frame.condition for frame in made], 2),
            of(mouse, 1) if mouse else None,
            of([frame.keyboard for frame in made], 1),
            passes.image,
        )
        model.remember(torch.stack([frame.latent for frame in made], 2), passes.clean, prepared, self.caches)

    @property
    def _image_tokens(self) -> int:
        """How many a start image has."""
        return self._passes.image[0].k.shape[2]

    def _check(self, clip: Tensor | None, start: Tensor | None, tokens: int | None) -> None:
        batch, channels, (H, W) = self.batch, self.model.config.out_dim, self.settings.latent_size
        if clip is not None and (
            clip.dim() != 3
            or (clip.shape[0], clip.shape[2]) != (batch, CLIP_SIZE)
            or clip.shape[1] != (tokens or max(clip.shape[1], 1))
        ):
            wanted = f"[{batch}, {tokens or CLIP_TOKENS}, {CLIP_SIZE}]"
            raise ValueError(f"Rollout: clip is {tuple(clip.shape)}, wanted {wanted}, one row a seed")
        if start is None:
            return
        if start.dim() != 5 or not start.shape[2] or start.select(2, 0).shape != (batch, channels, H, W):
            raise ValueError(
                f"Rollout: start is {tuple(start.shape)}, wanted [{batch}, {channels}, frames, {H}, {W}]: latents of "
                f"{8 * H} x {8 * W} pictures, one row a seed"
            )


def _by_blocks(frames: Sequence[int]) -> list[list[int]]:
    """Consecutive frames, cut where blocks were."""
    groups: list[list[int]] = []
    for frame in frames:
        if not groups or frame % BLOCK_FRAMES == 0:
            groups.append([])
        groups[-1].append(frame)
    return groups
