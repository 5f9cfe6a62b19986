"""What a figure was measured on, and how a long measurement survives being cut short."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from longburn.weights.store import cache_dir

ASSETS = Path(__file__).resolve().parent.parent / "docs" / "assets"


def describe_machine() -> dict[str, Any]:
    """The machine, the versions and the date, as they stand in every result file."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3, 1),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "longburn": version("longburn"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def describe_gpu() -> dict[str, Any]:
    """The first CUDA device, and what drives it; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    card = torch.cuda.get_device_properties(0)
    return {
        "gpu": card.name,
        "gpu_memory_gib": round(card.total_memory / 1024**3, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": version("triton"),
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """`describe_machine` in one line, to stand under a table; the GPU in it if there is one."""
    if "gpu" in machine:
        return (
            f"{machine['gpu']} ({machine['gpu_memory_gib']} GiB), CUDA {machine['cuda']}, cuDNN {machine['cudnn']}, "
            f"torch {machine['torch']}, Triton {machine['triton']}, longburn {machine['longburn']}, {machine['date']}"
        )
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({machine['isa']}), {machine['threads']} threads, "
        f"torch {machine['torch']}, longburn {machine['longburn']}, {machine['date']}"
    )


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        names = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in names:
            return names["model name"]
    return platform.processor() or platform.machine()


def busy_seconds() -> float | None:
    """Core-seconds since the machine started in which a core worked, or was taken away by the host; None if unknown."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _, _, irq, softirq, steal = (int(n) for n in stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def write_json(name: str, result: Mapping[str, Any]) -> Path:
    """Writes `docs/assets/NAME.json`."""
    ASSETS.mkdir(parents=True, exist_ok=True)
    path = ASSETS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


class Parts:
    """Finished parts of a long measurement, on disk as soon as each is done.

    A run with the same settings takes up where a cut one stopped.

    Args:
        name: of the measurement.
        settings: all that the parts depend on.
    """

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.path = cache_dir() / "benchmarks" / f"{name}-{digest}.json"
        self._done: dict[str, Any] = {}
        if self.path.is_file():
            self._done = json.loads(self.path.read_text(encoding="utf-8"))

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __getitem__(self, key: str) -> Any:
        return self._done[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._done[key] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self._done), encoding="utf-8")
        os.replace(unfinished, self.path)

    def clear(self) -> None:
        """Forget them: the measurement is complete, or is to begin anew."""
        self._done = {}
        self.path.unlink(missing_ok=True)
