"""What draws are made of on the device: logits as ordered integers, weights as integers, and random shares of them."""

import triton
import triton.language as tl


@triton.jit
def clean(x):
    """NaN is no candidate, +inf the largest finite number; as fp32. -0.0 is 0.0."""
    x = x.to(tl.float32)
    x = tl.where(x != x, -float("inf"), x)
    return tl.minimum(x, 3.4028234663852886e38) + 0.0


@triton.jit
def key_of(x):
    """int64 in 0 .. 2**32 - 1 that compares as the number does."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def number_of(key):
    """The number of a key."""
    bits = (key - 2147483648).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weigh(x, top, temperature):
    """`exp((x - top) / temperature)` in units of 2**-42, rounded down."""
    exponent = (x.to(tl.float64) - top.to(tl.float64)) / temperature
    return (tl.exp(exponent) * 4398046511104.0).to(tl.int64)


@triton.jit
def share_of(total, share):
    """The least integer mass that is at least a share of the total, within 1 .. max(total, 1)."""
    part = tl.ceil(total.to(tl.float64) * share).to(tl.int64)
    # A total beyond 2**53 loses bits in the product; a share of 1 keeps every token all the same.
    return tl.maximum(tl.where(share < 1, tl.minimum(part, total), total), 1)


@triton.jit
def mix(z):
    """The output function of SplitMix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def target_of(streams, draws, row, total):
    """A random mass in 0 .. total - 1: the share that is the row's draw (`sampling/uniform.py`)."""
    step = (tl.load(draws + row) + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    bits = mix(tl.load(streams + row).to(tl.uint64) + step)
    uniform = (bits >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16
    return (uniform * total.to(tl.float64)).to(tl.int64)


@triton.jit
def top_of(highs, row, blocks, COUNT: tl.constexpr):
    """The row's largest number, from those of the blocks; finite."""
    at = tl.arange(0, COUNT)
    high = tl.load(highs + row * blocks + at, mask=at < blocks, other=-float("inf"))
    return tl.maximum(tl.max(high, 0), -3.4028234663852886e38)
