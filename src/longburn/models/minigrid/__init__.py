"""Two small trained models of MiniGrid: a policy that needs its memory, and a room as a world model.

`load_policy` and `load_room` give the models that travel with the package, `memory_agent` and `RoomWorld` make them act
and be played. Environments, pictures and expert come with the extra `env` and are imported when first needed.
"""

from longburn.models.minigrid.agent import memory_agent
from longburn.models.minigrid.play import RoomWorld
from longburn.models.minigrid.policy import MemoryEncoder, MemoryPolicy, PolicyConfig, window
from longburn.models.minigrid.shipped import load_policy, load_room
from longburn.models.minigrid.tasks import Expert, memory_task
from longburn.models.minigrid.world import RoomConfig, RoomModel

__all__ = [
    "Expert",
    "MemoryEncoder",
    "MemoryPolicy",
    "PolicyConfig",
    "RoomConfig",
    "RoomModel",
    "RoomWorld",
    "load_policy",
    "load_room",
    "memory_agent",
    "memory_task",
    "window",
]
