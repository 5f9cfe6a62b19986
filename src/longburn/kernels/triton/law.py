"""What attention kernels share on the device: the law of visibility."""

import triton
import triton.language as tl


@triton.jit
def sees(
    p,
    j,
    window,
    sink_tokens,
    lookahead,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Whether queries at positions p see keys at positions j (`kernels.attend.call.visible`); both broadcast.

    BLOCK: block-causal if above 1. WINDOWED: window and sink_tokens count. BOUNDED: lookahead counts.
    """
    seen = (p >= 0) & (j >= 0)
    if BOUNDED:
        near = j <= p + lookahead
        if BLOCK > 1:
            near = near | (j // BLOCK == p // BLOCK)
        seen = seen & near
    if WINDOWED:
        seen = seen & ((p - j < window) | (j < sink_tokens))
    return seen
