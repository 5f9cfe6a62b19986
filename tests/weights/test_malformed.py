"""Damaged and hostile files: each one a `CheckpointError` in one line that names the thing, never anything else."""

import json
import tempfile
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_bytes import ARRAY, BOOL, F32, Q4_1, STRING, UINT8, UINT32, File, array, pair, string, tensor, u32, u64
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from longburn.weights import CheckpointError, GgufFile, SafetensorsSource

HUGE = 2**63 + 5

GGUF_CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "begins with b'', wanted b'GGUF'"),
    "short magic": (b"GG", "begins with b'GG'"),
    "wrong magic": (File(magic=b"GGML").build(), "begins with b'GGML'"),
    "magic only": (b"GGUF", "version at byte 4 wants 4 bytes, 0 are left"),
    "version 1": (File(version=1).build(), "GGUF version 1, wanted 2 or 3"),
    "version 4": (File(version=4).build(), "GGUF version 4, wanted"),
    "big-endian": (File(version=3 << 24).build(), r"version 50331648 \(a big-endian file\)"),
    "no counts": (b"GGUF" + u32(3) + b"\0\0\0", "tensor count at byte 8 wants 8 bytes, 3 are left"),
    "too many pairs": (File(pair_count=HUGE).build(), "metadata key"),
    "too many tensors": (File(tensor_count=HUGE).build(), "name of tensor 3 at byte .* truncated"),
    "key too long": (File(pairs=[u64(HUGE) + b"x"]).build(), f"metadata key 0 at byte 32 wants {HUGE} bytes"),
    "key not UTF-8": (File(pairs=[pair(b"\xff\xfe", UINT32, u32(1))]).build(), "metadata key 0 .*not UTF-8"),
    "key twice": (File(pairs=[pair(b"k", UINT32, u32(1))] * 2).build(), "metadata key 'k' comes twice"),
    "value type": (File(pairs=[pair(b"k", 13, u32(1))]).build(), "k has value type 13, wanted 0 to 12"),
    "text too long": (File(pairs=[pair(b"k", STRING, u64(10**6) + b"x")]).build(), "k at byte .* wants 1000000"),
    "text not UTF-8": (File(pairs=[pair(b"k", STRING, string(b"\x80"))]).build(), "k at byte .* is not UTF-8"),
    "number cut off": (File(pairs=[pair(b"k", UINT32, b"\1")], tensors=[], data=b"", alignment=1).build(), "k at byte"),
    "array type": (File(pairs=[pair(b"k", ARRAY, array(77, []))]).build(), "k has value type 77"),
    "array of arrays": (
        File(pairs=[pair(b"k", ARRAY, array(ARRAY, [array(UINT8, [b"\1"])]))]).build(),
        "k is an array of arrays",
    ),
    "array too long": (File(pairs=[pair(b"k", ARRAY, array(UINT8, [], HUGE))]).build(), f"k at byte .* wants {HUGE}"),
    "flags too long": (File(pairs=[pair(b"k", ARRAY, array(BOOL, [], 10**12))]).build(), "wants 1000000000000 bytes"),
    "texts too many": (
        File(pairs=[pair(b"k", ARRAY, array(STRING, [string(b"a")], HUGE))], tensors=[], data=b"", alignment=1).build(),
        r"k\[1\] at byte .* goes beyond the end",
    ),
    "texts too long": (
        File(pairs=[pair(b"k", ARRAY, array(STRING, [string(b"a"), u64(HUGE)]))]).build(),
        r"k\[1\] at byte",
    ),
    "texts not UTF-8": (
        File(pairs=[pair(b"k", ARRAY, array(STRING, [string(b"a"), string(b"\xc3")]))]).build(),
        r"k\[1\] at byte .* is not UTF-8",
    ),
    "alignment 0": (File(pairs=[pair(b"general.alignment", UINT32, u32(0))]).build(), "general.alignment is 0"),
    "alignment 24": (File(pairs=[pair(b"general.alignment", UINT32, u32(24))]).build(), "is 24, wanted a power of two"),
    "alignment text": (File(pairs=[pair(b"general.alignment", STRING, string(b"32"))]).build(), "is '32', wanted"),
    "alignment flag": (File(pairs=[pair(b"general.alignment", BOOL, b"\1")]).build(), "is True, wanted"),
    "tensor name too long": (File(tensors=[u64(HUGE)]).build(), "name of tensor 0"),
    "tensor name not UTF-8": (File(tensors=[tensor(b"\xff", [8], F32, 0)]).build(), "name of tensor 0 .*not UTF-8"),
    "tensor twice": (File(tensors=[tensor(b"a", [8], F32, 0)] * 2).build(), "tensor 'a' comes twice"),
    "five dimensions": (File(tensors=[tensor(b"a", [1] * 5, F32, 0)]).build(), "a has 5 dimensions, wanted at most 4"),
    "size 0": (File(tensors=[tensor(b"a", [0, 4], F32, 0)]).build(), r"tensor a is \[4, 0\], wanted no 0"),
    "tensor type": (File(tensors=[tensor(b"a", [8], 999, 0)]).build(), "tensor a has type 999"),
    "tensor type removed": (File(tensors=[tensor(b"a", [32], 4, 0)]).build(), "tensor a has type 4"),
    "ragged blocks": (
        File(tensors=[tensor(b"a", [33], Q4_1, 0)]).build(),
        r"tensor a is \[33\], wanted .* multiple of Q4_1's 32",
    ),
    "scalar in blocks": (File(tensors=[tensor(b"a", [], Q4_1, 0)]).build(), r"tensor a is \[\], wanted"),
    "offset not aligned": (
        File(tensors=[tensor(b"a", [8], F32, 8)]).build(),
        "a begins at offset 8, wanted a multiple",
    ),
    "offset beyond": (File(tensors=[tensor(b"a", [8], F32, 1 << 40)]).build(), "a takes bytes .* the file ends at"),
    "offset wraps": (File(tensors=[tensor(b"a", [8], F32, 2**64 - 32)]).build(), "a takes bytes .* the file ends at"),
    "shape beyond": (File(tensors=[tensor(b"a", [33], F32, 0)]).build(), "a takes bytes .* the file ends at"),
    "shape wraps": (File(tensors=[tensor(b"a", [2**32, 2**32], F32, 0)]).build(), "a takes bytes .* the file ends at"),
    "overlap": (
        File(tensors=[tensor(b"a", [16], F32, 0), tensor(b"b", [8], F32, 32)]).build(),
        "tensors a and b overlap at byte",
    ),
    "data cut off": (File().build()[:-1], "tensor b takes bytes .* truncated or damaged"),
}


@pytest.mark.parametrize("case", GGUF_CASES)
def test_malformed_gguf(case: str, tmp_path: Path) -> None:
    data, message = GGUF_CASES[case]
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufFile(tmp_path / "bad.gguf")
    assert str(caught.value).startswith(f"{tmp_path / 'bad.gguf'}: ")
    assert "\n" not in str(caught.value)


def test_the_file_that_the_cases_vary_is_right(tmp_path: Path) -> None:
    (tmp_path / "good.gguf").write_bytes(File().build())
    file = GgufFile(tmp_path / "good.gguf")
    assert file.metadata == {"general.name": "tiny"}
    assert file.read("a").shape == (2, 8)
    assert file.read("b").numpy().tobytes() == bytes(range(64, 128))


def test_gguf_path_that_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(CheckpointError, match="cannot be opened"):
            GgufFile(path)


@cache
def tiny_gguf() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tiny.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_context_length(64)
        writer.add_token_list(["a", "b", "ab"])
        writer.add_token_scores([0.0, -1.0, 2.0])
        writer.add_add_bos_token(True)
        values = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
        quantised = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor("plain", values)
        writer.add_tensor("blocks", gguf.quants.quantize(values, quantised), raw_dtype=quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def read_gguf(data: bytes, directory: Path) -> None:
    path = directory / "flipped.gguf"
    path.write_bytes(data)
    file = GgufFile(path)
    for name, info in file.tensors.items():
        assert file.read(name).shape == info.shape


def test_gguf_cut_off_anywhere(tmp_path: Path) -> None:
    read_gguf(tiny_gguf(), tmp_path)
    unpadded = tiny_gguf().rstrip(b"\0")
    for length in range(len(unpadded)):
        with pytest.raises(CheckpointError):
            read_gguf(tiny_gguf()[:length], tmp_path)


flips = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4)


@given(flips=flips)
def test_gguf_with_bytes_flipped_reads_or_says_why(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(tiny_gguf())
    for at, value in flips:
        data[at % len(data)] = value
    try:
        read_gguf(bytes(data), tmp_path_factory.getbasetemp())
    except CheckpointError as error:
        assert str(error)  # noqa: PT017 (either outcome is right)


def header(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return u64(len(text)) + text


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = save({"a": torch.ones(2, 3), "b": torch.arange(4)})
SAFETENSORS_CASES = {
    "empty": b"",
    "short length": b"\1\0\0",
    "length beyond": u64(10**6) + b"{}",
    "length huge": u64(HUGE) + b"{}",
    "not JSON": u64(4) + b"{{{{",
    "not UTF-8": u64(4) + b"\xff\xff\xff\xff",
    "a list": u64(2) + b"[]",
    "deep": u64(20000) + b"[" * 20000,
    "a GGUF file": File().build(),
    "data too long": GOOD + b"\0",
    "shape against size": header(a=entry("F32", [3], 0, 8)) + bytes(8),
    "shape overflows": header(a=entry("F32", [2**33, 2**33], 0, 8)) + bytes(8),
    "negative shape": header(a=entry("F32", [-2], 0, 8)) + bytes(8),
    "offsets swapped": header(a=entry("F32", [2], 8, 0)) + bytes(8),
    "offsets overlap": header(a=entry("F32", [2], 0, 8), b=entry("F32", [2], 4, 12)) + bytes(12),
    "a hole": header(a=entry("F32", [2], 0, 8), b=entry("F32", [1], 12, 16)) + bytes(16),
    "dtype unknown": header(a=entry("F31", [2], 0, 8)) + bytes(8),
    "dtype not supported": header(a=entry("F4", [16], 0, 8)) + bytes(8),
    "no offsets": header(a={"dtype": "F32", "shape": [2]}) + bytes(8),
    "cut off, and overlapping": header(a=entry("F32", [2], 0, 8), b=entry("F32", [2], 4, 12)) + bytes(3),
    "cut off, and of another size": header(a=entry("F32", [2], 0, 12)) + bytes(3),
    "cut off, and negative": header(a=entry("F32", [-2, -1], 0, 8)) + bytes(3),
    "cut off in the header": GOOD[:20],
}


@pytest.mark.parametrize("case", SAFETENSORS_CASES)
def test_malformed_safetensors(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(SAFETENSORS_CASES[case])
    with pytest.raises(CheckpointError) as caught:
        SafetensorsSource(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) > len(f"{path}: not a readable safetensors file: ") or "dtype" in str(caught.value)


def test_tensors_that_the_end_of_the_file_cuts_off_are_named(tmp_path: Path) -> None:
    """The others can be read."""
    path = tmp_path / "short.safetensors"
    path.write_bytes(GOOD[:-1])
    tensors = SafetensorsSource(path).tensors
    cut, whole = sorted(tensors, key=lambda name: tensors[name].damage is None)
    assert tensors[cut].damage == f"cut off: short.safetensors ends at byte {len(GOOD) - 1}, the tensor at {len(GOOD)}"
    assert tensors[whole].damage is None
    assert SafetensorsSource(path).read(whole).shape == tensors[whole].shape
    with pytest.raises(CheckpointError, match=f"short.safetensors: cannot read {cut}: .* bytes are left of"):
        SafetensorsSource(path).read(cut)


def test_all_unreadable_shards_are_listed(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save_file({name: torch.ones(3)}, tmp_path / f"{name}.safetensors")
    for name in ("a", "c"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a readable .*; .*c\.safetensors: not a readable"):
        SafetensorsSource(tmp_path)


@given(flips=flips)
def test_safetensors_with_bytes_flipped_read_or_say_why(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(GOOD)
    for at, value in flips:
        data[at % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(data)
    try:
        source = SafetensorsSource(path)
        for name, info in source.tensors.items():
            tensor = source.read(name)
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
    except CheckpointError as error:
        assert str(error)  # noqa: PT017 (either outcome is right)


INDEX_CASES: dict[str, tuple[object, str]] = {
    "not JSON": ("{", "not a readable JSON file"),
    "not UTF-8": (b"\xff", "not a readable JSON file"),
    "a list": ([], "wanted an object 'weight_map'"),
    "no map": ({"metadata": {}}, "wanted an object 'weight_map'"),
    "map is a list": ({"weight_map": ["a"]}, "wanted an object 'weight_map'"),
    "file is a number": ({"weight_map": {"a": 1}}, "wanted an object 'weight_map'"),
    "shard absent": ({"weight_map": {"a": "two.safetensors"}}, "names the shard two.safetensors, which is not there"),
    "shard is a directory": ({"weight_map": {"a": "sub"}}, "names the shard sub, which is not there"),
    "tensor absent": ({"weight_map": {"b": "one.safetensors"}}, "promises b here, but the file does not hold it"),
    "parent": ({"weight_map": {"a": "../one.safetensors"}}, "outside the checkpoint's directory"),
    "hidden parent": ({"weight_map": {"a": "sub/../../one.safetensors"}}, "outside the checkpoint's directory"),
    "absolute": ({"weight_map": {"a": "/etc/passwd"}}, "outside the checkpoint's directory"),
    "drive": ({"weight_map": {"a": "C:\\one.safetensors"}}, "outside the checkpoint's directory"),
    "backslashes": ({"weight_map": {"a": "..\\one.safetensors"}}, "outside the checkpoint's directory"),
    "network": ({"weight_map": {"a": "\\\\host\\one.safetensors"}}, "outside the checkpoint's directory"),
    "no name": ({"weight_map": {"a": ""}}, "outside the checkpoint's directory"),
    "zero byte": ({"weight_map": {"a": "one\0.safetensors"}}, "outside the checkpoint's directory"),
}


@pytest.mark.parametrize("case", INDEX_CASES)
def test_malformed_index(case: str, tmp_path: Path) -> None:
    content, message = INDEX_CASES[case]
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / "sub").mkdir()
    index = tmp_path / "model.safetensors.index.json"
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    raw = text.encode() if isinstance(text, str) else text
    index.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsSource(tmp_path)


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors file$"):
        SafetensorsSource(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, which may run code"):
        SafetensorsSource(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"wanted one index, found a\.safetensors"):
        SafetensorsSource(tmp_path)


def test_one_name_in_two_shards(tmp_path: Path) -> None:
    for shard in ("one", "two"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{shard}.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is both in .*one\.safetensors and in .*two\.safetensors"):
        SafetensorsSource(tmp_path)


def test_shards_may_be_links_to_elsewhere(tmp_path: Path) -> None:
    """As download caches keep them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "one.safetensors").symlink_to(tmp_path / "blobs" / "0123")
    index = {"weight_map": {"a": "one.safetensors"}}
    (tmp_path / "snapshot" / "model.safetensors.index.json").write_text(json.dumps(index))
    source = SafetensorsSource(tmp_path / "snapshot")
    assert torch.equal(source.read("a"), torch.ones(1))
    with pytest.raises(CheckpointError, match="no tensor 'b' in this checkpoint"):
        source.read("b")


def test_every_dtype_of_safetensors(tmp_path: Path) -> None:
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
    dtypes += [torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]
    save_file({str(dtype): torch.zeros(3, dtype=dtype) for dtype in dtypes}, tmp_path / "all.safetensors")
    source = SafetensorsSource(tmp_path / "all.safetensors")
    for dtype in dtypes:
        assert source.tensors[str(dtype)].dtype == source.read(str(dtype)).dtype == dtype
