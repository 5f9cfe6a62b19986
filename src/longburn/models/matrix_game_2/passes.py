"""The passes over a block, on tensors that stay where they are: so on CUDA each kind is one recorded graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longburn.attention import CrossKeyValues
from longburn.diffusion import Schedule
from longburn.kernels.registry import chosen
from longburn.models.matrix_game_2.config import BLOCK_FRAMES, PATCH
from longburn.models.matrix_game_2.dit import MatrixGame2, Modulation, Prepared
from longburn.models.matrix_game_2.frames import Caches, place_of
from longburn.models.matrix_game_2.sampler import TIMESTEPS, jump


@dataclass
class _Recording:
    """Graphs of the three kinds of passes, and what keeps their memory."""

    graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]
    prepared: Prepared
    impl: str


class Passes:
    """What a stream computes for every block: `prepare`, a denoising step at each level, and `remember`.

    Inputs are written to the attributes below before `run`. The first block with full rings runs as usual, which
    compiles what it needs; from the second one on graphs are replayed.

    Args:
        image: of every layer; `look` replaces it in place.
        latent_size: rows and columns of a latent frame.
        levels: of the noise, see `noise_levels`.
        record: False never records.

    Attributes:
        first: number of the block's first frame, int64 `[1]`.
        x: latents `[B, 16, 3, H, W]`: noise before, the block's video after. In fp32 at least, as is
        fresh: noise of the steps `[N, B, 16, 3, H, W]`.
        condition, keyboard, mouse: as of `MatrixGame2.prepare`.
        ready: on CUDA, recorded when a block was made and before it is remembered.
        why_not: why passes are not recorded, or None.
    """

    def __init__(
        self,
        model: MatrixGame2,
        caches: Caches,
        image: Sequence[CrossKeyValues],
        latent_size: tuple[int, int],
        levels: Schedule,
        *,
        record: bool,
    ) -> None:
        config, action, device = model.config, model.config.action_config, model.device
        self.model, self.caches, self.image = model, caches, tuple(image)
        self.ropes = config.ropes((latent_size[0] // PATCH, latent_size[1] // PATCH))
        B, wide = image[0].k.shape[0], torch.promote_types(model.dtype, torch.float32)
        block = (B, config.out_dim, BLOCK_FRAMES, *latent_size)
        heard = (B, BLOCK_FRAMES, action.window)

        def zeros(*shape: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.first, self._step = zeros(1, dtype=torch.int64), zeros(1, dtype=torch.int64)
        self.x, self.fresh = zeros(*block, dtype=wide), zeros(len(levels) - 1, *block, dtype=wide)
        self.condition = zeros(B, config.condition_channels, *block[2:])
        self.keyboard = zeros(*heard, action.keyboard_dim_in)
        self.mouse = zeros(*heard, action.mouse_dim_in) if action.enable_mouse else None
        self._levels = torch.tensor(levels, dtype=wide, device=device)
        self._modulations = model.modulation(self._levels[:, None] * TIMESTEPS)
        self.clean = self._modulation(torch.tensor([len(levels) - 1], device=device))
        self.why_not: str | None = None
        if not record or device.type != "cuda":
            self.why_not = f"record is {record}" if not record else f"needs CUDA, got {device.type}"
        self.ready: torch.cuda.Event | None = None
        self._warm = False
        self._recording: _Recording | None = None

    @property
    def recorded(self) -> bool:
        """Whether blocks are replayed."""
        return self._recording is not None

    def run(self, *, full: bool) -> Tensor:
        """All passes over the block; its latents. `full`: every ring is full once it is written."""
        if full and self.why_not is None and self._warm and self._recording is None:
            self._recording = self._record()
        recording = self._recording
        if not full or recording is None or recording.impl != chosen():
            prepared = self.prepare(full=full)
            for _ in range(len(self.fresh)):
                self.denoise(prepared)
            latents = self._finished()
            self.remember(prepared)
            self._warm = self._warm or full
            return latents
        prepare, denoise, remember = recording.graphs
        prepare.replay()
        for _ in range(len(self.fresh)):
            denoise.replay()
        latents = self._finished()
        remember.replay()
        return latents

    def _finished(self) -> Tensor:
        latents = self.x.clone()
        if latents.is_cuda:
            self.ready = self.ready or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.ready.record(torch.cuda.current_stream(latents.device))
        return latents

    def prepare(self, *, full: bool) -> Prepared:
        """What the block's other passes share."""
        self._step.zero_()
        caches, dtype = self.caches, self.model.dtype
        place = place_of(self.ropes, caches.window, self.first, BLOCK_FRAMES, full=full, dtype=dtype)
        return self.model.prepare(place, caches, self.condition, self.mouse, self.keyboard, self.image)

    def denoise(self, prepared: Prepared) -> None:
        """The next step."""
        i = self._step
        velocity = self.model.velocity(self.x, self._modulation(i), prepared, self.caches)
        level, after = self._levels.index_select(0, i), self._levels.index_select(0, i + 1)
        self.x.copy_(jump(self.x, velocity, self.fresh.index_select(0, i)[0], level, after))
        i.add_(1)

    def remember(self, prepared: Prepared) -> None:
        """Leave the finished block in the caches."""
        self.model.remember(self.x, self.clean, prepared, self.caches)

    def look(self, image: Sequence[CrossKeyValues]) -> None:
        """Another start image from now on."""
        for held, new in zip(self.image, image, strict=True):
            held.k.copy_(new.k)
            held.v.copy_(new.v)

    def _modulation(self, i: Tensor) -> Modulation:
        return Modulation(*(part.index_select(0, i) for part in self._modulations))

    def _record(self) -> _Recording | None:
        """Capturing runs nothing. The passes follow each other, so they share the memory of what they do not keep."""
        pool, made, device = torch.cuda.graph_pool_handle(), [], self.first.device

        def record(run: Callable[[], Prepared | None]) -> Prepared | None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = run()
            made.append(graph)
            return result

        try:
            with torch.cuda.device(device):
                prepared = record(lambda: self.prepare(full=True))
                assert prepared is not None
                for run in (self.denoise, self.remember):
                    record(lambda run=run: run(prepared))  # type: ignore[misc]
        except Exception as reason:  # whatever it is, blocks can be made as usual
            self.why_not = f"{type(reason).__name__}: {reason}"
            torch.cuda.synchronize(device)
            return None
        return _Recording((made[0], made[1], made[2]), prepared, chosen())
