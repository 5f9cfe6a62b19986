"""The causal video transformer of Matrix-Game 2: the velocity of a block of latent frames, given what it remembers.

B rows, F latent frames (3 in a block) of n tokens each, D model size. Upstream's code and weights:
https://github.com/SkyworkAI/Matrix-Game.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.attention import CrossKeyValues
from longburn.kernels.linear import linear
from longburn.models.matrix_game_2.action import Heard
from longburn.models.matrix_game_2.config import CLIP_SIZE, PATCH, MatrixGame2Config
from longburn.models.matrix_game_2.frames import Caches, Place
from longburn.models.matrix_game_2.layer import Layer, Rings
from longburn.nn import Residual

LONGEST_PERIOD = 1e4


class Modulation(NamedTuple):
    """How timesteps shift, scale and gate: `[B|1, F|1, layers, 6, D]` of the layers, `[B|1, F|1, 2, D]` of the head.

    Scales are what one multiplies by. In fp32 at least.
    """

    layers: Tensor
    head: Tensor


class Prepared(NamedTuple):
    """What is the same in all passes over a block."""

    place: Place
    condition: Tensor  # [B, F * n, D]: the share of mask and start image in the tokens
    heard: tuple[Heard, ...]  # of the layers that listen
    image: tuple[CrossKeyValues, ...]  # of every layer


class ImageEmbedding(nn.Module):
    """The start image's CLIP tokens in the model's size."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(CLIP_SIZE, dtype=dtype)
        self.fc1 = nn.Linear(CLIP_SIZE, CLIP_SIZE, dtype=dtype)
        self.fc2 = nn.Linear(CLIP_SIZE, size, dtype=dtype)
        self.norm_out = nn.LayerNorm(size, dtype=dtype)

    def forward(self, clip: Tensor) -> Tensor:
        """`[B, 257, 1280]` to `[B, 257, D]`."""
        hidden = F.gelu(self.fc1.forward(self.norm_in.forward(clip)))
        return self.norm_out.forward(self.fc2.forward(hidden))


class MatrixGame2(nn.Module):
    """The transformer. All that it remembers is in the `Caches` that it is given.

    A block takes several passes: `prepare` once, `velocity` at every noise level, then `remember` with the clean
    latents. Each writes the block's keys and values over those of the pass before, and attends to them. No pass reads
    from the device, so each can be recorded as a CUDA graph.
    """

    def __init__(self, config: MatrixGame2Config, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        size, patch = config.dim, PATCH * PATCH
        self.config = config
        self.noisy = nn.Linear(config.out_dim * patch, size, bias=False, dtype=dtype)
        self.condition = nn.Linear(config.condition_channels * patch, size, dtype=dtype)
        self.time_in = nn.Linear(config.freq_dim, size, dtype=dtype)
        self.time_out = nn.Linear(size, size, dtype=dtype)
        self.time_six = nn.Linear(size, 6 * size, dtype=dtype)
        self.image = ImageEmbedding(size, dtype)
        self.layers = nn.ModuleList(Layer(config, index, dtype) for index in range(config.num_layers))
        self.table = nn.Parameter(torch.empty(1, 2, size, dtype=dtype))
        nn.init.normal_(self.table, std=size**-0.5)
        self.head = nn.Linear(size, config.out_dim * patch, dtype=dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.head.weight.device

    @property
    def _layers(self) -> list[Layer]:
        return list(self.layers)  # type: ignore[arg-type]

    # --- what does not change ----------------------------------------------------------------------------------------

    def look(self, clip: Tensor) -> tuple[CrossKeyValues, ...]:
        """Every layer's keys and values of the start image, for a whole session.

        Args:
            clip: its tokens `[B, S, 1280]`, S is 257 for the released models.

        Raises:
            ValueError: another shape.
        """
        if clip.dim() != 3 or clip.shape[2] != CLIP_SIZE:
            raise ValueError(f"MatrixGame2.look: clip is {tuple(clip.shape)}, wanted [B, S, {CLIP_SIZE}]")
        context = self.image.forward(clip.to(self.dtype))
        return tuple(layer.image.keys_values(context) for layer in self._layers)

    def modulation(self, t: Tensor) -> Modulation:
        """What the timesteps t `[B|1, F|1]` modulate, in 0 .. 1000 (1000 is noise)."""
        half = self.config.freq_dim // 2
        octaves = torch.arange(half, dtype=torch.float64, device=t.device) / half
        phase = t.double().unsqueeze(-1) * LONGEST_PERIOD**-octaves
        waves = torch.cat([phase.cos(), phase.sin()], -1).to(self.dtype)
        vector = self.time_out.forward(F.silu(self.time_in.forward(waves)))
        six = self.time_six.forward(F.silu(vector)).view(*t.shape, 6, -1)
        wide = torch.promote_types(self.dtype, torch.float32)
        tables = torch.cat([layer.table for layer in self._layers]).to(wide)
        layers = tables + six.to(wide)[:, :, None]
        head = self.table[:, None].to(wide) + vector.to(wide)[:, :, None]
        layers[..., 1::3, :] += 1  # the two scales
        head[..., 1, :] += 1
        return Modulation(layers, head)

    # --- a block -----------------------------------------------------------------------------------------------------

    def prepare(
        self,
        place: Place,
        caches: Caches,
        condition: Tensor,
        mouse: Tensor | None,
        keyboard: Tensor,
        image: Sequence[CrossKeyValues],
    ) -> Prepared:
        """What the passes over a block share; the keyboard's rings are written here.

        Args:
            condition: mask and latents of the start image at these frames `[B, 20, F, H, W]`.
            mouse, keyboard: the actions that each frame hears, `[B, F, window, signals]`.
            image: see `look`.
        """
        tokens = linear(patches(condition), self.condition.weight, self.condition.bias)
        listening = [self._layers[index].action for index in self.config.action_config.blocks]
        heard = tuple(
            action.hear(mouse, keyboard, place, ring)
            for action, ring in zip(listening, caches.keyboard, strict=True)
            if action is not None
        )
        return Prepared(place, tokens, heard, tuple(image))

    def velocity(self, x: Tensor, modulation: Modulation, prepared: Prepared, caches: Caches) -> Tensor:
        """The velocity `[B, 16, F, H, W]`, noise minus video, of noisy latents x of the same shape."""
        stream = self._through(x, modulation, prepared, caches, len(self.layers))
        shift, scale = modulation.head.unbind(2)
        h = stream.layer_norm(self.config.eps, shift=shift, scale=scale).normed
        return latents(linear(h, self.head.weight, self.head.bias), x)

    def remember(self, x: Tensor, modulation: Modulation, prepared: Prepared, caches: Caches) -> None:
        """Leave what later blocks see of clean latents x in the caches: the pass at timestep 0.

        What comes after the last layer's keys and values would be seen by nobody, and is not computed. (In a layer
        that hears the mouse there are others after them, so such a last layer is.)
        """
        last = len(self.layers) - 1
        if caches.mouse and last in self.config.action_config.blocks:
            self._through(x, modulation, prepared, caches, last + 1)
            return
        stream = self._through(x, modulation, prepared, caches, last)
        rings = self._rings(caches, last)
        self._layers[last].remember(stream, modulation.layers[:, :, last], prepared.place, rings)

    def _through(self, x: Tensor, modulation: Modulation, prepared: Prepared, caches: Caches, count: int) -> Residual:
        """The stream after the first `count` layers."""
        stream = Residual(linear(patches(x.to(self.dtype)), self.noisy.weight, residual=prepared.condition))
        heard = dict(zip(self.config.action_config.blocks, prepared.heard, strict=True))
        for i, layer in enumerate(self._layers[:count]):
            stream = layer.forward(
                stream,
                modulation.layers[:, :, i],
                prepared.place,
                self._rings(caches, i),
                prepared.image[i],
                heard.get(i),
            )
        return stream

    def _rings(self, caches: Caches, layer: int) -> Rings:
        blocks = self.config.action_config.blocks
        mouse = caches.mouse[blocks.index(layer)] if caches.mouse and layer in blocks else None
        return Rings(caches.window, caches.video[layer], mouse)


def patches(x: Tensor) -> Tensor:
    """`[B, C, F, H, W]` to `[B, F * n, C * 4]`: frame after frame, row by row; channels, then rows of a patch."""
    B, C, frames, H, W = x.shape
    cut = x.view(B, C, frames, H // PATCH, PATCH, W // PATCH, PATCH).permute(0, 2, 3, 5, 1, 4, 6)
    return cut.reshape(B, -1, C * PATCH * PATCH)


def latents(patched: Tensor, like: Tensor) -> Tensor:
    """`[B, F * n, 4 * C]` to the shape and type of `like` `[B, C, F, H, W]`: rows of a patch, then channels."""
    B, C, frames, H, W = like.shape
    whole = patched.view(B, frames, H // PATCH, W // PATCH, PATCH, PATCH, C).permute(0, 6, 1, 2, 4, 3, 5)
    return whole.reshape(like.shape).to(like.dtype)
