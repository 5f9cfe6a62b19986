"""CLIP's vision tower and start images: against the tower written out, transformers, and Pillow."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from longburn.models.matrix_game_2.image import MEAN, STD, VIT_H, ImageTower, read_image
from longburn.models.matrix_game_2.image_names import tower_rules
from longburn.weights import CheckpointMismatch, load_checkpoint, save_checkpoint
from longburn.weights.match import match

WIDTH, LAYERS, HEADS = 32, 3, 4
TINY = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 28,
    "patch_size": 7,
}


def released(
    width: int = WIDTH, layers: int = LAYERS, hidden: int = 48, patch: int = 7, tokens: int = 17
) -> dict[str, Tensor]:
    """A checkpoint with the names of the released one, text tower included."""

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape) * scale

    tensors = {
        "log_scale": randn(),
        "visual.patch_embedding.weight": randn(width, 3, patch, patch, scale=0.1),
        "visual.cls_embedding": randn(1, 1, width),
        "visual.pos_embedding": randn(1, tokens, width),
        "visual.head": randn(width, 8),
        "textual.token_embedding.weight": randn(5, 4),
        "textual.type_embedding.weight": randn(1, 4),
        "textual.pos_embedding.weight": randn(6, 4),
        "textual.blocks.0.attn.q.weight": randn(4, 4),
        "textual.blocks.0.ffn.2.bias": randn(4),
        "textual.norm.weight": randn(4),
        "textual.head.0.weight": randn(4, 4),
        "textual.head.2.weight": randn(4, 4),
    }
    for name in ("visual.pre_norm", "visual.post_norm"):
        tensors |= {f"{name}.weight": 1 + randn(width, scale=0.2), f"{name}.bias": randn(width, scale=0.2)}
    for i in range(layers):
        at = f"visual.transformer.{i}"
        for name in ("norm1", "norm2"):
            tensors |= {
                f"{at}.{name}.weight": 1 + randn(width, scale=0.2),
                f"{at}.{name}.bias": randn(width, scale=0.2),
            }
        sizes = {
            "attn.to_qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.0": (hidden, width),
            "mlp.2": (width, hidden),
        }
        for name, (out, into) in sizes.items():
            tensors |= {
                f"{at}.{name}.weight": randn(out, into, scale=into**-0.5),
                f"{at}.{name}.bias": randn(out, scale=0.1),
            }
    return tensors


def by_hand(t: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """The tower up to the last layer but one, from the released tensors, in fp64."""
    t = {name: tensor.double() for name, tensor in t.items()}

    def norm(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ t[f"{name}.weight"].mT + t[f"{name}.bias"]

    square = F.interpolate(pictures.double(), (28, 28), mode="bicubic", align_corners=False) / 2 + 0.5
    square = (square - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[:, None, None]
    patches = F.conv2d(square, t["visual.patch_embedding.weight"], stride=7).flatten(2).mT
    x = torch.cat([t["visual.cls_embedding"].expand(len(patches), 1, -1), patches], 1) + t["visual.pos_embedding"]
    x = norm("visual.pre_norm", x)
    for i in range(LAYERS - 1):
        at = f"visual.transformer.{i}"
        q, k, v = linear(f"{at}.attn.to_qkv", norm(f"{at}.norm1", x)).chunk(3, -1)
        heads = [
            torch.softmax(a @ b.mT / (WIDTH / HEADS) ** 0.5, -1) @ c
            for a, b, c in zip(q.chunk(HEADS, -1), k.chunk(HEADS, -1), v.chunk(HEADS, -1), strict=True)
        ]
        x = x + linear(f"{at}.attn.proj", torch.cat(heads, -1))
        x = x + linear(f"{at}.mlp.2", F.gelu(linear(f"{at}.mlp.0", norm(f"{at}.norm2", x))))
    return x


def tower_of(path: Path, tensors: dict[str, Tensor]) -> ImageTower:
    save_file(tensors, path / "clip.safetensors")
    with torch.device("meta"):
        tower = ImageTower(TINY)
    load_checkpoint(tower, path / "clip.safetensors", tower_rules(LAYERS, WIDTH))
    return tower.eval()


def test_the_tower_is_what_its_layers_say(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = released()
    tower = tower_of(tmp_path, tensors)
    pictures = torch.rand(2, 3, 33, 61) * 2 - 1
    came = tower(pictures)
    assert came.shape == (2, 17, WIDTH)
    torch.testing.assert_close(came.double(), by_hand(tensors, pictures), atol=2e-5, rtol=0)


def test_a_directory_of_transformers_loads_whole_or_with_its_prefix(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    peer: Any = CLIPVisionModel(CLIPVisionConfig(**{**VIT_H, **TINY})).eval()
    peer.save_pretrained(tmp_path)
    tower = ImageTower.from_checkpoint(tmp_path)
    pictures = torch.rand(1, 3, 28, 28) * 2 - 1
    pixels = (pictures / 2 + 0.5 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        wanted = peer(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(tower(pictures), wanted, atol=1e-5, rtol=0)

    (file,) = tmp_path.glob("*.safetensors")
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in load_file(file).items()}
    for prefix in ("", "vision_model."):
        save_file({prefix + name: tensor for name, tensor in bare.items()}, file)
        again = ImageTower.from_checkpoint(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), again.parameters(), strict=True))


def test_released_weights_travel_both_ways_and_what_is_skipped_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = released()
    tower = tower_of(tmp_path, tensors)
    save_checkpoint(tower, tmp_path / "ours.safetensors", tower_rules(LAYERS, WIDTH))
    ours = load_file(tmp_path / "ours.safetensors")
    skipped = {name for name in tensors if name.startswith(("textual", "visual.transformer.2.", "visual.post_norm"))}
    assert ours.keys() == tensors.keys() - skipped - {"log_scale", "visual.head"}
    assert all(torch.equal(ours[name], tensors[name]) for name in ours)
    tensors["visual.transformer.1.attn.gate"] = torch.zeros(1)
    with pytest.raises(CheckpointMismatch, match=r"unused: visual\.transformer\.1\.attn\.gate"):
        tower_of(tmp_path, tensors)


def test_the_released_sizes_are_the_default() -> None:
    with torch.device("meta"):
        tower, theirs = ImageTower(), released(1280, 32, 5120, 14, 257)
    found = match(tower_rules(32, 1280), theirs, tower.state_dict())
    assert (found.missing, found.unused) == ({}, {})
    ours = tower.state_dict()
    assert ours["model.embeddings.position_embedding.weight"].shape == (257, 1280)
    assert sum(p.numel() for p in tower.parameters()) == 611_086_080


def test_a_picture_is_cut_to_the_aspect_and_resized(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (401, 633, 3), dtype=np.uint8)
    for width, height, box in (
        (633, 401, (0, 26, 633, 374)),  # 633 x 348 of the middle; halves go to the even side
        (633, 250, (90, 0, 544, 250)),  # 454 x 250
        (320, 176, (0, 0, 320, 176)),
    ):
        picture = Image.fromarray(pixels[:height, :width])
        came = read_image(picture)
        assert came.shape == (1, 3, 352, 640)
        cut = pixels[box[1] : box[3], box[0] : box[2]]
        wanted = np.asarray(Image.fromarray(cut).resize((640, 352), Image.Resampling.BILINEAR), dtype=np.float32)
        np.testing.assert_allclose(came[0].permute(1, 2, 0).numpy(), wanted / 127.5 - 1, atol=1e-6)
    upright, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 3  # held upside down
    upright.rotate(180).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "turned.png"), read_image(upright))
    path = tmp_path / "start.png"
    Image.fromarray(pixels).convert("L").save(path)
    grey = read_image(path, (88, 160))
    assert grey.shape == (1, 3, 88, 160)
    assert torch.equal(grey[:, 0], grey[:, 2])


def test_what_is_no_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "start.png").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"start\.png cannot be read as a picture"):
        read_image(tmp_path / "start.png")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="got a Tensor, wanted a file or a picture"):
        read_image(torch.zeros(3, 4, 4))  # type: ignore[arg-type]
    tower = ImageTower(TINY)
    with pytest.raises(ValueError, match=r"wanted \[B, 3, H, W\]"):
        tower(torch.zeros(3, 28, 28))
    with pytest.raises(ValueError, match="wanted at least 2"):
        ImageTower({**TINY, "num_hidden_layers": 1})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"ImageTower needs transformers: pip install 'longburn\[game\]'"):
        ImageTower(TINY)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"read_image needs Pillow: pip install 'longburn\[game\]'"):
        read_image(tmp_path / "start.png")
