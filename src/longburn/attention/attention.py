"""Self-attention with its parameters: MHA, GQA and MQA, in training and over a stream."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from longburn.attention.core import attend
from longburn.bias import BiasPolicy, Bound, DenseBias, Policy
from longburn.bias.scores import check_causal
from longburn.cache import AttnWindow, Extra, KeyValues, RollingKVCache, Rotation, Step
from longburn.kernels.attend import Known
from longburn.kernels.linear import linear
from longburn.kernels.norm import HeadNorms, rms_norm
from longburn.rope import Angles, Rope3dEncoding, RotaryEncoding


class Attention(nn.Module):
    """Multi-head self-attention; `kv_heads` makes it grouped-query (GQA) or, with 1, multi-query (MQA) attention.

    Without a cache it is the full forward (training). With one it is the same function of the same tokens, however they
    are cut into calls.

    Args:
        dim: model size M.
        heads: query heads H.
        kv_heads: key and value heads K, a divisor of H; default H.
        head_dim: D; default `dim // heads`.
        window: what a query sees; default all keys up to its own.
        rope: rotary encoding of q and k; None for none.
        sinks: learn one logit a head in the softmax's denominator (parameter `sinks` `[H]`, 0 at the start).
        qk_norm: epsilon of an RMSNorm over D of every head's q and k, before the rotation; None for none.
        qkv_bias, out_bias: biases of the projections.
        scale: of the scores; default `1 / sqrt(D)`.
        prescale: multiply q and k by `sqrt(scale)` each instead of the scores by `scale`. The same function, but half
            precision scores stay small (Whisper). The cache then holds the scaled keys.
        bias: a policy added to the scores of every call. What it learns is learned with the layer.

    Raises:
        ValueError: sizes that do not divide, a rope for other heads, relative sinks without rope or with one of three
            axes, or a bias that does not go with the rest.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: AttnWindow | None = None,
        rope: RotaryEncoding | Rope3dEncoding | None = None,
        sinks: bool = False,
        qk_norm: float | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        prescale: bool = False,
        bias: BiasPolicy | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads or (head_dim is None and dim % heads):
            raise ValueError(
                f"Attention: dim {dim}, heads {heads}, kv_heads {kv_heads}, head_dim {head_dim}: "
                "wanted heads a multiple of kv_heads, and dim a multiple of heads or a head_dim"
            )
        self.heads, self.kv_heads = heads, kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.window = window or AttnWindow()
        if self.window.relative_sinks and rope is None:
            raise ValueError("Attention: relative_sinks clamp the distance that rope sees, but rope is None")
        if self.window.relative_sinks and isinstance(rope, Rope3dEncoding):
            raise ValueError(
                "Attention: relative_sinks clamp positions of tokens, which for Rope3dEncoding are rows and columns "
                "too; keep first tokens at their own positions"
            )
        if rope is not None and rope.head_dim != self.head_dim:
            raise ValueError(f"Attention: rope is for heads of {rope.head_dim}, these are of {self.head_dim}")
        self.rope = rope
        self.bias = bias
        self._check_bias(prescale)
        self.scale = 1.0 / math.sqrt(self.head_dim) if scale is None else scale
        self.prescale = prescale
        D = self.head_dim
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * D, bias=qkv_bias, dtype=dtype, device=device)
        self.out = nn.Linear(heads * D, dim, bias=out_bias, dtype=dtype, device=device)
        self.q_norm = None if qk_norm is None else nn.RMSNorm(D, eps=qk_norm, dtype=dtype, device=device)
        self.k_norm = None if qk_norm is None else nn.RMSNorm(D, eps=qk_norm, dtype=dtype, device=device)
        self.sinks = nn.Parameter(torch.zeros(heads, dtype=dtype, device=device)) if sinks else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and so of the cache."""
        return self.qkv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.qkv.weight.device

    @property
    def extra(self) -> Extra:
        """What the cache keeps for every token beside its key and value."""
        return Extra(self.bias.channels, self.bias.sums) if isinstance(self.bias, Policy) else Extra()

    def forward(
        self,
        x: Tensor,
        positions: Step | Tensor | None = None,
        *,
        cache: RollingKVCache | None = None,
        bias: BiasPolicy | Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Attend within x, and to what the cache holds.

        Args:
            x: `[B, T, M]`.
            positions: of x, `[B|1, T]` int64 (-1: no token), or the step that a `CacheManager` handed out (which also
                lets the layers of a model share what they derive from it). Default without a cache: `0 .. T - 1`.
            cache: this layer's; x is written to it. None: x is all there is.
            bias: of this call, where the layer has none: a policy, or a tensor `[B|1, H|1, T, P]` whose columns are the
                absolute key positions `0 .. P - 1`.
            residual: `[B, T, M]`, added to the result.

        Returns:
            `[B, T, M]`; rows without a token are the output projection of 0.

        Raises:
            ValueError: shapes that disagree, a cache without positions, a window that no cache serves, or two biases.
        """
        B, T, _ = x.shape
        step = self._step(positions, T, cache, x.device)
        policy = self._policy(bias)
        qk, v = self._project(x)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        own = None if not self.extra.channels else self._numbers(x, q, k, step, cache)
        if cache is None:
            k, turned = self._rotation(q, step, x.dtype).apply(k)
            held = KeyValues(k, v, step.positions, _of_self(step), False, None, None, *turned, own)
        else:
            held = cache.update(k, v, step, rotation=self._rotation(q, step, x.dtype), extra=own)
        assert held.q is not None
        out = attend(
            held.q,
            held.k,
            held.v,
            q_pos=step.positions,
            k_pos=held.pos,
            window=self.window,
            bias=None if policy is None else Bound(policy, x, held.extra, own, self._keep(policy, cache)),
            sinks=self.sinks,
            scale=1.0 if self.prescale else self.scale,
            q_sink=held.q_sink,
            known=held.known,
            ascending=held.ascending,
            before=held.before,
            scales=held.scales,
        )
        return linear(out.transpose(1, 2).reshape(B, T, -1), self.out.weight, self.out.bias, residual=residual)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q and k, heads of one tensor `[B, H + K, T, D]`; v `[B, K, T, D]`.

        They are not yet rotated, and normalised only where something else comes before the rotation.
        """
        B, T, _ = x.shape
        fused = linear(x, self.qkv.weight, self.qkv.bias).view(B, T, -1, self.head_dim).transpose(1, 2)
        qk, v = fused[:, : -self.kv_heads], fused[:, -self.kv_heads :]
        norms = self._norms
        if norms is not None and not self._normed_with_rotation:
            heads = ((qk[:, : self.heads], norms.q), (qk[:, self.heads :], norms.k))
            qk = torch.cat([rms_norm(x, weight, norms.eps, round_last=True) for x, weight in heads], 1)
        if isinstance(self.bias, Policy) and self.bias.changes_queries:
            qk = torch.cat([self.bias.queries(qk[:, : self.heads]), qk[:, self.heads :]], 1)
        return (qk * math.sqrt(self.scale) if self.prescale else qk), v

    @property
    def _norms(self) -> HeadNorms | None:
        if self.q_norm is None or self.k_norm is None:
            return None
        assert self.q_norm.eps is not None
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)

    @property
    def _normed_with_rotation(self) -> bool:
        """Whether nobody needs q and k between the norm and the rotation."""
        return not self.prescale and not isinstance(self.bias, Policy)

    def _check_bias(self, prescale: bool) -> None:
        policy = self.bias
        if policy is not None:
            self._check_sizes(policy)
        if not isinstance(policy, Policy):
            return
        name = type(policy).__name__
        if policy.changes_queries and (self.rope is not None or prescale):
            raise ValueError(
                f"Attention: {name} changes queries, which rope or prescale would change again; "
                "leave these out, it says itself where tokens stand"
            )
        if policy.reads_queries and prescale:
            raise ValueError(f"Attention: {name} computes with queries, which prescale would change; leave it out")
        if policy.causal:
            check_causal(f"Attention: {name}", self.window.lookahead, self.window.block)

    def _check_sizes(self, policy: BiasPolicy) -> None:
        """A policy for other heads is refused before anything is written to a cache."""
        for name, own in (("heads", self.heads), ("head_dim", self.head_dim)):
            wanted = getattr(policy, name, None)
            if isinstance(wanted, int) and wanted != own:
                raise ValueError(
                    f"Attention: the layer has {name} {own}, {type(policy).__name__} was built for {wanted}"
                )

    def _policy(self, bias: BiasPolicy | Tensor | None) -> BiasPolicy | None:
        """The bias of a call that is given this one."""
        if bias is None:
            return self.bias
        if self.bias is not None:
            raise ValueError(f"Attention: a bias for this call, but the layer has its own, {type(self.bias).__name__}")
        if isinstance(bias, Policy) and (bias.channels or bias.changes_queries):
            raise ValueError(
                f"Attention: {type(bias).__name__} needs more of a layer than one call; give it to Attention(bias=...)"
            )
        if isinstance(bias, Tensor):
            return DenseBias(bias)
        self._check_sizes(bias)
        return bias

    @staticmethod
    def _keep(policy: BiasPolicy, cache: RollingKVCache | None) -> Callable[[Tensor, Tensor], None] | None:
        return cache.renew if cache is not None and isinstance(policy, Policy) and policy.renews else None

    def _numbers(self, x: Tensor, q: Tensor, k: Tensor, step: Step, cache: RollingKVCache | None) -> Tensor:
        """What the layer's bias keeps for the tokens of x, `[B, C, T]`."""
        assert isinstance(self.bias, Policy)
        if cache is None:
            wide = torch.promote_types(x.dtype, torch.float32)
            previous = torch.zeros(x.shape[0], self.bias.channels, dtype=wide, device=x.device)
        else:
            previous = cache.previous(step)
        return self.bias.of_tokens(x, q, k, step.positions, previous).to(previous.dtype)

    def _step(
        self, positions: Step | Tensor | None, T: int, cache: RollingKVCache | None, device: torch.device
    ) -> Step:
        if cache is not None and not self.window.streams:
            raise ValueError(
                f"Attention: a window with lookahead {self.window.lookahead} sees later keys, which no cache holds yet"
            )
        if positions is None:
            if cache is not None:
                raise ValueError("Attention: a cache needs positions; take them from CacheManager.positions")
            return Step.from_zero(T, device)
        step = Step.of(positions)
        if step.length != T:
            raise ValueError(f"Attention: {T} tokens, but positions for {step.length}")
        return step

    def _rotation(self, q: Tensor, step: Step, dtype: torch.dtype) -> Rotation:
        """How these queries, and keys with them, are normalised and rotated."""
        norms = self._norms if self._normed_with_rotation else None
        if self.rope is None:
            return Rotation(q, None, norms=norms)
        clamped = self._sink_angles(step, dtype) if self._distance_is_clamped(step) else None
        return Rotation(q, self._angles(step, dtype), clamped, self.rope.interleaved, norms)

    def _angles(self, step: Step, dtype: torch.dtype) -> Angles:
        rope = self.rope
        assert rope is not None
        wide = torch.promote_types(dtype, torch.float32)
        return step.share(("angles", id(rope), wide), lambda: rope.angles(step.positions, wide))

    def _sink_angles(self, step: Step, dtype: torch.dtype) -> Angles:
        rope, farthest = self.rope, self._farthest
        assert rope is not None
        wide = torch.promote_types(dtype, torch.float32)
        return step.share(
            ("sink angles", id(rope), farthest, wide),
            lambda: rope.angles(step.positions.clamp(max=farthest), wide),
        )

    @property
    def _farthest(self) -> int:
        """The position from which a query looks at kept sink tokens once it is farther away than that."""
        assert self.window.size is not None
        return self.window.sink_tokens + self.window.size - 1

    def _distance_is_clamped(self, step: Step) -> bool:
        return self.window.relative_sinks and (step.bound is None or step.bound - 1 > self._farthest)


def _of_self(step: Step) -> tuple[Known, ...] | None:
    """What the host knows when the keys are the queries' own."""
    if step.runs is None or len(step.runs) > 1 or step.runs[0].start or step.runs[0].size != step.length:
        return None
    return (Known(0, step.length, step.length, 0, 0, True),)
