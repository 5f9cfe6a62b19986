"""Training a small GPT-OSS from nothing: texts, tokens, the loop, and the checkpoint in the original format."""

import sys
from pathlib import Path

# The readers of packages live beside the benchmarks, which read books with them too.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
