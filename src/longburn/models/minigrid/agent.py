"""The policy with all that it needs to act."""

from longburn.interact import Agent, DiscreteCodec
from longburn.interact.extras import gymnasium
from longburn.models.minigrid.cells import ACTIONS
from longburn.models.minigrid.policy import MemoryEncoder, MemoryPolicy


def memory_agent(policy: MemoryPolicy) -> Agent:
    """For `rollout` and `evaluate` over any `memory_task`, or a vector of them.

    Raises:
        ImportError: gymnasium is not installed.
    """
    space = gymnasium("memory_agent").spaces.Discrete(len(ACTIONS))
    return Agent(MemoryEncoder(policy), policy, policy, DiscreteCodec(space))
