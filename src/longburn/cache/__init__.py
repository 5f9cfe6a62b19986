"""Rolling caches: which keys a layer sees, where they are kept, and who knows the time."""

from longburn.cache.buffers import KeyValues, Rotation
from longburn.cache.extra import Extra
from longburn.cache.manager import CacheManager
from longburn.cache.mark import CacheMark
from longburn.cache.rolling import RollingKVCache
from longburn.cache.step import Run, Step
from longburn.cache.window import AttnWindow, WindowPolicy

__all__ = [
    "AttnWindow",
    "CacheManager",
    "CacheMark",
    "Extra",
    "KeyValues",
    "RollingKVCache",
    "Rotation",
    "Run",
    "Step",
    "WindowPolicy",
]
