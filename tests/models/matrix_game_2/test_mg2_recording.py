"""What a recorded pass must not do: read from the device, or bring numbers to it from the host.

The meta device has no numbers at all, so every read fails there; copies between devices show to the dispatcher.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mg2_cases import tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longburn import use_impl
from longburn.models.matrix_game_2 import Caches, FrameWindow, MatrixGame2
from longburn.models.matrix_game_2.passes import Passes
from longburn.models.matrix_game_2.sampler import noise_levels


class Crossings(TorchDispatchMode):
    """Operators that touch another device than meta."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        touched = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        if touched - {"meta"}:
            self.seen.append(f"{func} on {touched}")
        return out


def passes_on_meta(mode: str, window: FrameWindow) -> Passes:
    config = tiny(mode)
    with torch.device("meta"):
        model = MatrixGame2(config, dtype=torch.bfloat16)
        look = model.look(torch.empty(1, 5, 1280))
    caches = Caches(config, window, 1, 6, dtype=torch.bfloat16, device="meta")
    return Passes(model, caches, look, (4, 6), noise_levels((1000, 500)), record=True)


OPTIONS = [
    ("universal", FrameWindow(6)),
    ("gta_drive", FrameWindow(4)),
    ("templerun", FrameWindow(6)),
    ("universal", FrameWindow(8, 2, relative_sinks=True, past_log_weights=(-0.1, -0.5))),
]


@pytest.mark.parametrize(("mode", "window"), OPTIONS)
@torch.no_grad()
def test_passes_touch_the_host_in_their_first_block_only(mode: str, window: FrameWindow) -> None:
    with use_impl("reference"):
        passes = passes_on_meta(mode, window)
        passes.run(full=True)
        with Crossings() as crossings:
            passes.run(full=True)
    assert crossings.seen == []


@torch.no_grad()
def test_the_check_sees_what_is_brought_from_the_host() -> None:
    with Crossings() as crossings:
        torch.ones(3, device="meta") + torch.ones(3).to("meta")
    assert any("_to_copy" in seen for seen in crossings.seen)


@pytest.mark.cuda
@torch.no_grad()
def test_replayed_blocks_have_the_bits_of_others() -> None:
    from mg2_cases import build, drawn, tiny_weights

    from longburn.models.matrix_game_2 import Rollout, RolloutSettings

    config = tiny("universal")
    model = build(config, tiny_weights(config), torch.bfloat16).to("cuda")
    clip, start = torch.from_numpy(drawn("clip", (1, 5, 1280))), torch.from_numpy(drawn("start", (1, 16, 2, 4, 6)))

    def session(*, record: bool) -> Rollout:
        settings = RolloutSettings(latent_size=(4, 6), steps=(1000, 500), record=record)
        return Rollout(model, clip, start, settings=settings)

    recorded, plain = session(record=True), session(record=False)
    for block in range(8):
        keys = [float(block % 2), 0.0, 1.0, 0.0]
        assert torch.equal(recorded.step(keys, [0.1, 0.0]), plain.step(keys, [0.1, 0.0])), block
    assert recorded.recorded, recorded.why_not
    assert not plain.recorded
    recorded.reanchor(clip * 2)
    plain.reanchor(clip * 2)
    for _ in range(3):
        assert torch.equal(recorded.step([1, 0, 0, 0]), plain.step([1, 0, 0, 0]))
