"""Start images: how a picture becomes what the models read, and CLIP's vision tower.

The tower is that of OpenCLIP's XLM-RoBERTa ViT-H/14, computed by the package transformers, which the extra `game`
brings.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longburn.models.matrix_game_2.image_names import tower_rules
from longburn.models.settings import read_settings
from longburn.weights import Progress, load_checkpoint
from longburn.weights.pickled import open_any

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = (352, 640)  # height and width of Matrix-Game 2's pictures
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VIT_H: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}


def read_image(image: Image | str | Path, size: tuple[int, int] = SIZE) -> Tensor:
    """A picture as the VAE reads it: `[1, 3, height, width]`, fp32 in -1 .. 1.

    What is too wide or too high for the aspect is cut off on both sides alike; then it is resized bilinearly, each new
    pixel from all that it covers.

    Args:
        image: a file, or a picture of the package Pillow.
        size: height and width.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: a file that is no picture, or a picture with a side of zero.
    """
    picture = _opened(image)
    width, height = picture.size
    tall, wide = size
    if min(width, height, tall, wide) < 1:
        raise ValueError(f"read_image: the picture is {width} x {height}, wanted {wide} x {tall}: a side of zero")
    if height / width > tall / wide:
        kept_width, kept_height = width, int(width * tall / wide)
    else:
        kept_width, kept_height = int(height * wide / tall), height
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    # Pillow rounds the corners of the box, halves to even.
    resized = picture.crop((left, top, left + kept_width, top + kept_height)).resize((wide, tall), _BILINEAR)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(tall, wide, 3)
    return (pixels.permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5


_BILINEAR = 2  # Pillow's number for it


def _opened(image: Image | str | Path) -> Image:
    pillow = _need("PIL.Image", "read_image", "Pillow")
    picture: Any = image
    try:
        if isinstance(image, str | Path):
            picture = pillow.open(image)
        if isinstance(picture, pillow.Image):
            # A damaged file shows here. Cameras write down how they were held.
            opened: Image = _need("PIL.ImageOps", "read_image", "Pillow").exif_transpose(picture).convert("RGB")
            return opened
    except (OSError, ValueError) as error:
        raise ValueError(f"read_image: {image} cannot be read as a picture: {error}") from error
    raise ValueError(f"read_image: got a {type(image).__name__}, wanted a file or a picture of Pillow")


class ImageTower(nn.Module):
    """CLIP's vision tower up to its last layer but one.

    Args:
        config: sizes, under the names of transformers' `CLIPVisionConfig`; default those of ViT-H/14. The last of
            its `num_hidden_layers` is not computed, so it is not there.
        dtype: of the parameters.

    Raises:
        ImportError: transformers is not installed.
        ValueError: fewer than two layers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: dict[str, Any] | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        config = {**VIT_H, **(config or {})}
        if config["num_hidden_layers"] < 2:
            raise ValueError(f"ImageTower: num_hidden_layers is {config['num_hidden_layers']}, wanted at least 2")
        transformers = _need("transformers", "ImageTower", "transformers")
        self.layers, self.size = int(config["num_hidden_layers"]), int(config["image_size"])
        settings = transformers.CLIPVisionConfig(**{**config, "num_hidden_layers": self.layers - 1})
        model = transformers.CLIPVisionModel(settings)
        self.model: nn.Module = getattr(model, "vision_model", model).to(dtype)  # older versions wrap it
        self.model.post_layernorm = nn.Identity()  # of the class token alone, which nobody asks for
        embeddings: Any = self.model.embeddings
        with torch.device("cpu"):  # no checkpoint holds these
            embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
            self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
            self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in -1 .. 1 to `[B, 1 + patches, width]`: 257 x 1280 for ViT-H/14.

        They are resized to a square without regard to their aspect, bicubically between neighbouring pixels, in fp32.

        Raises:
            ValueError: another shape.
        """
        if pictures.dim() != 4 or pictures.shape[1] != 3 or 0 in pictures.shape:
            raise ValueError(f"ImageTower: the pictures are {list(pictures.shape)}, wanted [B, 3, H, W] in -1 .. 1")
        square = F.interpolate(pictures.float(), (self.size, self.size), mode="bicubic", align_corners=False)
        pixels = ((square * 0.5 + 0.5) - self.mean) / self.std
        hidden: Tensor = self.model(pixels.to(next(self.parameters()).dtype)).last_hidden_state
        return hidden

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> ImageTower:
        """Load the tower.

        Args:
            path: `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`, or its tensors as safetensors, of which the
                text tower is left out; or a directory with a `config.json` and safetensors, as transformers saves a
                `CLIPVisionModel`.

        Raises:
            CheckpointError: files that are missing or damaged, or that do not fit; one error lists every tensor.
            ImportError: transformers is not installed.
        """
        path = Path(path)
        config = read_settings(path) if path.is_dir() else {}
        config = config.get("vision_config", config)
        with torch.device("meta"):
            tower = cls({key: config[key] for key in VIT_H if key in config}, dtype=dtype)
        rules = tower_rules(tower.layers, int(tower.model.config.hidden_size))  # type: ignore[arg-type, union-attr]
        load_checkpoint(tower, open_any(path), rules, device=device, progress=progress)
        return tower.to(device).eval()


def _need(module: str, wanted_by: str, package: str) -> Any:
    """A module of the extra `game`.

    Raises:
        ImportError: it is not installed; says how it can be.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{wanted_by} needs {package}: pip install 'longburn[game]'") from error
