"""Tensors read straight to where they belong."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from longburn.weights import CheckpointError, Rename, SafetensorsSource, Transposed, load_checkpoint, placing

CONTENT = {
    "a": torch.arange(24, dtype=torch.float32).view(4, 6) * 3.7,
    "b": torch.arange(35, dtype=torch.uint8).view(5, 7),
    "c": torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "number": torch.tensor(5),
    "none": torch.zeros(3, 0),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(CONTENT, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture(params=[(7, 1), (7, 3), (1 << 25, 8)], ids=str)
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of so many bytes, so many readers."""
    monkeypatch.setattr(placing, "PIECE", request.param[0])
    monkeypatch.setattr(placing, "READERS", request.param[1])


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_read_is_what_was_written(file: Path, device: str) -> None:
    source = SafetensorsSource(file)
    for name, wanted in CONTENT.items():
        target = torch.full(wanted.shape, 77, dtype=wanted.dtype, device=device)
        source.read_into(name, target)
        assert torch.equal(target.cpu(), wanted)
        assert torch.equal(source.read(name), wanted)


@pytest.mark.usefixtures("cut")
def test_a_file_that_ended_meanwhile(file: Path) -> None:
    source = SafetensorsSource(file)
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 3)
    last = max(CONTENT, key=lambda name: source._extents[name].start)
    target = torch.empty(CONTENT[last].shape, dtype=CONTENT[last].dtype)
    with pytest.raises(CheckpointError, match=f"cannot read {last}: {target.nbytes - 3} bytes are left of"):
        source.read_into(last, target)


@pytest.mark.parametrize(
    "target",
    [torch.empty(6, 4), torch.empty(4, 6, dtype=torch.float64), torch.empty(6, 4).mT, torch.empty(24)],
    ids=["shape", "dtype", "strides", "flat"],
)
def test_a_target_that_does_not_fit(file: Path, target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"read_into: a is torch\.float32 \[4, 6\], wanted a contiguous target"):
        SafetensorsSource(file).read_into("a", target)


def test_only_tensors_that_change_are_copied_on_the_way(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = nn.ParameterDict({"a": torch.empty(4, 6), "c": torch.empty(3, 9), "d": torch.empty(9, 3)})
    save_file({**CONTENT, "d": CONTENT["c"].clone()}, file)
    rules = [Rename("a", "a"), Rename("c", "c", Transposed()), Rename("d", "d")]
    rules += [Rename(name, name) for name in ("b", "number", "none")]
    for name in ("b", "number", "none"):
        model.register_buffer(name, CONTENT[name].to("meta"))
    copied: list[str] = []
    read = SafetensorsSource.read
    monkeypatch.setattr(SafetensorsSource, "read", lambda self, name: copied.append(name) or read(self, name))
    load_checkpoint(model, SafetensorsSource(file), rules)
    assert sorted(copied) == ["c", "d"]  # c changes its layout, d its dtype
    assert torch.equal(model["a"], CONTENT["a"])
    assert torch.equal(model["c"], CONTENT["c"].float().mT)
    assert torch.equal(model["d"], CONTENT["c"].float())
    assert torch.equal(model.get_buffer("b"), CONTENT["b"])
