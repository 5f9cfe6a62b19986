"""A Matrix-Game 2 release of random weights and small sizes, in the files and names of the real one."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from wan_vae_peers import peer_of

from longburn.models.matrix_game_2 import MatrixGame2, MatrixGame2Config
from longburn.models.matrix_game_2.image import VIT_H
from longburn.models.matrix_game_2.names import rules
from longburn.weights import StateDictSource, in_their_names

FOLDERS = {"universal": (4, True), "gta_drive": (2, True), "templerun": (7, False)}


def write_release(folder: Path, *modes: str) -> Path:
    """Transformers of these modes, VAE and image tower; and `start.png`, 90 x 50."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    places = {"universal": "base", "gta_drive": "gta", "templerun": "templerun"}
    for mode in modes:
        keys, mouse = FOLDERS[mode]
        config = {
            **{"dim": 32, "num_heads": 2, "ffn_dim": 48, "freq_dim": 16, "in_dim": 12, "out_dim": 4, "num_layers": 2},
            "local_attn_size": 4 if mode == "gta_drive" else 6,
            "action_config": {
                **{"blocks": [0], "heads_num": 2, "hidden_size": 8, "img_hidden_size": 32, "enable_mouse": mouse},
                **{"keyboard_dim_in": keys, "keyboard_hidden_dim": 128, "mouse_hidden_dim": 128},
            },
        }
        target = folder / f"{places[mode]}_distilled_model"
        target.mkdir(parents=True)
        (target / "config.json").write_text(json.dumps(config))
        sizes = MatrixGame2Config.from_config(config)
        model = MatrixGame2(sizes)
        named = in_their_names(
            StateDictSource({name: x.detach() for name, x in model.state_dict().items()}), rules(sizes)
        )
        save_file({name: named.read(name).contiguous() for name in named.tensors}, target / "weights.safetensors")
    peer_of().save_pretrained(folder / "vae")
    small = {"intermediate_size": 16, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    CLIPVisionModel(CLIPVisionConfig(**{**VIT_H, **small})).save_pretrained(folder / "image_encoder")
    across = torch.arange(90)[None].expand(50, -1) * 2
    Image.fromarray(torch.stack([across, across.flip(1), across], -1).to(torch.uint8).numpy()).save(
        folder / "start.png"
    )
    return folder
