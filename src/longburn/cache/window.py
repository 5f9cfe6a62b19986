"""Which keys a query sees: one layer's window, and the policy that gives every layer its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AttnWindow:
    """What one layer's queries see. The query at position p sees the key at position j iff

    `j <= p + lookahead` (or j stands in p's own block), and `p - j < size` or `j < sink_tokens`.

    Args:
        size: window W in tokens, counting the query itself (1 sees only itself); None for all.
        sink_tokens: how many first positions stay visible for ever (StreamingLLM, arXiv 2309.17453).
        relative_sinks: rotate the query a second time, so that the kept sink tokens never stand farther away than
            `sink_tokens + size - 1`: StreamingLLM's cache-relative positions. Needs RoPE, a size and sink tokens.
        lookahead: later keys that a query sees: 0 is causal (default), None all of them.
        block: block-causal attention in blocks of this many positions; 1 is plain causal.

    Raises:
        ValueError: a size, lookahead, count or block out of range, or relative sinks without what they need.
    """

    size: int | None = None
    sink_tokens: int = 0
    relative_sinks: bool = False
    lookahead: int | None = 0
    block: int = 1

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"AttnWindow: size {self.size}: a window counts the query itself, so it is at least 1")
        if self.sink_tokens < 0:
            raise ValueError(f"AttnWindow: sink_tokens {self.sink_tokens}: a count of first positions, at least 0")
        if self.lookahead is not None and self.lookahead < 0:
            raise ValueError(f"AttnWindow: lookahead {self.lookahead}: a count of later keys, at least 0")
        if self.block < 1:
            raise ValueError(f"AttnWindow: block {self.block}: a count of positions, at least 1")
        if self.relative_sinks and (self.size is None or self.sink_tokens == 0):
            raise ValueError(
                f"AttnWindow: relative_sinks with size {self.size} and sink_tokens {self.sink_tokens}: "
                "they clamp the distance to kept sink tokens beyond a window, so give both"
            )

    @classmethod
    def two_sided(cls, left: int | None = None, right: int | None = None) -> "AttnWindow":
        """A query and its neighbours: `left` earlier and `right` later keys (None: all). Not for streaming."""
        return cls(size=None if left is None else left + 1, lookahead=right)

    @property
    def streams(self) -> bool:
        """Whether a query sees no key later than itself or its own block, so that a cache can serve it."""
        return self.lookahead == 0


@dataclass(frozen=True)
class WindowPolicy:
    """Every layer's window: a function from the layer's index (from 0) to its `AttnWindow`."""

    of_layer: Callable[[int], AttnWindow]

    @classmethod
    def full(cls) -> "WindowPolicy":
        """All keys in every layer."""
        return cls.uniform(AttnWindow())

    @classmethod
    def uniform(cls, window: AttnWindow) -> "WindowPolicy":
        """The same window in every layer."""
        return cls(lambda layer: window)

    @classmethod
    def fixed(cls, size: int, *, sink_tokens: int = 0, relative_sinks: bool = False) -> "WindowPolicy":
        """A window of `size` tokens (counting the query) and kept sink tokens in every layer."""
        return cls.uniform(AttnWindow(size, sink_tokens=sink_tokens, relative_sinks=relative_sinks))

    @classmethod
    def every_other(cls, size: int, *, full_on_even: bool, sink_tokens: int = 0) -> "WindowPolicy":
        """A window in every other layer, all keys in the rest. GPT-OSS: `every_other(128, full_on_even=False)`."""
        window = AttnWindow(size, sink_tokens=sink_tokens)
        return cls(lambda layer: AttnWindow() if (layer % 2 == 0) == full_on_even else window)

    @classmethod
    def explicit(cls, windows: Sequence[AttnWindow | int | None]) -> "WindowPolicy":
        """One window a layer: an `AttnWindow`, a size in tokens, or None for all keys."""
        listed = tuple(w if isinstance(w, AttnWindow) else AttnWindow(w) for w in windows)

        def of_layer(layer: int) -> AttnWindow:
            if layer >= len(listed):
                raise ValueError(f"WindowPolicy.explicit: layer {layer} has no window; {len(listed)} were given")
            return listed[layer]

        return cls(of_layer)

    def windows(self, layers: int) -> tuple[AttnWindow, ...]:
        """The windows of a model of this many layers."""
        return tuple(self.of_layer(layer) for layer in range(layers))
