"""GGUF files against the gguf package's own reader and writer."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from gguf_bytes import Q4_1, STRING, UINT32, File, pair, string, tensor, u32

from longburn.weights import CheckpointError, GgufFile
from longburn.weights import gguf as module

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]  # what the package can write


def write(path: Path, **tensors: tuple[np.ndarray, gguf.GGMLQuantizationType | None]) -> Path:
    writer = gguf.GGUFWriter(str(path), "test")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_as_the_package_decodes_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 1000)  # several chunks, of which the last one is smaller
    qtype = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).standard_normal((3, 5, 256)).astype(np.float32)
    stored = quantize(values, qtype)
    file = GgufFile(write(tmp_path / "t.gguf", x=(stored, qtype)))
    assert file.tensors["x"].shape == (3, 5, 256)
    assert file.kind("x") == kind
    read = file.read("x")
    assert read.dtype == file.tensors["x"].dtype == (torch.float16 if kind == "F16" else torch.float32)
    assert torch.equal(read.float(), torch.from_numpy(dequantize(stored, qtype)))
    assert torch.equal(file.read("x", torch.bfloat16), read.bfloat16())


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.float64])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 5)])
def test_plain_numbers_keep_their_dtype(dtype: type, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = (np.random.default_rng(1).standard_normal(shape) * 50).astype(dtype)
    read = GgufFile(write(tmp_path / "t.gguf", x=(values, None))).read("x")
    assert read.dtype == torch.from_numpy(values).dtype
    assert torch.equal(read, torch.from_numpy(values))


def test_reading_gives_a_copy(tmp_path: Path) -> None:
    file = GgufFile(write(tmp_path / "t.gguf", x=(np.ones(4, np.float32), None)))
    file.read("x").zero_()
    assert torch.equal(file.read("x"), torch.ones(4))


def test_metadata_of_every_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "t.gguf"), "test")
    expected: dict[str, object] = {"general.architecture": "test"}

    def add(method: str, value: object) -> None:
        getattr(writer, f"add_{method}")(f"x.{method}", value)
        expected[f"x.{method}"] = value

    for method, number in {"uint8": 2**8, "uint16": 2**16, "uint32": 2**32, "uint64": 2**64}.items():
        add(method, number - 1)
    for method, number in {"int8": 2**7, "int16": 2**15, "int32": 2**31, "int64": 2**63}.items():
        add(method, -number)
    add("float32", -0.15625)
    add("float64", 0.1)
    add("bool", True)
    add("string", "naïve 日本 \0 end")
    for i, values in enumerate(([1, -2, 3], [0.5, -1.25], [True, False, True], ["a", "", "日本"])):
        writer.add_array(f"x.array{i}", values)
        expected[f"x.array{i}"] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GgufFile(tmp_path / "t.gguf").metadata
    assert metadata == expected
    assert {key: type(value) for key, value in metadata.items()} == {k: type(v) for k, v in expected.items()}


def test_alignment_and_version_2_and_no_dimensions(tmp_path: Path) -> None:
    aligned = File(
        version=2,
        pairs=[pair(b"general.alignment", UINT32, u32(256)), pair(b"n", STRING, string(b""))],
        tensors=[tensor(b"b", [4], 0, 256), tensor(b"scalar", [], 0, 0)],
        alignment=256,
        data=np.arange(1, 65, dtype=np.float32).tobytes() + np.arange(4, dtype=np.float32).tobytes(),
    )
    (tmp_path / "t.gguf").write_bytes(aligned.build())
    file = GgufFile(tmp_path / "t.gguf")
    assert torch.equal(file.read("b"), torch.arange(4.0))
    assert torch.equal(file.read("scalar"), torch.tensor(1.0))


def test_what_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_1
    (tmp_path / "t.gguf").write_bytes(File(tensors=[tensor(b"x", [32], kind, 0)]).build())
    file = GgufFile(tmp_path / "t.gguf")
    with pytest.raises(CheckpointError, match="tensor x is Q8_1, which the gguf package cannot decode"):
        file.read("x")
    with pytest.raises(CheckpointError, match="holds no tensor 'y'"):
        file.read("y")
    with pytest.raises(CheckpointError, match="holds no tensor 'y'"):
        file.kind("y")


def test_infinite_scales_are_read_without_a_warning(tmp_path: Path) -> None:
    block = np.array([np.inf, np.nan], np.float16).tobytes() + bytes(16)
    (tmp_path / "t.gguf").write_bytes(File(tensors=[tensor(b"x", [32], Q4_1, 0)], data=block).build())
    assert not GgufFile(tmp_path / "t.gguf").read("x").isfinite().any()


def test_real_file_against_the_packages_reader(smollm2_path: Path) -> None:
    ours, theirs = GgufFile(smollm2_path), gguf.GGUFReader(smollm2_path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [entry.name for entry in theirs.tensors]
    for entry in theirs.tensors:
        assert ours.kind(entry.name) == entry.tensor_type.name
        assert ours.tensors[entry.name].shape == tuple(reversed(entry.shape.tolist()))
        if not entry.name.startswith("blk.") or entry.name.startswith("blk.17."):
            assert torch.equal(ours.read(entry.name), torch.tensor(dequantize(entry.data, entry.tensor_type)))
