"""The small random music maker, and which directory of a checkpoint is which part."""

from pathlib import Path

import pytest
import torch

from longburn.models.ace_step.planner import SongRequest
from longburn.models.ace_step.v15.checkpoint import Parts, find_parts
from longburn.models.ace_step.v15.small import small_music_maker
from longburn.weights import CheckpointError


def test_the_seed_decides() -> None:
    request = SongRequest("x", duration=10)
    first, again, other = (small_music_maker(seed, planner=False).latents(request) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def layout(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).mkdir(parents=True)
    return path


OFFICIAL = ("acestep-v15-turbo", "vae", "Qwen3-Embedding-0.6B", "acestep-5Hz-lm-1.7B")


def test_parts(tmp_path: Path) -> None:
    path = layout(tmp_path / "a", *OFFICIAL)
    wanted = Parts(path / OFFICIAL[0], path / "vae", path / OFFICIAL[2], path / OFFICIAL[3])
    assert find_parts(path) == wanted
    layout(path, "acestep-v15-xl-base", "acestep-5Hz-lm-0.6B")
    assert find_parts(path) == wanted
    other = find_parts(path, variant="xl-base", planner="0.6B")
    assert other.model.name == "acestep-v15-xl-base"
    assert other.planner is not None
    assert other.planner.name == "acestep-5Hz-lm-0.6B"
    alone = layout(tmp_path / "b", "acestep-v15-sft", "vae", "Qwen3-Embedding-0.6B")
    assert find_parts(alone).model.name == "acestep-v15-sft"
    assert find_parts(alone).planner is None
    pipeline = layout(tmp_path / "c", "transformer", "vae", "text_encoder")
    assert find_parts(pipeline) == Parts(pipeline, pipeline / "vae", pipeline / "text_encoder", None)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ((), {}, "no acestep-v15-turbo; there is nothing"),
        (("ace_step_transformer", "music_dcae_f8c8"), {}, "a checkpoint of ACE-Step v1"),
        (OFFICIAL, {"variant": "base"}, "no acestep-v15-base; there are Qwen3"),
        (OFFICIAL, {"planner": "4B"}, "no acestep-5Hz-lm-4B"),
        (OFFICIAL[:1], {}, "no Qwen3-Embedding-0.6B or text_encoder"),
        (OFFICIAL[::2], {}, "no vae"),
        (("transformer", "vae", "text_encoder"), {"variant": "base"}, "holds one model"),
    ],
    ids=str,
)
def test_what_is_missing(tmp_path: Path, names: tuple[str, ...], options: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_parts(layout(tmp_path, *names), **options)
