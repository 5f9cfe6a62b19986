"""Weights shown packed where they are dense, and dense where they are packed."""

import pytest
import torch
from test_checkpoint import Memory

from longburn.kernels.mxfp4 import Mxfp4, dequantize, quantize
from longburn.weights import PackedNames, Transposed

E, OUT, IN = 3, 6, 64
NAMES = {
    "rows": PackedNames(("up", "down"), "."),
    "transposed": PackedNames(("up", "down"), "_", transposed=True),
}


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(E, OUT, IN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", NAMES)
def test_dense_shows_exact_values_and_leaves_the_rest(kind: str) -> None:
    names, packed = NAMES[kind], quantize(weight())
    s = names.separator
    content = {f"0.up{s}blocks": packed.blocks, f"0.up{s}scales": packed.scales, "0.norm": torch.ones(3)}
    source = Memory(content)
    shown = names.dense(source)
    assert names.are_packed(source)
    assert not names.are_packed(shown)
    assert set(shown.tensors) == {"0.up", "0.norm"}
    wanted = dequantize(packed, torch.bfloat16)
    wanted = wanted.mT if names.transposed else wanted
    assert (shown.tensors["0.up"].shape, shown.tensors["0.up"].dtype) == (tuple(wanted.shape), torch.bfloat16)
    assert torch.equal(shown.read("0.up"), wanted)
    assert torch.equal(shown.read("0.norm"), torch.ones(3))


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("mislabelled", [False, True])
def test_packed_shows_the_nearest_mxfp4(kind: str, mislabelled: bool) -> None:
    names, dense = NAMES[kind], weight()
    s, stored = names.separator, dense.mT.contiguous() if names.transposed else dense
    source = Memory({f"0.down{s}blocks" if mislabelled else "0.down": stored, "1.other": dense})
    shown = names.packed(source)
    wanted = quantize(dense)
    assert set(shown.tensors) == {f"0.down{s}blocks", f"0.down{s}scales", "1.other"}
    for name, half in ((f"0.down{s}blocks", wanted.blocks), (f"0.down{s}scales", wanted.scales)):
        assert (shown.tensors[name].shape, shown.tensors[name].dtype) == (tuple(half.shape), torch.uint8)
        assert torch.equal(shown.read(name), half)
    again = names.dense(shown).read("0.down")
    assert torch.equal(again.mT if names.transposed else again, dequantize(Mxfp4(*wanted), torch.bfloat16))


@pytest.mark.parametrize("kind", NAMES)
def test_dense_blocks_without_scales_are_the_dense_weight(kind: str) -> None:
    names, dense = NAMES[kind], weight().to(torch.bfloat16)
    shown = names.dense(Memory({f"0.up{names.separator}blocks": dense}))
    assert set(shown.tensors) == {"0.up"}
    assert torch.equal(shown.read("0.up"), dense)


def test_half_a_packed_weight_stays_what_it_is() -> None:
    """So that the loader says what is missing."""
    blocks = quantize(weight()).blocks
    shown = NAMES["rows"].dense(Memory({"0.up.blocks": blocks}))
    assert set(shown.tensors) == {"0.up.blocks"}


def test_transposed_there_and_back() -> None:
    tensor = weight()
    assert torch.equal(Transposed().to_ours(tensor), tensor.mT)
    assert torch.equal(Transposed().to_theirs(Transposed().to_ours(tensor)), tensor)
