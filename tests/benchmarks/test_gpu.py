"""What the GPU benchmark computes beside times: references, costs, tables, and how it survives what goes wrong."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import gpu
import gpu_attention
import gpu_model
import gpu_summary
import gpu_timing
import machine
from gpu_attention import Inputs, KeyBias, Prefill, Shape, compare, truth
from longburn import Alibi, AttnWindow, attend, use_impl
from longburn.models.gpt_oss import GptOss, GptOssConfig
from longburn.models.planning import Sizes, plan_memory


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls without a GPU; times mean nothing then."""
    for module in (gpu_timing, gpu_attention, gpu_model):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_attention, "copies", lambda nbytes: 2)
    monkeypatch.setattr(gpu_attention, "measure", lambda calls: gpu_timing.Timing(1.0, "graph"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_attention, "PEERS", {"cuDNN": torch.nn.attention.SDPBackend.MATH})


def random(shape: Shape, T: int) -> Inputs:
    B, H, K, D, S = shape
    return Inputs(torch.randn(B, H, T, D).double(), *(torch.randn(2, B, K, S, D).double()))


def test_the_truth_is_what_attend_computes() -> None:
    torch.manual_seed(0)
    shape = Shape(2, 6, 3, 16, 29)
    given, second = random(shape, 11), torch.randn(2, 6, 11, 16).double()
    sinks, bias = 3 * torch.randn(6).double(), torch.randn(1, 1, 29).double()
    p, j = torch.arange(18, 29)[:, None], torch.arange(29)
    with use_impl("reference"):
        wanted = attend(
            *given,
            window=AttnWindow(7, sink_tokens=3, relative_sinks=True),
            bias=KeyBias(bias),
            sinks=sinks,
            q_sink=second,
        )
    seen = (j <= p) & ((p - j < 7) | (j < 3))
    out = truth(given, seen=seen, bias=bias, sinks=sinks, kept=(second, 3))
    assert torch.allclose(out, wanted, atol=1e-12)
    rows = torch.tensor([4, 0, 10])
    assert torch.allclose(
        truth(given, rows=rows, seen=seen[rows], bias=bias, sinks=sinks, kept=(second, 3)), out[:, :, rows]
    )


@pytest.mark.parametrize("window", [AttnWindow(), AttnWindow(5), AttnWindow(lookahead=None)], ids=str)
def test_what_a_prefill_sees_and_costs(window: AttnWindow) -> None:
    case = Prefill("x", 6, 3, 16, 11, 29, window)
    torch.manual_seed(1)
    given = random(Shape(1, 6, 3, 16, 29), 11)
    rows = torch.arange(11)
    seen = case.seen(rows)
    with use_impl("reference"):
        assert torch.allclose(truth(given, seen=seen), attend(*given, window=window), atol=1e-12)
    assert case.flops == 4 * 6 * 16 * int(seen.sum())


@pytest.mark.usefixtures("on_cpu")
def test_slopes_are_those_of_the_library() -> None:
    assert torch.allclose(gpu_attention._slopes(8), Alibi(8).slopes)


@pytest.mark.usefixtures("on_cpu")
def test_every_case_computes_the_right_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_attention, "DECODE", [Shape(2, 8, 2, 64, 300), Shape(1, 4, 4, 32, 513)])
    small = [replace(case, T=case.T // 64, S=case.S // 64, flex=False) for case in gpu_attention.PREFILL]
    monkeypatch.setattr(gpu_attention, "PREFILL", small)
    records = [*gpu_attention.decode(), *gpu_attention.prefill()]
    assert [record for record in records if "failed" in record] == []
    assert all(0 < record["error"] < gpu_attention.NEAR for record in records)
    assert {record["engine"] for record in records} == {
        "longburn", "longburn, all features", "longburn, fp8 cache", "cuDNN", "cuDNN, no sinks"
    }  # fmt: skip
    json.dumps(records)


@pytest.mark.usefixtures("on_cpu")
def test_no_figure_without_the_right_result() -> None:
    wanted = torch.randn(2, 3).double()
    right = compare("c", "e", [lambda: wanted.float()], wanted, bytes=1)
    assert right == {"case": "c", "engine": "e", "bytes": 1, "error": right["error"], "seconds": 1.0, "how": "graph"}
    wrong = compare("c", "e", [lambda: wanted * 1.02], wanted)
    assert wrong["failed"] == "off by 0.02, allowed 0.01"
    nan = compare("c", "e", [lambda: wanted.where(wanted < 9, 0).index_fill(0, torch.tensor(0), math.nan)], wanted)
    assert nan["failed"] == "off by inf, allowed 0.01"

    def breaks() -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this")

    assert compare("c", "e", [breaks], wanted)["failed"] == "RuntimeError: no kernel for this"
    assert all("seconds" not in record for record in (wrong, nan))


@pytest.fixture(scope="module")
def released() -> GptOss:
    """The released sizes, without data."""
    with torch.device("meta"):
        return GptOss(GptOssConfig.gpt_oss_20b(), experts="mxfp4", dtype=torch.bfloat16)


def test_weights_add_up(released: GptOss) -> None:
    dense, _, experts, values = gpu_model.weights(released)
    planned = plan_memory(Sizes.of(released.config, None), 1000, 1, itemsize=2, experts="mxfp4", chunk=1024)
    assert dense + experts + released.embed.weight.nbytes == sum(planned.weights.values()) == 13_761_264_768
    assert values == 24 * 32 * 3 * 2880 * 2880


@pytest.mark.parametrize(("length", "tokens"), [(8192, 767), (32768, 664), (131072, 433)])
def test_the_floor_of_decoding_is_the_known_one(released: GptOss, length: int, tokens: int) -> None:
    """Counted by hand for 3.0 TB/s: attention, a share of 4 in 32 experts, head, and the keys of 12 full layers."""
    costs = gpu_model.decode_costs(released, 1, length, packed=False)
    assert 3.0e12 / costs["bytes"] == pytest.approx(tokens, rel=0.02)
    packed = gpu_model.decode_costs(released, 1, length, packed=True)
    keys = 2 * 8 * 64 * (12 * length + 12 * 128)
    assert costs["bytes"] - packed["bytes"] == 2 * keys - keys * 68 // 64


def test_a_batch_meets_almost_all_experts(released: GptOss) -> None:
    dense, _, experts, _ = gpu_model.weights(released)
    keys = 32 * 2 * 2 * 8 * 64 * (12 * 8192 + 12 * 128)
    met = (gpu_model.decode_costs(released, 32, 8192, packed=False)["bytes"] - dense - keys) / experts
    assert met == pytest.approx(1 - (28 / 32) ** 32, abs=1e-6)


def test_prefill_costs_count_each_token_once(released: GptOss) -> None:
    short, long = (gpu_model.prefill_costs(released, length)["flops"] for length in (1, 2))
    active = 3.6e9 - 201088 * 2880  # of the model card's 3.6 billion active ones, the head is used once
    assert long - short == pytest.approx(2 * active, rel=0.05)


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu, "WORKER", tmp_path / "worker.py")
    return tmp_path / "worker.py"


def test_a_section_is_read_line_by_line(worker: Path) -> None:
    worker.write_text("import json, sys\njob = json.load(sys.stdin)\nprint('noise')\nprint(json.dumps(job))")
    records: list[Any] = []
    assert gpu.run_section("model", {"checkpoint": "x"}, 30, records.append) is None
    assert records == [{"section": "model", "checkpoint": "x"}]


def test_what_a_late_section_has_done_counts(worker: Path) -> None:
    worker.write_text("import time\nprint('{\"case\": 1}', flush=True)\ntime.sleep(600)")
    records: list[Any] = []
    assert gpu.run_section("model", {}, 2, records.append) == "stopped after 2 s"
    assert records == [{"case": 1}]


def test_what_a_failing_section_has_done_counts(worker: Path) -> None:
    worker.write_text("print('{\"case\": 1}', flush=True)\nraise ValueError('out\\nof memory')")
    records: list[Any] = []
    why = gpu.run_section("model", {}, 30, records.append)
    assert records == [{"case": 1}]
    assert why is not None
    assert why.startswith("failed: ")
    assert why.endswith("ValueError: out of memory")


@pytest.fixture
def pretended(worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU that is not there, a writer and a worker that do nothing; gives the directory of results."""
    worker.write_text(
        "import json, pathlib, sys\njob = json.load(sys.stdin)\n"
        "assert job['section'] != 'transformers', 'no room'\n"
        "written = job['checkpoint'] != 'None' and pathlib.Path(job['checkpoint'], 'config.json').exists()\n"
        "print(json.dumps({'case': job['section'], 'engine': 'e', 'written': written}))"
    )
    (tmp_path / "writer.py").write_text("import pathlib, sys\npathlib.Path(sys.argv[1], 'config.json').touch()")
    monkeypatch.setattr(gpu, "WRITER", tmp_path / "writer.py")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "describe_gpu", lambda: {})
    monkeypatch.setattr(gpu, "sheets", lambda result: [])
    monkeypatch.setattr(machine, "ASSETS", tmp_path / "assets")
    return tmp_path / "assets"


def test_a_run_keeps_what_its_sections_gave(pretended: Path, tmp_path: Path) -> None:
    gpu.main(
        only="decode attention,model,transformers", checkpoint=None, scratch=tmp_path, warm=False, minutes=1, save=True
    )
    result = json.loads((pretended / "gpu.json").read_text())
    assert list(result["sections"]) == ["decode attention", "model", "transformers"]
    assert result["sections"]["model"] == [{"case": "model", "engine": "e", "written": True}]
    assert result["sections"]["transformers"] == []
    assert list(result["cut"]) == ["transformers"]
    assert result["cut"]["transformers"].endswith("no room")
    assert not list(tmp_path.glob("longburn-20b-*"))


def test_compilers_are_warmed_side_by_side(worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.write_text(
        "import json, pathlib, sys, time\nname = json.load(sys.stdin)['section']\n"
        f"pathlib.Path({str(tmp_path)!r}, name).touch()\ntime.sleep(600 * (name == 'flex'))"
    )
    monkeypatch.setattr(gpu, "WARM_SECONDS", 3)
    assert 3 <= gpu.warm_up(["ceilings", "flex", "model"]) < 20
    assert {path.name for path in tmp_path.iterdir()} == {
        "worker.py",
        "flex",
        "warm model",
        "warm packed",
        "warm prompts",
    }


def test_a_checkpoint_of_ones_own_is_not_written(pretended: Path, tmp_path: Path) -> None:
    gpu.main(only="model", checkpoint=tmp_path / "own", scratch=None, warm=False, minutes=1, save=True)
    result = json.loads((pretended / "gpu.json").read_text())
    assert result["sections"]["model"] == [{"case": "model", "engine": "e", "written": False}]
    assert "written" not in result


def test_a_writer_that_fails_is_told(pretended: Path, tmp_path: Path) -> None:
    gpu.WRITER.write_text("raise SystemExit(3)")
    gpu.main(only="model", checkpoint=None, scratch=tmp_path, warm=False, minutes=1, save=True)
    assert json.loads((pretended / "gpu.json").read_text())["cut"] == {"checkpoint": "writer.py failed with code 3"}


def test_sections_that_do_not_exist(pretended: Path) -> None:
    with pytest.raises(typer.BadParameter, match="no section modle; there are ceilings, decode attention"):
        gpu.main(only="modle", checkpoint=None, scratch=None, warm=False, minutes=1, save=True)
    assert not pretended.exists()


def timed(case: str, engine: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {"case": case, "engine": engine, "seconds": seconds, "how": "graph", "bytes": 3e6, "flops": 7e6, **more}


RESULT: dict[str, Any] = {
    "sections": {
        "ceilings": [{"read": 3e12, "copy": 2.9e12, "matmul": 7e14}],
        "decode attention": [
            timed("A", "longburn", 1.25e-6),
            timed("A", "longburn, all features", 1.5e-6),
            timed("A", "longburn, fp8 cache", 1e-6, how="stream"),
            timed("A", "cuDNN", 2.5e-6),
            {"case": "A", "engine": "FA2", "failed": "RuntimeError: no"},
            timed("window 128 at 8,192, ring", "longburn", 4e-6),
        ],
        "prefill attention": [
            timed("P", "longburn", 1e-3, flops=5e11),
            timed("P", "cuDNN, no sinks", 2e-3, flops=5e11),
        ],
        "flex": [timed("P", "Flex", 4e-3, flops=5e11), timed("A", "Flex", 20e-6)],
        "model": [
            {"case": "load", "cold": True, "seconds": 5.0, "bytes": 13e9, "largest_tensor": 2**30,
             "resident_before": 2**30, "peak_resident": 2**31},
            {"case": "check", "packed": False, "error": 0.01, "plain_error": 0.02, "same_tokens": 128},
            {"case": "decode", "batch": 32, "context": 8192, "packed": False, "seconds": 0.01, "bytes": 1.5e10,
             "flops": 1e10, "device_bytes": 2**34},
            {"case": "decode", "batch": 1, "context": 8192, "packed": False, "seconds": 0.002, "bytes": 3e9,
             "flops": 1e10, "device_bytes": 2**34},
            {"case": "decode", "batch": 1, "context": 8192, "packed": True, "bytes": 3e9, "flops": 1e10,
             "failed": "wrong"},
            {"case": "prefill", "context": 8192, "seconds": 0.2, "bytes": 1e10, "flops": 7e13, "device_bytes": 2**34},
        ],
        "transformers": [
            {"case": "decode", "engine": "transformers", "context": 8192, "packed": False, "batch": 1, "seconds": 0.04},
            {"case": "prefill", "engine": "transformers", "context": 8192, "seconds": 2.0},
        ],
    },
    "cut": {"prefill attention": "stopped after 150 s"},
}  # fmt: skip


def test_tables() -> None:
    decode, windows, prefill, model, prompt = gpu_summary.sheets(RESULT)
    assert [list(row) for row in decode.rows] == [
        ["A", "1.0", "1.3", "1.5", "1.0*", "2.5", "failed", "20.0", "80%", "1.20", "0.50", "1.25"]
    ]
    assert [list(row) for row in windows.rows] == [["window 128 at 8,192, ring", "1.00", "4.0"]]
    assert [list(row) for row in prefill.rows] == [["P", "0.714", "1.000", "500", "250", "-", "125", "2.00", "4.00"]]
    assert [list(row) for row in model.rows] == [
        ["32", "8,192", "bf16", "3,200", "6,400", "50%", "-", "16.0"],
        ["1", "8,192", "bf16", "500", "1,000", "50%", "25", "16.0"],
        ["1", "8,192", "fp8", "failed", "1,000", "-", "-", "-"],
    ]
    assert [list(row) for row in prompt.rows] == [["8,192", "40,960", "81,920", "50%", "4,096", "16.0"]]
    assert all(len(row) == len(sheet.header) for sheet in gpu_summary.sheets(RESULT) for row in sheet.rows)


def test_notes_say_what_has_no_figure() -> None:
    notes = gpu_summary.notes(RESULT)
    assert "No figure: decode attention, A, FA2: RuntimeError: no" in notes
    assert "No figure: model, decode, batch 1, context 8192, packed True: wrong" in notes
    assert "prefill attention: stopped after 150 s" in notes
    assert any("13.00 GB from disk took 5.0 s (2.6 GB/s). Host memory grew by 1.00 GiB" in note for note in notes)
    assert any("1.00% off those in fp32, those of plain bf16 operations 2.00%" in note for note in notes)
    assert notes[-1].startswith("*: launched from Python")


def test_a_run_without_ceilings_has_no_floors() -> None:
    sections = {name: records for name, records in RESULT["sections"].items() if name != "ceilings"}
    decode = gpu_summary.sheets(RESULT | {"sections": sections})[0]
    assert decode.rows[0][1] == decode.rows[0][8] == "-"
