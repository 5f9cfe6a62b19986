"""A directory as Matrix-Game 2 is released, as a world that can be played."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from longburn.models.matrix_game_2.checkpoint import load_matrix_game_2, stated_config
from longburn.models.matrix_game_2.config import MODES
from longburn.models.matrix_game_2.image import ImageTower, read_image
from longburn.models.matrix_game_2.settings import RolloutSettings
from longburn.models.matrix_game_2.vae import WanVae
from longburn.models.matrix_game_2.vae_memory import StreamedDecoder
from longburn.models.matrix_game_2.vae_tiny import TinyDecoder
from longburn.models.matrix_game_2.world import PIXELS, MatrixGameWorld, StartImage
from longburn.weights import CheckpointError

Part = Literal["transformer", "vae", "image", "tiny"]
Report = Callable[[str, int, int], None]

FOLDERS: Mapping[str, str] = MappingProxyType(
    {
        "universal": "base_distilled_model",
        "gta_drive": "gta_distilled_model",
        "templerun": "templerun_distilled_model",
    }
)
_CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "vae": ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors", "vae"),
        "image": (f"{_CLIP}.pth", f"{_CLIP}.safetensors", "image_encoder"),
        "tiny": ("taew2_1.pth", "taew2_1.safetensors"),
    }
)


def find_parts(path: str | Path, *, mode: str = "universal", tiny: bool = False) -> dict[Part, Path]:
    """Where the parts of a release are.

    Args:
        path: the directory of the release.
        mode: which of its models.
        tiny: the tiny decoder is wanted, too.

    Raises:
        CheckpointError: names every part that is missing.
        ValueError: a mode that there is not.
    """
    if mode not in FOLDERS:
        raise ValueError(f"Matrix-Game 2: mode is {mode!r}, wanted one of {', '.join(MODES)}")
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory; wanted that of a Matrix-Game 2 release")
    names: dict[Part, tuple[str, ...]] = {
        "transformer": (FOLDERS[mode],),
        "vae": _NAMES["vae"],
        "image": _NAMES["image"],
    }
    if tiny:
        names["tiny"] = _NAMES["tiny"]
    found = {part: [folder / name for name in wanted if (folder / name).exists()] for part, wanted in names.items()}
    if missing := [" or ".join(names[part]) for part, paths in found.items() if not paths]:
        raise CheckpointError(f"{folder}: no {'; no '.join(missing)}; wanted the files of a Matrix-Game 2 release")
    return {part: paths[0] for part, paths in found.items()}


def load_world(
    path: str | Path,
    *,
    mode: str = "universal",
    image: Any = None,
    settings: RolloutSettings | None = None,
    tiny: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Report | None = None,
) -> MatrixGameWorld:
    """Load a released model with all that it needs to be played.

    Args:
        path: its directory: `base_distilled_model`, `gta_distilled_model` or `templerun_distilled_model` with the
            transformer, `Wan2.1_VAE.pth` and CLIP's `.pth` beside it (or `vae` and `image_encoder` as diffusers and
            transformers save them).
        mode: "universal", "gta_drive" or "templerun".
        image: the picture that a video begins with unless a reset names another; it is read at once.
        settings: of the session.
        tiny: decode by `taew2_1.pth`, which is far faster and somewhat less sharp.
        dtype: of the transformer and the image tower; default fp32 on the CPU and bf16 elsewhere. The VAE is fp16
            instead of bf16.
        progress: called with (part, elements placed, elements in all).

    Raises:
        CheckpointError: parts that are missing or damaged, or of another mode; nothing is loaded while one is missing.
        ImportError: transformers is not installed.
        ValueError: a picture that cannot be read, or settings that do not fit the model; both are seen before anything
            that takes long.
    """
    parts, chosen = find_parts(path, mode=mode, tiny=tiny), settings or RolloutSettings()
    size = PIXELS * chosen.latent_size[0], PIXELS * chosen.latent_size[1]
    place = torch.device(device)
    dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    codec = torch.float16 if dtype == torch.bfloat16 and place.type != "cpu" else dtype

    def report(part: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(part, done, total)

    chosen.check(stated_config(parts["transformer"], mode))
    if image is not None:
        read_image(image, size)
    model = load_matrix_game_2(
        parts["transformer"], mode=mode, dtype=dtype, device=place, progress=report("transformer")
    )
    tower = ImageTower.from_checkpoint(parts["image"], dtype=dtype, device=place, progress=report("image tower"))
    vae = WanVae.from_checkpoint(parts["vae"], dtype=codec, device=place, progress=report("VAE"))
    decoder: StreamedDecoder = vae.decoder
    if tiny:
        decoder = TinyDecoder.from_checkpoint(parts["tiny"], dtype=codec, device=place, progress=report("decoder"))
    eye = _Eye(tower, vae, size)
    if image is not None:
        eye(image)
    return MatrixGameWorld(model, decoder, eye, image=image, settings=chosen)


class _Eye:
    """Looks at start images, and remembers the last one."""

    def __init__(self, tower: ImageTower, vae: WanVae, size: tuple[int, int]) -> None:
        self._tower, self._vae, self._size = tower, vae, size
        self._last: StartImage | None = None

    @torch.no_grad()
    def __call__(self, image: Any) -> StartImage:
        like = self._vae.decoder.like
        picture = read_image(image, self._size).to(like.device)
        if self._last is None or not torch.equal(self._last.picture, picture):
            latents = self._vae.encode_start(picture.to(like.dtype))
            self._last = StartImage(picture, self._tower.forward(picture), latents)
        return self._last
