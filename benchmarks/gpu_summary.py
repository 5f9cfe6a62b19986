"""The tables of the GPU benchmark, from its records."""

from collections.abc import Mapping, Sequence
from typing import Any

from sheets import Sheet

Record = Mapping[str, Any]
GIB = 1024**3

DECODE = ("longburn", "longburn, all features", "longburn, fp8 cache", "cuDNN", "FA2", "Flex")
PREFILL = ("longburn", "cuDNN", "FA2", "Flex")


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """The tables for which there are records, in order."""
    sections = result["sections"]
    best = next(iter(sections.get("ceilings", [])), None)
    decode, prefill = (sections.get(f"{name} attention", []) for name in ("decode", "prefill"))
    flex = sections.get("flex", [])
    decode, prefill = (
        [*some, *(r for r in flex if r["case"] in {o["case"] for o in some})] for some in (decode, prefill)
    )
    made = [
        _decode(decode, best),
        _windows(decode, best),
        _prefill(prefill, best),
        _model_decode(sections.get("model", []), sections.get("transformers", []), best),
        _model_prefill(sections.get("model", []), sections.get("transformers", []), best),
    ]
    return [sheet for sheet in made if sheet.rows]


def notes(result: Mapping[str, Any]) -> list[str]:
    """What stands under the tables: ceilings, loading, what failed or was cut short."""
    sections = result["sections"]
    model = sections.get("model", [])
    every = [(section, record) for section, records in sections.items() for record in records]
    lines = [_ceilings(best) for best in sections.get("ceilings", [])]
    lines += [_loading(record) for record in model if record["case"] == "load"]
    lines += [_check(record) for record in model if record["case"] == "check"]
    lines += [f"No figure: {section}, {_name(r)}: {r['failed']}" for section, r in every if "failed" in r]
    lines += [f"{section}: {why}" for section, why in result["cut"].items()]
    if any(record.get("how") == "stream" for _, record in every):
        lines.append("*: launched from Python each time, because it cannot be recorded into a CUDA graph.")
    return lines


def _ceilings(best: Record) -> str:
    read, copy, product = best["read"] / 1e12, best["copy"] / 1e12, best["matmul"] / 1e12
    return (
        f"Floors: bytes at {read:.2f} TB/s (a sum; a copy moves {copy:.2f} TB/s, read and written) or FLOP at "
        f"{product:.0f} TFLOP/s (a bf16 product of 8192 x 8192), whichever takes longer."
    )


def _loading(record: Record) -> str:
    grown = (record["peak_resident"] - record["resident_before"]) / GIB
    where = "from disk" if record["cold"] else "again, from the page cache,"
    return (
        f"Loading {record['bytes'] / 1e9:.2f} GB {where} took "
        f"{record['seconds']:.1f} s ({record['bytes'] / record['seconds'] / 1e9:.1f} GB/s). Host memory grew by "
        f"{grown:.2f} GiB at most; the largest tensor has {record['largest_tensor'] / GIB:.2f} GiB."
    )


def _check(record: Record) -> str:
    cache = "an fp8" if record["packed"] else "a bf16"
    return (
        f"Check with {cache} cache: the logits of a stream through four layers are {record['error']:.2%} "
        f"off those in fp32, those of plain bf16 operations {record['plain_error']:.2%}; "
        f"{record['same_tokens']} tokens of the whole model are the likeliest ones without the recorded step too."
    )


def floor(record: Record, best: Record | None) -> float | None:
    """The least seconds that the device needs for it."""
    if best is None or "bytes" not in record or "flops" not in record:
        return None
    return max(record["bytes"] / best["read"], record["flops"] / best["matmul"])


def _name(record: Record) -> str:
    keys = ("case", "engine", "batch", "context", "packed")
    return ", ".join(
        f"{record[key]}" if key in ("case", "engine") else f"{key} {record[key]}" for key in keys if key in record
    )


def _by_case(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    cases: dict[str, dict[str, Record]] = {}
    for record in records:
        cases.setdefault(record["case"], {})[record["engine"]] = record
    return cases


def _time(record: Record | None, unit: float) -> str:
    if record is None:
        return "-"
    if "seconds" not in record:
        return "failed"
    return (
        f"{record['seconds'] / unit:.{1 if record['seconds'] / unit < 1000 else 0}f}{'*' * (record['how'] == 'stream')}"
    )


def _ratio(a: float | None, b: float | None, form: str = ".2f") -> str:
    return "-" if not a or not b else f"{a / b:{form}}"


def _seconds(record: Record | None) -> float | None:
    return None if record is None else record.get("seconds")


def _decode(records: Sequence[Record], best: Record | None) -> Sheet:
    rows = []
    for case, engines in _by_case(records).items():
        if case.startswith("window"):
            continue
        plain, more, packed = (engines.get(name) for name in DECODE[:3])
        least = None if plain is None else floor(plain, best)
        times = [_time(engines.get(name), 1e-6) for name in DECODE]
        rows.append(
            [
                case,
                "-" if least is None else f"{least * 1e6:.1f}",
                *times,
                _ratio(least, _seconds(plain), ".0%"),
                _ratio(_seconds(more), _seconds(plain)),
                _ratio(_seconds(plain), _seconds(engines.get("cuDNN"))),
                _ratio(_seconds(plain), _seconds(packed)),
            ]
        )
    header = ["rows x heads x size, keys", "floor", "longburn", "+ features", "fp8", "cuDNN", "FA2", "Flex"]
    header += ["of the floor", "features / plain", "/ cuDNN", "bf16 / fp8"]
    return Sheet("Attention of one new token, us (peers: no sinks, no bias)", header, rows)


def _windows(records: Sequence[Record], best: Record | None) -> Sheet:
    rows = []
    for case, engines in _by_case(records).items():
        if case.startswith("window"):
            record = engines["longburn"]
            least = floor(record, best)
            rows.append([case, "-" if least is None else f"{least * 1e6:.2f}", _time(record, 1e-6)])
    return Sheet(
        "One new token in a layer with a window, learned sinks, 64/8 heads of 64, us",
        ["layer", "floor", "longburn"],
        rows,
    )


def _prefill(records: Sequence[Record], best: Record | None) -> Sheet:
    rows = []
    for case, engines in _by_case(records).items():
        named = {name.split(",")[0]: record for name, record in engines.items()}
        ours = named.get("longburn")
        least = None if ours is None else floor(ours, best)

        def rate(name: str, named: Mapping[str, Record] = named) -> str:
            record = named.get(name)
            if record is None or "seconds" not in record:
                return _time(record, 1)
            return f"{record['flops'] / record['seconds'] / 1e12:.0f}{'*' * (record['how'] == 'stream')}"

        rows.append(
            [
                case,
                "-" if least is None else f"{least * 1e3:.3f}",
                "-" if _seconds(ours) is None else f"{_seconds(ours) * 1e3:.3f}",
                *(rate(name) for name in PREFILL),
                _ratio(_seconds(named.get("cuDNN")), _seconds(ours)),
                _ratio(_seconds(named.get("Flex")), _seconds(ours)),
            ]
        )
    header = [
        "heads x size, queries",
        "floor ms",
        "longburn ms",
        "longburn",
        "cuDNN",
        "FA2",
        "Flex",
        "x cuDNN",
        "x Flex",
    ]
    return Sheet("Attention of many new tokens, TFLOP/s of what is seen (cuDNN and FA2: no sinks)", header, rows)


def _model_decode(records: Sequence[Record], peers: Sequence[Record], best: Record | None) -> Sheet:
    rows = []
    for record in records:
        if record["case"] != "decode":
            continue
        batch, least, seconds = record["batch"], floor(record, best), _seconds(record)
        peer = next((r for r in peers if r["case"] == "decode" and r["context"] == record["context"]), None)
        other = _seconds(peer) if batch == 1 and not record["packed"] else None
        rows.append(
            [
                str(batch),
                f"{record['context']:,}",
                "fp8" if record["packed"] else "bf16",
                "failed" if seconds is None else f"{batch / seconds:,.0f}",
                "-" if least is None else f"{batch / least:,.0f}",
                _ratio(least, seconds, ".0%"),
                "-" if other is None else f"{batch / other:,.0f}",
                _gib(record),
            ]
        )
    header = ["rows", "context", "cache", "tokens/s", "floor", "of the floor", "transformers", "device GiB"]
    return Sheet("GPT-OSS-20B's shape, MXFP4 experts: decode", header, rows, labels=3)


def _model_prefill(records: Sequence[Record], peers: Sequence[Record], best: Record | None) -> Sheet:
    rows = []
    for record in records:
        if record["case"] != "prefill":
            continue
        length, least, seconds = record["context"], floor(record, best), _seconds(record)
        peer = _seconds(next((r for r in peers if r["case"] == "prefill" and r["context"] == length), None))
        rows.append(
            [
                f"{length:,}",
                "failed" if seconds is None else f"{length / seconds:,.0f}",
                "-" if least is None else f"{length / least:,.0f}",
                _ratio(least, seconds, ".0%"),
                "-" if peer is None else f"{length / peer:,.0f}",
                _gib(record),
            ]
        )
    header = ["prompt", "tokens/s", "floor", "of the floor", "transformers", "device GiB"]
    return Sheet("GPT-OSS-20B's shape, MXFP4 experts: reading a prompt", header, rows)


def _gib(record: Record) -> str:
    return f"{record['device_bytes'] / GIB:.1f}" if "device_bytes" in record else "-"
