"""ACE-Step 1.5."""

from longburn.models.ace_step.v15.conditions import ConditionEncoder, Conditions
from longburn.models.ace_step.v15.config import AceStep15Config
from longburn.models.ace_step.v15.dit import AceStepDiT, Modulation
from longburn.models.ace_step.v15.model import AceStep15
from longburn.models.ace_step.v15.names import diffusers_rules, official_rules
from longburn.models.ace_step.v15.tokens import AudioDetokenizer, AudioTokenizer, FiniteScalarQuantizer

__all__ = [
    "AceStep15",
    "AceStep15Config",
    "AceStepDiT",
    "AudioDetokenizer",
    "AudioTokenizer",
    "ConditionEncoder",
    "Conditions",
    "FiniteScalarQuantizer",
    "Modulation",
    "diffusers_rules",
    "official_rules",
]
