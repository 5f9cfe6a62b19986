"""What every test shares."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton's kernels are tested in its interpreter; Triton looks at this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The speed of a shared machine must not decide a property; the printed blob reproduces a failure anywhere.
settings.register_profile("longburn", deadline=None, print_blob=True)
settings.load_profile("longburn")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model that some tests read: 98 MB, kept in the user's cache from one run to the next."""
    from longburn.weights import fetch

    return fetch("smollm2")


@pytest.fixture(scope="session")
def o200k_path() -> Path:
    """GPT-OSS's vocabulary: 4 MB, kept in the user's cache."""
    from longburn.weights import fetch

    return fetch("o200k")


@pytest.fixture(scope="session")
def o200k_json(o200k_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with GPT-OSS's tokenizer as the `tokenizer.json` that transformers makes of the ranks."""
    import json

    from transformers.convert_slow_tokenizer import TikTokenConverter

    from longburn.text.o200k import O200K, SPECIAL_TOKENS

    directory = tmp_path_factory.mktemp("o200k")
    names = [
        name for name in sorted(SPECIAL_TOKENS, key=lambda name: SPECIAL_TOKENS[name]) if "endofprompt" not in name
    ]
    core = TikTokenConverter(str(o200k_path), pattern=O200K, extra_special_tokens=names).converted()
    core.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|return|>"}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [200_002, 199_999, 200_012]}))
    return directory
