"""How many slots a layer's cache needs for streams of a known or unknown length."""

from longburn.cache.extra import Extra, span
from longburn.cache.window import AttnWindow


def geometry(window: AttnWindow, max_length: int | None, slack: int, extra: Extra) -> tuple[AttnWindow, int | None]:
    """The window that the cache is built for, and its capacity.

    A window that the stream never fills needs no ring: its cache is one for all keys.
    """
    need = None if window.size is None else window.sink_tokens + span(window.size, extra) + slack
    if need is None or (max_length is not None and max_length <= need):
        return AttnWindow(lookahead=window.lookahead, block=window.block), max_length
    return window, need
