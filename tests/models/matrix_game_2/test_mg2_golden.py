"""Every pass of both golden streams, computed by the original model through its own caches."""

import pytest
import torch
from mg2_cases import CASES, DATA, build, case_weights, given, heard, read_case
from safetensors.torch import load_file

from longburn.models.matrix_game_2 import Caches, FrameWindow, MatrixGame2Config, place_of


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_pass_is_the_originals(name: str) -> None:
    case, expected = read_case(name), load_file(DATA / name / "expected.safetensors")
    config = MatrixGame2Config.from_config(case["config"])
    model = build(config, case_weights(case))
    (h, w), blocks, times = case["grid"], case["n_blocks"], case["timesteps"]
    frames = 1 + 4 * (3 * blocks - 1)
    mouse = given("mouse", (1, frames, 2))
    keyboard = (given("keyboard", (1, frames, config.action_config.keyboard_dim_in)) > 0).float()
    image = model.look(given("clip", (1, 257, 1280)))
    window = FrameWindow(config.local_attn_size, config.sink_size)
    caches = Caches(config, window, 1, h * w, dtype=torch.float32, device="cpu")
    ropes, modulations = config.ropes((h, w)), [model.modulation(torch.tensor([[t]])) for t in times]
    worst = 0.0
    for b in range(blocks):
        first = 3 * b
        full = first + 3 >= window.frames
        place = place_of(ropes, window, torch.tensor([first]), 3, full=full, dtype=torch.float32)
        condition = given(f"cond.{b}", (1, 20, 3, 2 * h, 2 * w))
        prepared = model.prepare(place, caches, condition, heard(mouse, first, 3), heard(keyboard, first, 3), image)
        for i, modulation in enumerate(modulations):
            x = given(f"x.{b}.{i}", (1, 16, 3, 2 * h, 2 * w))
            flow, wanted = model.velocity(x, modulation, prepared, caches), expected[f"flow.{b}.{i}"]
            worst = max(worst, float((flow - wanted).norm() / wanted.norm()))
        model.remember(x, modulation, prepared, caches)
    assert worst < 1e-5, worst
    print(worst)
