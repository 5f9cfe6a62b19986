"""Models that act: policies in environments of gymnasium's API, and world models as such environments."""

from longburn.interact.world import PlayableWorld, WorldModel, WorldStep

__all__ = ["PlayableWorld", "WorldModel", "WorldStep"]
