"""What the measurements of `cpu_decode.py` come to: medians, ratios, floors, and their tables."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from memory import MIB
from sheets import Sheet

Run = dict[str, Any]


def summarise(runs: Sequence[Run]) -> Run:
    """All of a result but the machine, out of the measurements in the order in which they were made."""
    bytes_per_second = median(run["bytes_per_second"] for run in runs if run["kind"] == "bandwidth")
    groups: dict[tuple[str, int, str], list[Run]] = {}
    for run in runs:
        if run["kind"] == "generation":
            groups.setdefault((run["dtype"], run["context"], run["engine"]), []).append(run)
    rows = [_generation(group, groups[dtype, context, "longburn"][0]) for (dtype, context, _), group in groups.items()]
    for row in rows:
        row["floor"] = bytes_per_second / row.pop("bytes_per_step")
    windows = [_window(run) for run in runs if run["kind"] == "window"]
    torch_mib = median(run["torch_bytes"] for run in runs if run["kind"] == "bandwidth") / MIB
    others = [run["other_cores"] for run in runs if run["other_cores"] is not None]
    return {
        "read_gb_s": bytes_per_second / 1e9,
        "torch_mib": torch_mib,
        "other_cores": [median(others), max(others)] if others else None,
        "generation": rows,
        "window": windows,
    }


def _generation(runs: Sequence[Run], ours: Run) -> Run:
    """Medians over the rounds of one engine, dtype and context. `ours` knows the bytes of weights and cache."""
    first = runs[0]
    speeds = sorted(1 / run["step_seconds"] for run in runs)
    # every step reads the weights once (the embedding is the head) and the keys and values of all positions so far
    slots = ours["context"] + ours["decode_tokens"] + 2
    same = next((i for i, (x, y) in enumerate(zip(first["tokens"], ours["tokens"], strict=True)) if x != y), None)
    row = {
        "engine": first["engine"],
        "version": first["version"],
        "dtype": first["dtype"],
        "context": first["context"],
        "rounds": len(runs),
        "decode": median(speeds),
        "decode_range": [speeds[0], speeds[-1]],
        "prefill": median(first["context"] / run["prefill_seconds"] for run in runs),
        "bytes_per_step": ours["weights_bytes"] + ours["cache_bytes"] * first["context"] / slots,
        "peak_mib": median(run["peak_bytes"] for run in runs) / MIB,
        "same_greedy_tokens": len(ours["tokens"]) if same is None else same,
    }
    if first["engine"] == "longburn":
        row["limit_mib"] = memory_limit(ours["weights_bytes"], ours["cache_bytes"])
    return row


def _window(run: Run) -> Run:
    """Speeds at both positions, and the median of their ratio, which was taken turn by turn."""
    near, far = run["step_seconds"]["near"], run["step_seconds"]["far"]
    return {
        "dtype": run["dtype"],
        "window": run["window"],
        "near": run["near"],
        "far": run["far"],
        "near_decode": 1 / median(near),
        "far_decode": 1 / median(far),
        "ratio": median(a / b for a, b in zip(near, far, strict=True)),
        "cache_mib": run["cache_bytes"] / MIB,
        "peak_mib": run["peak_bytes"] / MIB,
        "limit_mib": memory_limit(run["weights_bytes"], 2 * run["cache_bytes"]),
    }


def memory_limit(weights_bytes: int, cache_bytes: int) -> float:
    """MiB that the project allows itself: 1.2 x (weights + caches + 150 MiB)."""
    return 1.2 * ((weights_bytes + cache_bytes) / MIB + 150)


def quiet(result: Mapping[str, Any]) -> str:
    """How busy the machine was otherwise."""
    if not result.get("other_cores"):
        return "How busy the machine was with other work is not known."
    middle, most = result["other_cores"]
    return (
        f"Other work kept {middle:.2f} cores busy during the median measurement, "
        f"{most:.2f} during the most disturbed one."
    )


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """One table for each dtype, and one for the window."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in result["generation"]))
    pages = [_generation_sheet(result, dtype) for dtype in dtypes]
    return [*pages, _window_sheet(result)] if result["window"] else pages


def _generation_sheet(result: Mapping[str, Any], dtype: str) -> Sheet:
    mine = {(row["context"], row["engine"]): row for row in result["generation"] if row["dtype"] == dtype}
    rows = []
    for (context, engine), row in mine.items():
        peer = mine.get((context, "transformers"))
        decode, prefill = (f"{row[what] / peer[what]:.2f}x" if peer else "-" for what in ("decode", "prefill"))
        share = f"{row['decode'] / row['floor']:.0%} of {row['floor']:.1f}"
        peak = f"{row['peak_mib']:.0f}" + (f" of {row['limit_mib']:.0f}" if "limit_mib" in row else "")
        rows.append(
            [str(context), engine, f"{row['decode']:.1f}", decode, share, f"{row['prefill']:.0f}", prefill, peak]
        )
    header = ("context", "engine", "decode", "/ transformers", "of the floor", "prefill", "/ transformers", "peak MiB")
    title = f"{dtype}, tokens/s; memory reads at {result['read_gb_s']:.1f} GB/s"
    return Sheet(title, header, rows, labels=2)


def _window_sheet(result: Mapping[str, Any]) -> Sheet:
    rows = [
        [
            row["dtype"],
            f"{row['near_decode']:.1f} at {row['near']:,}",
            f"{row['far_decode']:.1f} at {row['far']:,}",
            f"{row['ratio']:.3f}",
            f"{row['cache_mib']:.1f}",
            f"{row['peak_mib']:.0f} of {row['limit_mib']:.0f}",
        ]
        for row in result["window"]
    ]
    header = ("dtype", "decode near", "decode far", "far / near", "cache MiB", "peak MiB (two streams)")
    window = result["window"][0]["window"]
    return Sheet(f"window {window} + 4 sink tokens, relative positions, tokens/s at a position", header, rows)
