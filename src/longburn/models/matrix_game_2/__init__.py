"""Matrix-Game 2 (Skywork): a video world model that is played with keyboard and mouse.

A causal diffusion transformer makes blocks of three latent frames, twelve pictures, over rings of what it remembers.
"""

from longburn.models.matrix_game_2.checkpoint import load_matrix_game_2
from longburn.models.matrix_game_2.config import ActionConfig, MatrixGame2Config
from longburn.models.matrix_game_2.dit import MatrixGame2, Modulation, Prepared
from longburn.models.matrix_game_2.frames import Caches, FrameWindow, Place, place_of
from longburn.models.matrix_game_2.rollout import Rollout
from longburn.models.matrix_game_2.settings import RolloutSettings

__all__ = [
    "ActionConfig",
    "Caches",
    "FrameWindow",
    "MatrixGame2",
    "MatrixGame2Config",
    "Modulation",
    "Place",
    "Prepared",
    "Rollout",
    "RolloutSettings",
    "load_matrix_game_2",
    "place_of",
]
