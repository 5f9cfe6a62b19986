"""One training loop for small models, and what becomes of its result."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = "model.safetensors"
LIMIT = 3_000_000  # bytes of all that is shipped of one model


@dataclass(frozen=True)
class Schedule:
    """How long, and how fast.

    Args:
        steps: of the optimizer, at most.
        seconds: after which it ends, at the latest; the learning rate falls by whichever is farther along.
        learning_rate: the highest, after the warm-up.
        warmup: share of it.
        weight_decay: of matrices.
    """

    steps: int
    seconds: float
    learning_rate: float = 2e-3
    warmup: float = 0.03
    weight_decay: float = 0.05


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    schedule: Schedule,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Minimise `loss_of(step)`; returns the account of it: steps, seconds, losses along the way."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98))
    began = time.perf_counter()
    curve: list[tuple[int, float]] = []
    total, count, progress, step = None, 0, 0.0, 0
    while progress < 1.0:
        progress = max((step + 1) / schedule.steps, (time.perf_counter() - began) / schedule.seconds)
        rate = min(progress / schedule.warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * rate
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        total = loss.detach() if total is None else total + loss.detach()
        count += 1
        if progress >= (len(curve) + 1) / 40 or progress >= 1.0:
            curve.append((step, round(float(total) / count, 5)))
            if not math.isfinite(curve[-1][1]):
                raise FloatingPointError(f"the loss is {curve[-1][1]} at step {step}; lower the learning rate")
            say(f"step {step}, {time.perf_counter() - began:.0f} s: loss {curve[-1][1]:.4f}")
            total, count = None, 0
    return {"steps": step, "seconds": round(time.perf_counter() - began, 1), "training_loss": curve}


def describe(device: torch.device) -> dict[str, Any]:
    """What a log says of the machine."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
    }


def save(model: nn.Module, config: Mapping[str, Any], log: Mapping[str, Any], folder: Path) -> None:
    """Weights in fp16, sizes and log, as files of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / FILE, metadata={"format": "pt"})
    (folder / FILE).chmod(0o644)  # safetensors lets nobody else read what it writes
    for name, content in (("config", config), ("log", log)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def export(results: Path, target: Path, licence: Path, card: str) -> int:
    """Put what `save` wrote where the package keeps it, with a licence and a card; returns the bytes.

    Raises:
        ValueError: they are more than LIMIT. Nothing is written then.
    """
    files = [results / name for name in (FILE, "config.json", "log.json")]
    size = sum(file.stat().st_size for file in files)
    if size > LIMIT:
        raise ValueError(f"{size:,} bytes are to be shipped, wanted at most {LIMIT:,}; train a smaller model")
    target.mkdir(parents=True, exist_ok=True)
    for file in (*files, licence):
        shutil.copyfile(file, target / file.name)
    digest = hashlib.sha256((target / FILE).read_bytes()).hexdigest()
    (target / "README.md").write_text(card + f"- sha256 of `{FILE}`: `{digest}`\n", encoding="utf-8")
    return size
