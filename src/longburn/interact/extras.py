"""What the extra `env` brings, imported when it is first needed: everything else here works without it."""

from importlib import import_module
from types import ModuleType


def gymnasium(wanted_by: str) -> ModuleType:
    """The package gymnasium, with `gymnasium.spaces`.

    Raises:
        ImportError: names the extra, and what needs it.
    """
    try:
        return import_module("gymnasium")
    except ImportError as error:
        raise ImportError(f"{wanted_by} needs gymnasium: pip install 'longburn[env]'") from error
