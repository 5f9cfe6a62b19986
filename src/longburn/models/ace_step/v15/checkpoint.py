"""Which directory of a checkpoint holds which part, in the official layout and in diffusers'."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from longburn.models.ace_step.codecs import Oobleck
from longburn.models.ace_step.planner import Planner
from longburn.models.ace_step.v15.model import DIFFUSERS, AceStep15
from longburn.models.ace_step.v15.music import MusicMaker
from longburn.models.ace_step.v15.texts import TextEncoder
from longburn.models.settings import read_settings
from longburn.weights import CheckpointError

CODEC, PLANNERS = "vae", "acestep-5Hz-lm-"
MODELS = "acestep-v15-"
TEXTS = ("Qwen3-Embedding-0.6B", "text_encoder")  # official, diffusers'
V1, V1_CLASS = "ace_step_transformer", "ACEStepTransformer2DModel"  # the other generation's
SIZES = ("1.7B", "0.6B", "4B")  # of planners, the default first


@dataclass(frozen=True)
class Parts:
    """Directories of the parts; there may be no planner."""

    model: Path
    codec: Path
    texts: Path
    planner: Path | None


def find_parts(path: str | Path, *, variant: str | None = None, planner: str | None = None) -> Parts:
    """The parts of a checkpoint.

    Args:
        path: the directory that holds `acestep-v15-turbo` (or another variant), `vae`, `Qwen3-Embedding-0.6B` and, for
            plans, `acestep-5Hz-lm-1.7B` (or another size); or a diffusers pipeline.
        variant: such as "turbo", "base", "xl-turbo"; default the only one, or turbo.
        planner: such as "1.7B"; default the only one, or 1.7B, or none.

    Raises:
        CheckpointError: a part that is missing, or a checkpoint of ACE-Step v1.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; wanted that of an ACE-Step 1.5 checkpoint")
    if (path / V1).is_dir():
        raise CheckpointError(f"{path}: a checkpoint of ACE-Step v1 (it has {V1}); wanted one of ACE-Step 1.5")
    if (path / "config.json").is_file() and read_settings(path).get("_class_name") == V1_CLASS:
        raise CheckpointError(
            f"{path}: the transformer of ACE-Step v1 ({V1_CLASS}); wanted a checkpoint of ACE-Step 1.5"
        )
    if (path / DIFFUSERS).is_dir():
        model = path
        if variant is not None:
            raise CheckpointError(f"{path}: a diffusers pipeline holds one model, not variant {variant!r}; name none")
    else:
        found = _pick(path, MODELS, variant, ("turbo",))
        if found is None:
            raise CheckpointError(f"{path}: no {MODELS}{variant or 'turbo'}; there {_there(path)}")
        model = found
    texts = next((path / name for name in TEXTS if (path / name).is_dir()), None)
    if texts is None or not (path / CODEC).is_dir():
        absent = CODEC if texts is not None else " or ".join(TEXTS)
        raise CheckpointError(f"{path}: no {absent}; there {_there(path)}")
    chosen = _pick(path, PLANNERS, planner, SIZES)
    if chosen is None and planner is not None:
        raise CheckpointError(f"{path}: no {PLANNERS}{planner}; there {_there(path)}")
    return Parts(model, path / CODEC, texts, chosen)


def load_music_maker(
    path: str | Path,
    *,
    variant: str | None = None,
    planner: str | None = None,
    plans: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> MusicMaker:
    """Load all parts; see `find_parts`.

    Args:
        plans: load the planner, if there is one.
        dtype: of all weights but the codec's, which stay in fp32 on a CPU.
        progress: called with (part, elements placed, elements in all).

    Raises:
        CheckpointError: files that are missing or damaged, or that do not fit.
        ValueError: the configuration of another architecture.
    """
    parts = find_parts(path, variant=variant, planner=planner)

    def of(name: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(name, done, total)

    codec_type = torch.float32 if torch.device(device).type == "cpu" else dtype
    model = AceStep15.from_checkpoint(parts.model, dtype=dtype, device=device, progress=of("model"))
    codec = Oobleck.from_checkpoint(parts.codec, dtype=codec_type, device=device, progress=of("codec"))
    texts = TextEncoder.from_checkpoint(parts.texts, dtype=dtype, device=device, progress=of("text encoder"))
    held = None
    if plans and parts.planner is not None:
        held = Planner.from_checkpoint(parts.planner, dtype=dtype, device=device, progress=of("planner"))
    return MusicMaker(model, codec, texts, held)


def _pick(path: Path, prefix: str, wanted: str | None, first: tuple[str, ...]) -> Path | None:
    """The directory `prefix` + wanted; else the only one that begins so, else the first of `first` that is there."""
    there = {entry.name.removeprefix(prefix): entry for entry in sorted(path.glob(f"{prefix}*")) if entry.is_dir()}
    if wanted is not None:
        return there.get(wanted)
    if len(there) == 1:
        return next(iter(there.values()))
    return next((there[name] for name in first if name in there), None)


def _there(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return f"are {', '.join(names)}" if names else "is nothing"
