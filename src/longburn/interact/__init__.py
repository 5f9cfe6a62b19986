"""Models that act: policies in environments of gymnasium's API, and world models as such environments.

Gymnasium comes with the extra `env` and is imported when it is first needed.
"""

from typing import TYPE_CHECKING

from longburn.interact.actions import BinsCodec, DiscreteCodec, action_codec
from longburn.interact.continuous import ContinuousCodec
from longburn.interact.encoders import EmbeddingEncoder, LinearEncoder, LinearHead, PatchEncoder
from longburn.interact.loop import Episode, Turn, evaluate, rollout
from longburn.interact.protocols import ActionCodec, Agent, Head, ObservationEncoder, Sampler, StreamingModel
from longburn.interact.samplers import GaussianSampler, TokenSampler
from longburn.interact.world import PlayableWorld, WorldModel, WorldStep

if TYPE_CHECKING:
    from longburn.interact.env import Latency, WorldModelEnv
else:

    def __getattr__(name: str) -> object:
        if name in ("Latency", "WorldModelEnv"):  # a gymnasium.Env: it cannot be defined without gymnasium
            from longburn.interact import env

            return getattr(env, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ActionCodec",
    "Agent",
    "BinsCodec",
    "ContinuousCodec",
    "DiscreteCodec",
    "EmbeddingEncoder",
    "Episode",
    "GaussianSampler",
    "Head",
    "Latency",
    "LinearEncoder",
    "LinearHead",
    "ObservationEncoder",
    "PatchEncoder",
    "PlayableWorld",
    "Sampler",
    "StreamingModel",
    "TokenSampler",
    "Turn",
    "WorldModel",
    "WorldModelEnv",
    "WorldStep",
    "action_codec",
    "evaluate",
    "rollout",
]
