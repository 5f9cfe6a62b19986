"""From the bytes of tokens to text that is safe to print, up to the first stop string.

A token may end inside a character or inside a stop string, so two things are held back: bytes of a character that the
next token can still complete, and bytes that may turn out to begin a stop string. Everything else is printed at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable


class TextStream:
    """Text of one row, fed with the bytes of one token at a time.

    The result does not depend on how the bytes are cut into tokens. The stop string that is complete first ends the
    text; of two that end on the same byte, the longer one. Stop strings are found as UTF-8 bytes, exactly; bytes that
    are not UTF-8 become U+FFFD as in `bytes.decode(errors="replace")`, as soon as no further byte can complete them
    (an encoded surrogate, ED A0 .. BF, one byte later).

    Args:
        stop_strings: Texts that end the output and do not belong to it.

    Attributes:
        stop: The stop string that was found, or None.
        pending: Bytes held back. A new stream that is fed with them continues where this one stands.

    Raises:
        TypeError: `stop_strings` is one string rather than several.
        ValueError: A stop string is empty or is not encodable as UTF-8.
    """

    def __init__(self, stop_strings: Iterable[str] = ()) -> None:
        if isinstance(stop_strings, str):
            raise TypeError(f"TextStream: stop_strings must be several strings, got one: use [{stop_strings!r}]")
        self._stops = {_encode(stop): stop for stop in stop_strings}
        self._longest = max(map(len, self._stops), default=0)
        self.stop: str | None = None
        self.pending = b""

    def feed(self, token: bytes) -> str:
        """Text that the bytes of one more token make safe to print; nothing after a stop string was found."""
        if self.stop is not None:
            return ""
        data = self.pending + token
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := data.find(stop)) >= 0]
        if found:
            _, start, stop = min(found)
            self.stop, self.pending = self._stops[stop], b""
            return data[:start].decode("utf-8", "replace")
        held = self._held_back(data)
        # A stop string never begins with a continuation byte: if one may have begun, the characters before it are over.
        text, used = codecs.utf_8_decode(data[: len(data) - held], "replace", held > 0)
        self.pending = data[used:]
        return text

    def flush(self) -> str:
        """The rest, when no more tokens come: what was held back in case it began a stop string or a character."""
        rest, self.pending = self.pending, b""
        return rest.decode("utf-8", "replace")

    def _held_back(self, data: bytes) -> int:
        """Length of the longest end of `data` with which a stop string begins."""
        longest = min(len(data), self._longest - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(data[-n:]) for stop in self._stops)), 0)


def _encode(stop: str) -> bytes:
    if not stop:
        raise ValueError("TextStream: a stop string is empty and would stop before the first token; leave it out")
    return stop.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError, which is a ValueError
