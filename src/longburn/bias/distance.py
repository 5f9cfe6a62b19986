"""Biases that are a function of the distance alone: T5's buckets, KERPLE, Sandwich."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from longburn.bias.policy import BiasContext, Policy
from longburn.kernels.attend import BiasTerms

# --- which form ------------------------------------------------------------------------------------------------------


def seen_distances(context: BiasContext) -> tuple[int, int] | None:
    """The lowest and the highest distance p - j at which a query of this call may see a key, as plain numbers.

    A window without kept sink tokens says it. Otherwise the farthest position does: from what a cache knows, or, on the
    CPU, from the positions themselves. None: elsewhere the host would have to wait for the device.
    """
    ahead = None if context.lookahead is None else max(context.lookahead, context.block - 1)
    if ahead is not None and context.window is not None and not context.sink_tokens:
        return -ahead, context.window - 1
    ends = _ends(context)
    if ends is None:
        return None
    (first_query, last_query), (first_key, last_key) = ends
    low, high = first_query - last_key, last_query - first_key
    low = low if ahead is None else max(low, -ahead)
    return min(low, 0), max(high, 0)


def last_query(context: BiasContext) -> int | None:
    """The last position of the call's queries, as far as the host knows it."""
    ends = _ends(context)
    return None if ends is None else ends[0][1]


def fewer_numbers(span: tuple[int, int] | None, context: BiasContext) -> tuple[int, int] | None:
    """The distances of a table if that is less than a number for every query and key; None if not, or if unknown."""
    rows = max(context.q_pos.shape[0], context.k_pos.shape[0])
    written = rows * context.q_pos.shape[1] * context.k_pos.shape[1]
    return span if span is not None and span[1] - span[0] < written else None


def written_out(bias: Tensor) -> BiasTerms:
    """A bias `[H, B|1, T, S]` with a number for every query and key."""
    bias = bias.transpose(0, 1)
    return BiasTerms(key=bias[:, :, 0]) if bias.shape[2] == 1 else BiasTerms(dense=bias)


def _ends(context: BiasContext) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The first and last position of the call's queries, and of its keys."""
    if context.known is not None:
        rows = [row for row in context.known if row.q_count and row.keys] or [context.known[0]]
        return (
            (min(row.q_start for row in rows), max(row.q_start + row.q_count - 1 for row in rows)),
            (
                min(0 if row.head else row.k_start for row in rows),
                max(row.k_start + row.keys - row.head - 1 for row in rows),
            ),
        )
    if context.q_pos.device.type != "cpu":
        return None
    return _range(context.q_pos), _range(context.k_pos)


def _range(positions: Tensor) -> tuple[int, int]:
    held = positions[positions >= 0]
    return (int(held.min()), int(held.max())) if held.numel() else (0, 0)


class DistancePolicy(Policy):
    """A bias `f_h(p - j)` of query position p and key position j, stated in its cheapest exact form:

    - a table of the distances that the call's queries can see: `[H, W]` for a window, as long as the stream where every
      key is seen, and never longer than up to where f is constant;
    - for one query a row, when that is less: one number a key;
    - for more queries, when that is less or the host does not know how far they see: rows written out.

    Attributes:
        ends: f is constant below the first distance and above the second; None if it is not.
    """

    ends: tuple[int, int] | None = None

    def __init__(self, heads: int) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"{type(self).__name__}: {heads} heads, wanted at least 1")
        self.heads = heads

    @abstractmethod
    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """f at int64 distances of any shape, `[H, *shape]`, in the type."""

    def table(self, low: int, high: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """f at the distances `low .. high`, `[H, high - low + 1]`."""
        return self.at(torch.arange(low, high + 1, device=device), dtype)

    def terms(self, context: BiasContext) -> BiasTerms:
        check_heads(self, self.heads, context)
        dtype = torch.promote_types(context.q.dtype, torch.float32)
        span = self._span(context)
        if span is not None:
            return BiasTerms(table=self.table(*span, context.q.device, dtype), zero=-span[0])
        distance = context.q_pos[:, :, None] - context.k_pos[:, None, :]
        return written_out(self.at(distance, dtype))

    def writes_rows(self, context: BiasContext) -> bool:
        return self._span(context) is None

    def _span(self, context: BiasContext) -> tuple[int, int] | None:
        span = seen_distances(context)
        if self.ends is not None:
            low, high = span or self.ends
            span = max(low, self.ends[0]), min(high, self.ends[1])
        return fewer_numbers(span, context)


def check_heads(policy: nn.Module, heads: int, context: BiasContext) -> None:
    """The policy was built for the call's query heads."""
    if context.q.shape[1] != heads:
        raise ValueError(
            f"{type(policy).__name__}: built for {heads} heads, the call has {context.q.shape[1]} query heads; "
            "give the layer a policy with as many"
        )


# --- T5 --------------------------------------------------------------------------------------------------------------


class T5Buckets(DistancePolicy):
    """T5's relative bias (Raffel et al., arXiv 1910.10683): one learned number a head and bucket of distances.

    Half of the buckets hold one distance each, the others grow with its logarithm up to `max_distance`, beyond which
    all share the last one. So the table never grows with a stream. T5 itself does not scale its scores (`scale=1`).

    Args:
        heads: query heads H.
        buckets: how many; the parameter `weight` is `[buckets, H]`, 0 at the start (transformers calls it
            `relative_attention_bias.weight`).
        max_distance: from where on all distances are one bucket.
        bidirectional: half of the buckets are for later keys; otherwise these share the bucket of distance 0.

    Raises:
        ValueError: too few buckets, an odd number where two halves are wanted, or a max_distance within those that hold
            one distance each.
    """

    def __init__(
        self,
        heads: int,
        *,
        buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(heads)
        half = buckets // 2 if bidirectional else buckets
        if half < 2 or (bidirectional and buckets % 2) or max_distance <= half // 2:
            raise ValueError(
                f"T5Buckets: {buckets} buckets up to distance {max_distance}: wanted at least "
                f"{'4, an even number' if bidirectional else '2'}, and a max_distance above {max(half // 2, 1)}"
            )
        self.weight = nn.Parameter(torch.zeros(buckets, heads, dtype=dtype, device=device))
        past = [_bucket(distance, half, max_distance) for distance in range(max_distance + 1)]
        later = [half + bucket for bucket in past[:0:-1]] if bidirectional else []
        self.ends = -len(later), max_distance
        self._buckets = later + past
        self._on: dict[torch.device, Tensor] = {}

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.ends is not None
        device = distance.device
        if device not in self._on:
            self._on[device] = torch.tensor(self._buckets, device=device)
        low, high = self.ends
        bucket = self._on[device][distance.clamp(low, high) - low]
        return self.weight.to(dtype).T[:, bucket]


def _bucket(distance: int, buckets: int, max_distance: int) -> int:
    """`floor(exact + log(distance / exact) / log(max_distance / exact) * logarithmic)`, by integers: nothing rounds."""
    exact = buckets // 2
    if distance < exact:
        return distance
    logarithmic = buckets - exact
    steps = 0
    while (
        steps + 1 < logarithmic
        and distance**logarithmic * exact ** (steps + 1) >= max_distance ** (steps + 1) * exact**logarithmic
    ):
        steps += 1
    return exact + steps


# --- KERPLE ----------------------------------------------------------------------------------------------------------

SMALLEST = 0.01  # of KERPLE's parameters, as in its authors' code


class KerpleLog(DistancePolicy):
    """KERPLE's logarithmic kernel (Chi et al., arXiv 2205.09921): `-p * log(1 + a * |distance|)`.

    Parameters `p` and `a`, `[H]`, uniform in 0 .. 2 and 0 .. 1 at the start, act as at least 0.01; the gradient passes.
    """

    def __init__(
        self, heads: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__(heads)
        self.p = nn.Parameter(2 * torch.rand(heads, dtype=dtype, device=device))
        self.a = nn.Parameter(torch.rand(heads, dtype=dtype, device=device))

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        p, a = (_by_head(_clamped(x.to(dtype)), distance) for x in (self.p, self.a))
        return -p * torch.log1p(a * distance.abs().to(dtype))


class KerplePower(DistancePolicy):
    """KERPLE's power kernel (Chi et al., arXiv 2205.09921): `-a * |distance|^p`.

    Parameters `p` and `a`, `[H]`, uniform in 0 .. 2 and 0 .. 1 at the start, act as at least 0.01, and p as at most 2;
    the gradient passes.
    """

    def __init__(
        self, heads: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__(heads)
        self.p = nn.Parameter(2 * torch.rand(heads, dtype=dtype, device=device))
        self.a = nn.Parameter(torch.rand(heads, dtype=dtype, device=device))

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        p = _by_head(_clamped(self.p.to(dtype), 2.0), distance)
        a = _by_head(_clamped(self.a.to(dtype)), distance)
        return -a * distance.abs().to(dtype) ** p


def _clamped(x: Tensor, largest: float | None = None) -> Tensor:
    """x within its bounds, with the gradient of x: what a projection back into them after every update amounts to."""
    return x + (x.clamp(SMALLEST, largest) - x).detach()


def _by_head(x: Tensor, distance: Tensor) -> Tensor:
    """`[H]` as `[H, 1, ...]`, beside distances."""
    return x.reshape(-1, *[1] * distance.dim())


# --- Sandwich --------------------------------------------------------------------------------------------------------


class Sandwich(DistancePolicy):
    """Sandwich (Chi et al., arXiv 2212.10356): the inner product of sinusoidal embeddings, nothing to learn.

    `H / (8 h) * sum over k < dim / 2 of cos(distance * 10000^(-2k / dim))` for head h = 1 .. H.

    Args:
        heads: query heads H.
        dim: of the embeddings; even.
    """

    def __init__(self, heads: int, *, dim: int = 128) -> None:
        super().__init__(heads)
        if dim < 2 or dim % 2:
            raise ValueError(f"Sandwich: dim {dim}, wanted an even number, sine and cosine of every frequency")
        self.frequencies = tuple(10000.0 ** (-2 * k / dim) for k in range(dim // 2))
        self.scales = tuple(heads / (8 * h) for h in range(1, heads + 1))
        # Curves at the distances 0 .. n - 1, n a power of two: never freed, so a recorded graph may go on reading them.
        self._curves: dict[tuple[torch.device, int], Tensor] = {}

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        return self._by_heads(self._curve(distance), dtype)

    def table(self, low: int, high: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        size = 1 << max(8, max(-low, high).bit_length())
        if (device, size) not in self._curves:
            self._curves[device, size] = self._curve(torch.arange(size, device=device))
        curve = self._curves[device, size]
        return self._by_heads(torch.cat([curve[1 : 1 - low].flip(0), curve[: high + 1]]), dtype)

    def _curve(self, distance: Tensor) -> Tensor:
        """The sum of cosines, in fp64: far distances are large angles."""
        far = distance.double()
        total = torch.zeros_like(far)
        for frequency in self.frequencies:
            total += torch.cos(far * frequency)
        return total

    def _by_heads(self, curve: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.stack([(scale * curve).to(dtype) for scale in self.scales])
