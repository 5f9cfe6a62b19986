"""ACE-Step 1.5: its parts, and how to load them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longburn.models.ace_step.v15.conditions import ConditionEncoder
from longburn.models.ace_step.v15.config import AceStep15Config
from longburn.models.ace_step.v15.dit import AceStepDiT
from longburn.models.ace_step.v15.names import DIFFUSERS_PARTS, diffusers_rules, official_rules
from longburn.models.ace_step.v15.tokens import AudioDetokenizer, AudioTokenizer
from longburn.models.settings import read_settings
from longburn.weights import CheckpointError, SafetensorsSource, load_checkpoint

Progress = Callable[[int, int], None]
DIFFUSERS = "transformer"  # a directory that only a diffusers pipeline has
SILENCE_FILE = "silence_latent.pt"
LONGEST = 15000  # frames: ten minutes


class AceStep15(nn.Module):
    """The diffusion transformer `dit`, the `encoder` of conditions, and the `tokenizer` and `detokenizer` of audio.

    `silence` `[1, n, 64]` are the codec's latents of silence, which stand for a source or reference that is not there;
    zeros until a checkpoint says otherwise. They move with the model but are no weight.
    """

    silence: Tensor

    def __init__(self, config: AceStep15Config, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dit = AceStepDiT(config, dtype=dtype)
        self.encoder = ConditionEncoder(config, dtype=dtype)
        self.tokenizer = AudioTokenizer(config, dtype=dtype)
        self.detokenizer = AudioDetokenizer(config, dtype=dtype)
        zeros = torch.zeros(1, LONGEST, config.audio_acoustic_hidden_dim, dtype=dtype, device="cpu")
        self.register_buffer("silence", zeros, persistent=False)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> "AceStep15":
        """Load an official directory (`config.json`, safetensors, `silence_latent.pt`) or a diffusers pipeline's.

        Args:
            dtype: of the weights.
            device: where they go.
            progress: called with (elements placed, elements in all) after each tensor, of each part anew.

        Raises:
            CheckpointError: files that are missing or damaged, or that do not fit; one error lists every tensor.
            ValueError: a configuration that is not ACE-Step 1.5's.
        """
        path = Path(path)
        config = read_config(path)
        if (path / DIFFUSERS).is_dir():
            return _from_diffusers(path, config, dtype, device, progress)
        model = _on_meta(config, dtype)
        silence = _read_silence(path / SILENCE_FILE, config)
        load_checkpoint(model, SafetensorsSource(path), official_rules(config), device=device, progress=progress)
        model.silence = silence.to(device, dtype)
        return model.eval()

    def silent(self, frames: int) -> Tensor:
        """Latents of silence, `[1, frames, 64]`; beyond what there is they begin again."""
        times = -(-frames // self.silence.shape[1])
        return self.silence.repeat(1, times, 1)[:, :frames]

    def hints(self, ids: Tensor) -> Tensor:
        """Latent frames `[B, 5 G, 64]` of audio tokens, int64 `[B, G]`: what a planner's codes say of the source."""
        return self.detokenizer.forward(self.tokenizer.quantizer.of_ids(ids))


def read_config(path: Path) -> AceStep15Config:
    """The configuration of an official directory or of a diffusers pipeline; raises as `AceStep15.from_checkpoint`."""
    if not (path / DIFFUSERS).is_dir():
        return AceStep15Config.from_config(read_settings(path))
    if absent := [part for part in DIFFUSERS_PARTS if not (path / part).is_dir()]:
        raise CheckpointError(f"{path}: no {', '.join(absent)}; wanted a directory for each of {list(DIFFUSERS_PARTS)}")
    settings: Mapping[str, Mapping[str, Any]] = {part: read_settings(path / part) for part in DIFFUSERS_PARTS}
    return AceStep15Config.from_diffusers(settings)


def _on_meta(config: AceStep15Config, dtype: torch.dtype) -> AceStep15:
    with torch.device("meta"):
        return AceStep15(config, dtype=dtype)


def _from_diffusers(
    path: Path, config: AceStep15Config, dtype: torch.dtype, device: torch.device | str, progress: Progress | None
) -> AceStep15:
    model = _on_meta(config, dtype)
    sources = {part: SafetensorsSource(path / part) for part in DIFFUSERS_PARTS}
    held = sources["condition_encoder"]
    if "silence_latent" not in held.tensors:
        raise CheckpointError(f"{path / 'condition_encoder'}: no silence_latent, which stands for absent sources")
    for part, rules in diffusers_rules(config).items():
        module = model.get_submodule(DIFFUSERS_PARTS[part])
        load_checkpoint(module, sources[part], rules, device=device, progress=progress)
    model.silence = held.read("silence_latent").to(device, dtype)
    return model.eval()


def _read_silence(path: Path, config: AceStep15Config) -> Tensor:
    """`[1, n, 64]`, from a file that holds `[1, 64, n]`."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the official checkpoints come with it") from None
    except Exception as error:  # whatever a damaged pickle or archive brings up
        raise CheckpointError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    channels = config.audio_acoustic_hidden_dim
    if not isinstance(stored, Tensor) or stored.dim() != 3 or stored.shape[:2] != (1, channels):
        came = tuple(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
        raise CheckpointError(f"{path}: holds {came}, wanted a tensor [1, {channels}, n]")
    return stored.mT.contiguous()
