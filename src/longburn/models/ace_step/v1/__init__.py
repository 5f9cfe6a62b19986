"""ACE-Step v1 (May 2025): its lyric encoder and the transformer that predicts the velocity."""

from longburn.models.ace_step.v1.config import AceStepV1Config, LyricEncoderConfig
from longburn.models.ace_step.v1.lyrics import LyricEncoder
from longburn.models.ace_step.v1.names import lyric_rules, official_rules
from longburn.models.ace_step.v1.transformer import AceStepV1

__all__ = ["AceStepV1", "AceStepV1Config", "LyricEncoder", "LyricEncoderConfig", "lyric_rules", "official_rules"]
