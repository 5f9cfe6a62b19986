"""Files of `torch.save` that hold nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from longburn.models.matrix_game_2.vae import WanVae
from longburn.models.matrix_game_2.vae_tiny import TinyDecoder
from longburn.weights import CheckpointError
from longburn.weights.pickled import PickledSource


@pytest.mark.parametrize("read", [PickledSource, WanVae.from_checkpoint, TinyDecoder.from_checkpoint])
def test_an_empty_file_is_refused_in_a_line(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "empty.pth"
    path.touch()
    with pytest.raises(CheckpointError, match=r"empty\.pth: cannot be read as tensors alone: .+") as raised:
        read(path)
    assert "\n" not in str(raised.value)
