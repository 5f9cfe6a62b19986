"""The real model, loaded once for all tests that read it."""

from pathlib import Path

import pytest

from longburn.models import LoadedModel, load_model


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> LoadedModel:
    return load_model(smollm2_path)
