"""longburn: building blocks for fast, long-context streaming inference on PyTorch.

Positions travel with keys, the mask is arithmetic on positions, and streaming equals the full forward however the
stream is cut into chunks. Models are reached by path, such as `longburn.models.llama`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

__version__ = version("longburn")

if TYPE_CHECKING:
    from longburn._public import *  # noqa: F403  # its __all__ is the list of public names
else:
    # They are imported when one is first asked for: `longburn --help` must not wait for PyTorch.
    def __getattr__(name: str) -> object:
        public = import_module("longburn._public")
        if name == "__all__" or name in public.__all__:
            return getattr(public, name)
        raise AttributeError(f"module 'longburn' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted([*globals(), *import_module("longburn._public").__all__])
