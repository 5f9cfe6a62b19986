"""The loudness of a whole piece, whose parts come one after the other."""

import math
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

PEAK = -1.0  # dB below full scale, as the released pipeline leaves its pieces
STRETCH = 1 << 20  # numbers read back at a time
QUIETEST = 1e-6  # a peak below this is silence, and stays it


def at_peak(pieces: Iterable[Tensor], *, decibels: float = PEAK) -> Iterator[Tensor]:
    """The same audio `[channels, n]` or `[1, channels, n]`, fp32, scaled so that its largest number has this level.

    What the largest is shows only at the end, so pieces are put into a temporary file and read back from it: memory
    does not grow, a disk has to hold 4 bytes a number.

    Raises:
        ValueError: a number that is not finite, pieces of another number of channels, or of more than one row.
    """
    peak, channels = 0.0, None
    with tempfile.TemporaryFile() as file:
        for piece in pieces:
            if piece.dim() not in (2, 3) or (piece.dim() == 3 and piece.shape[0] != 1):
                raise ValueError(
                    f"at_peak: a piece {tuple(piece.shape)}, wanted [channels, n] or [1, channels, n]; "
                    "take rows one by one"
                )
            audio = piece[0] if piece.dim() == 3 else piece
            if audio.shape[0] != (channels := channels or audio.shape[0]):
                raise ValueError(f"at_peak: a piece of {audio.shape[0]} channels after one of {channels}")
            here = audio.detach().to("cpu", torch.float32).abs().amax().item() if audio.numel() else 0.0
            if not math.isfinite(here):
                raise ValueError("at_peak: the audio is not finite; a lower guidance or a wider dtype may help")
            peak = max(peak, here)
            file.write(audio.detach().to("cpu", torch.float32).T.contiguous().numpy().tobytes())
        gain = 10 ** (decibels / 20) / max(peak, QUIETEST)
        file.seek(0)
        frame = 4 * (channels or 1)
        while data := file.read(STRETCH // (channels or 1) * frame):
            yield torch.from_numpy(np.frombuffer(data, np.float32).reshape(-1, channels or 1).T * np.float32(gain))
