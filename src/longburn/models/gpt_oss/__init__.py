"""GPT-OSS (OpenAI, arXiv 2508.10925): configuration, model and checkpoints in both published formats.

>>> model = GptOss.from_checkpoint("gpt-oss-20b")  # a directory; experts stay MXFP4
"""

from longburn.models.gpt_oss.config import GptOssConfig, is_gpt_oss
from longburn.models.gpt_oss.model import GptOss, GptOssBlock
from longburn.models.gpt_oss.names import hf_rules, original_rules

__all__ = ["GptOss", "GptOssBlock", "GptOssConfig", "hf_rules", "is_gpt_oss", "original_rules"]
