"""The real model that some tests read: 98 MB, kept in the user's cache from one run to the next."""

from pathlib import Path

import pytest

from longburn.weights import fetch


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return fetch("smollm2")
