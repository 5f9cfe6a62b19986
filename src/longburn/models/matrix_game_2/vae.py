"""The Wan 2.1 causal video VAE (Wan Team, arXiv 2503.20314), streamed in both directions.

A latent frame is 8 x 8 pixels wide and four frames long, but the first one, which is a single frame: T latent frames
are 4 T - 3 pictures. Both halves look back only and remember the frames they need, so a stream takes the same memory
and time however long it is.
"""

from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from longburn.kernels.frames import REMEMBERED, side_by_side
from longburn.models.matrix_game_2.vae_blocks import (
    CausalConv,
    FewerFrames,
    FrameAttention,
    Larger,
    MoreFrames,
    Norm,
    ResidualBlock,
    Smaller,
)
from longburn.models.matrix_game_2.vae_config import WanVaeConfig
from longburn.models.matrix_game_2.vae_memory import FrameMemory, Pass, StreamedDecoder
from longburn.models.matrix_game_2.vae_names import wan_vae_rules
from longburn.models.settings import read_settings
from longburn.weights import Progress, load_checkpoint
from longburn.weights.pickled import open_any


class Middle(nn.Module):
    """Residual block, attention, residual block, at the latents' size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before, self.attention = ResidualBlock(channels, channels), FrameAttention(channels)
        self.after = ResidualBlock(channels, channels)

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        """`[B, T, H, W, C]` to the same."""
        return self.after.forward(self.attention.forward(self.before.forward(x, step), step), step)


class WanEncoder(nn.Module):
    """Pictures to mean and log variance of the latents, a latent frame at a time."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        widths = config.widths
        self.entry = CausalConv(3, widths[0])
        self.stages = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            blocks = [ResidualBlock(before if n == 0 else width, width) for n in range(config.num_res_blocks)]
            self.stages.append(nn.ModuleList(blocks))
        self.downs = nn.ModuleList()
        for width, time in zip(widths, config.temperal_downsample, strict=False):
            size, frames = {"size": Smaller(width)}, {"frames": FewerFrames(width)}
            self.downs.append(nn.ModuleDict({**size, **frames} if time else size))
        self.middle = Middle(widths[-1])
        self.norm, self.exit = Norm(widths[-1]), CausalConv(widths[-1], 2 * config.z_dim)
        self.latents = nn.Linear(2 * config.z_dim, 2 * config.z_dim)

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        """Pictures `[B, n, H, W, 3]`, one first and then four, to `[B, 1, h, w, 2 C]`."""
        layers = _in_order(self.stages, self.downs)
        large = next((i for i, layer in enumerate(layers) if isinstance(layer, FewerFrames)), len(layers))
        x = torch.cat([self._large(picture, step, layers[:large]) for picture in step.singly(x)], 1)
        x = _through(x, step, layers[large:])
        x = self.middle.forward(x, step)
        return self.latents.forward(self.exit.forward(self.norm.activated(x, step)))

    def _large(self, x: Tensor, step: Pass, layers: Iterable[nn.Module]) -> Tensor:
        """The entry and the layers before frames become fewer."""
        return _through(self.entry.forward(side_by_side(step.extend(x, REMEMBERED))), step, layers)


class WanDecoder(StreamedDecoder):
    """Latents, in the scale of the diffusion model, to pictures.

    As released, at 352 x 640, a latent frame is four pictures and 7.63 TFLOP, and a stream remembers 1.07 GB in fp16.

    Args:
        config: sizes; default the released VAE's.
        dtype: of the parameters; the scale of the latents stays in fp32, which a later `.to(dtype)` would round too.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: WanVaeConfig | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        config = config or WanVaeConfig()
        widths = config.decoder_widths
        self.latent_channels = config.z_dim
        self.latents = nn.Linear(config.z_dim, config.z_dim)
        self.entry = CausalConv(config.z_dim, widths[0])
        self.middle = Middle(widths[0])
        self.stages = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[i - 1] // 2 if i else width
            blocks = [ResidualBlock(before if n == 0 else width, width) for n in range(config.num_res_blocks + 1)]
            self.stages.append(nn.ModuleList(blocks))
        self.ups = nn.ModuleList()
        for width, time in zip(widths, config.temperal_downsample[::-1], strict=False):
            frames, size = {"frames": MoreFrames(width)}, {"size": Larger(width)}
            self.ups.append(nn.ModuleDict({**frames, **size} if time else size))
        self.norm, self.exit = Norm(widths[-1]), CausalConv(widths[-1], 3)
        self.to(dtype)
        with torch.device("cpu"):  # no checkpoint holds them
            self.register_buffer("mean", torch.tensor(config.latents_mean), persistent=False)
            self.register_buffer("std", torch.tensor(config.latents_std), persistent=False)

    def decode_frame(self, latent: Tensor, step: Pass) -> Tensor:
        x = latent.movedim(1, -1)[:, None]
        x = self.latents.forward((x * self.std + self.mean).to(latent.dtype))
        x = self.middle.forward(self.entry.forward(side_by_side(step.extend(x, REMEMBERED))), step)
        layers = _in_order(self.stages, self.ups)
        small = max((i for i, layer in enumerate(layers, 1) if isinstance(layer, MoreFrames)), default=0)
        x = _through(x, step, layers[:small])
        pictures = [self._large(picture, step, layers[small:]) for picture in step.singly(x)]
        return torch.cat(pictures, 1).clamp_(-1, 1).movedim(-1, 1)

    def _large(self, x: Tensor, step: Pass, layers: Iterable[nn.Module]) -> Tensor:
        """The layers after frames have become more, and the exit."""
        return self.exit.forward(self.norm.activated(_through(x, step, layers), step))


def _in_order(stages: nn.ModuleList, changes: nn.ModuleList) -> list[nn.Module]:
    """The blocks of each stage, and the parts of the change of size and pace to the next one."""
    pairs = zip_longest(stages, changes, fillvalue=nn.ModuleDict())
    return [layer for stage, change in pairs for layer in (*stage, *change.values())]  # type: ignore[operator,misc]


def _through(x: Tensor, step: Pass, layers: Iterable[nn.Module]) -> Tensor:
    for layer in layers:
        x = layer(x, step)
    return x


class WanVae(nn.Module):
    """The VAE. Latents are in the scale of the diffusion model, `(z - mean) / std`; pictures are in -1 .. 1.

    Args:
        config: sizes; default the released VAE's.
        dtype: of the parameters; fp16 and bf16 serve, with norms computed in fp32.
    """

    def __init__(self, config: WanVaeConfig | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config or WanVaeConfig()
        self.encoder = WanEncoder(self.config).to(dtype)
        self.decoder = WanDecoder(self.config, dtype=dtype)

    def decode(self, latents: Tensor, memory: FrameMemory | None = None) -> Tensor:
        """`WanDecoder.decode`; without memory, of a whole video."""
        return self.decoder.decode(latents, FrameMemory() if memory is None else memory)

    @torch.no_grad()
    def encode(self, pictures: Tensor, memory: FrameMemory | None = None) -> Tensor:
        """Pictures `[B, 3, n, H, W]` to the means of latents `[B, C, F, H / 8, W / 8]`.

        A stream begins with one picture; all further ones come in fours.

        Raises:
            ValueError: another shape, type, device or number of pictures, or another size than the stream's. The
                memory is then as it was.
        """
        memory = FrameMemory() if memory is None else memory
        self._check_pictures(pictures, memory)
        single = int(memory.frames == 0)
        chunks = [pictures[:, :, :1]] * single + list(torch.split(pictures[:, :, single:], self.config.time_factor, 2))
        means = []
        for chunk in filter(lambda chunk: chunk.shape[2], chunks):
            with memory.open() as step:
                moments = self.encoder.forward(chunk.movedim(1, -1).contiguous(), step)
            means.append(moments[..., : self.config.z_dim])
        scaled = (torch.cat(means, 1) - self.decoder.mean) / self.decoder.std
        return scaled.to(pictures.dtype).movedim(-1, 1)

    def _check_pictures(self, pictures: Tensor, memory: FrameMemory) -> None:
        factor, pace, like = self.config.space_factor, self.config.time_factor, self.decoder.like
        if pictures.dim() != 5 or pictures.shape[1] != 3 or 0 in pictures.shape:
            raise ValueError(f"WanVae.encode: the pictures are {list(pictures.shape)}, wanted [B, 3, n, H, W]")
        n, H, W = pictures.shape[2:]
        if H % factor or W % factor:
            raise ValueError(f"WanVae.encode: pictures of {H} x {W}, wanted multiples of {factor}; crop or resize them")
        if (n - (memory.frames == 0)) % pace:
            wanted = f"1 + a multiple of {pace}" if memory.frames == 0 else f"a multiple of {pace}"
            raise ValueError(f"WanVae.encode: {n} pictures after {memory.frames} latent frames, wanted {wanted}")
        if pictures.dtype != like.dtype or pictures.device != like.device:
            raise ValueError(
                f"WanVae.encode: the pictures are {pictures.dtype} on {pictures.device}, the VAE is {like.dtype} on "
                f"{like.device}; move one to the other"
            )
        memory.fit(self, "WanVae.encode", pictures[:, :, 0])

    def encode_start(self, image: Tensor) -> Tensor:
        """The latents `[B, C, F, h, w]` of a video that is this picture `[B, 3, H, W]` and then mid-grey for ever.

        Every layer looks back a fixed number of frames, so from some frame on all latents are the same, bit for bit:
        the 29th after the image's own as released. So many are encoded (133 TFLOP at 352 x 640), and the last one
        stands for all further ones.

        Raises:
            ValueError: as `encode`.
        """
        if image.dim() != 4:
            raise ValueError(f"WanVae.encode_start: the image is {list(image.shape)}, wanted [B, 3, H, W]")
        memory, pace = FrameMemory(), self.config.time_factor
        grey = torch.zeros_like(image)[:, :, None].expand(-1, -1, pace, -1, -1)
        first = self.encode(image[:, :, None], memory)
        later = [self.encode(grey, memory) for _ in range(self.config.encoder_reach // pace + 1)]
        return torch.cat([first, *later], 2)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> "WanVae":
        """Load the VAE.

        Args:
            path: a directory with a `config.json` and safetensors, as diffusers saves an `AutoencoderKLWan`; or a file
                of the released sizes, `Wan2.1_VAE.pth` or its tensors as safetensors.

        Raises:
            CheckpointError: files that are missing or damaged, or that do not fit; one error lists every tensor.
            ValueError: the configuration of another VAE.
        """
        path = Path(path)
        config = WanVaeConfig.from_config(read_settings(path)) if path.is_dir() else WanVaeConfig()
        with torch.device("meta"):
            vae = cls(config, dtype=dtype)
        load_checkpoint(vae, open_any(path), wan_vae_rules(config), device=device, progress=progress)
        return vae.to(device).eval()
