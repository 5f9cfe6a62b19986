"""The package minigrid, imported when it is first needed: models and weights do without it."""

from importlib import import_module
from typing import Any


def minigrid(module: str, wanted_by: str) -> Any:
    """A module of minigrid, such as "minigrid.envs".

    Raises:
        ImportError: names the extra, and what needs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{wanted_by} needs {module}: pip install 'longburn[env]'") from error
