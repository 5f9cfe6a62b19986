"""The 5 Hz language model of ACE-Step 1.5: plans of songs, and their audio codes."""

from longburn.models.ace_step.planner.codes import CodeModel, CodeTokens, codes_of
from longburn.models.ace_step.planner.generate import Planner
from longburn.models.ace_step.planner.prompts import Prompts, SongPlan, SongRequest
from longburn.models.ace_step.planner.sampling import ORDERS, GuidedSampler, PlannerSampling

__all__ = [
    "ORDERS",
    "CodeModel",
    "CodeTokens",
    "GuidedSampler",
    "Planner",
    "PlannerSampling",
    "Prompts",
    "SongPlan",
    "SongRequest",
    "codes_of",
]
