"""`attend`: what attention means here, whichever kernel computes it."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from longburn.bias import BiasContext, BiasPolicy, Bound, Policy
from longburn.cache import AttnWindow
from longburn.kernels import attend as kernels
from longburn.kernels.attend import AttendCall, AttendResult, BiasTerms, Known
from longburn.kernels.attend.call import add_sinks, joined, query_block

FP8 = torch.float8_e4m3fn
ROWS = 1 << 25  # numbers of a bias in dense rows that are written out at a time


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    window: AttnWindow | None = None,
    bias: BiasPolicy | Bound | Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    q_sink: Tensor | None = None,
    known: tuple[Known, ...] | None = None,
    ascending: bool = False,
    before: tuple[Tensor, Tensor] | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention of queries over keys that carry their positions, `[B, H, T, D]`.

    The query at position p sees the key at position j iff the slot is filled (`j >= 0`), `j <= p` (or j stands in p's
    own block), and `p - j < window.size` or `j < window.sink_tokens`. A query that sees nothing, or has position -1,
    gives 0.

    Args:
        q: queries `[B, H, T, D]`.
        k, v: keys and values `[B, K, S, D]`; H is a multiple of K, and query head h reads kv head `h // (H / K)`.
        q_pos: `[B|1, T]` int64, -1 for no token. Default: the last T of S positions.
        k_pos: `[B|1, S]` int64, -1 for an empty slot, whose keys and values may be anything. Default: `0 .. S - 1`.
        window: what a query sees; default all keys up to its own.
        bias: added to the scores before the softmax: a policy (`Bound`, if it asks for what only its layer knows), or a
            tensor `[B|1, H|1, T, S]` aligned with k.
        sinks: learned logits `[H]` that enter the softmax's denominator with the value 0.
        scale: of the scores; default `1 / sqrt(D)`.
        q_sink: a second query `[B, H, T, D]` for the keys at positions below `window.sink_tokens` (relative sinks).
        known: what the host knows of the positions; given by caches, it only saves work.
        ascending: no slot of k holds a position below its own index, as in a cache; it only saves work.
        before: keys and values `[B, K, S0, D]` of the first S0 slots, where these lie elsewhere. `k_pos` and the bias
            then have S0 + S columns.
        scales: fp32 `[B, K, S]` of k and of v, which are then `torch.float8_e4m3fn` and mean number times scale.

    Returns:
        `[B, H, T, D]` in the type of q.

    Raises:
        ValueError: shapes that disagree.
        ImplError: the implementation named by `use_impl` cannot compute this call.
    """
    call = _call(q, k, v, q_pos, k_pos, window, sinks, scale, q_sink, known, ascending, before, scales)
    return _run(call, bias)[0]


def attend_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    window: AttnWindow | None = None,
    bias: BiasPolicy | Bound | Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    q_sink: Tensor | None = None,
    known: tuple[Known, ...] | None = None,
    ascending: bool = False,
    before: tuple[Tensor, Tensor] | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend`, and the log-sum-exp `[B, H, T]` of its scores (sinks included; `-inf` where nothing is seen).

    Results over disjoint sets of keys merge exactly: `merge([(out, lse), ...])`. Let sinks into one part only.
    """
    call = _call(q, k, v, q_pos, k_pos, window, sinks, scale, q_sink, known, ascending, before, scales)
    return _run(replace(call, wants_lse=True), bias)


def _run(call: AttendCall, bias: BiasPolicy | Bound | Tensor | None) -> AttendResult:
    """The result of the call. Without queries or keys there is nothing to compute: kernels need not know the case."""
    if call.q.numel() and call.k_pos.shape[1]:
        return kernels.run(call) if bias is None else _biased(call, bias)
    out = call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])
    wide = torch.promote_types(out.dtype, torch.float32)
    nothing = torch.full(out.shape[:3], -math.inf, dtype=wide, device=out.device)
    return add_sinks((out, nothing), call.sinks)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    window: AttnWindow | None,
    sinks: Tensor | None,
    scale: float | None,
    q_sink: Tensor | None,
    known: tuple[Known, ...] | None,
    ascending: bool,
    before: tuple[Tensor, Tensor] | None,
    scales: tuple[Tensor, Tensor] | None,
) -> AttendCall:
    window = window or AttnWindow()
    _check(q, k, v, sinks, q_sink, packed=scales is not None)
    _check_pieces(q, k, before, scales)
    T, S = q.shape[2], k.shape[2] + (0 if before is None else before[0].shape[2])
    if q_pos is None and k_pos is None and known is None and S >= T:
        known = (Known(S - T, T, S, 0, 0, True),)
    if q_pos is None:
        q_pos = torch.arange(S - T, S, device=q.device)[None]
    if k_pos is None:
        k_pos = torch.arange(S, device=q.device)[None]
    _check_positions("q_pos", q_pos, q.shape[0], T)
    _check_positions("k_pos", k_pos, q.shape[0], S)
    return AttendCall(
        q=q,
        k=k,
        v=v,
        q_pos=q_pos,
        k_pos=k_pos,
        scale=1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
        window=window.size,
        sink_tokens=window.sink_tokens if window.size is not None else 0,
        lookahead=window.lookahead,
        block=window.block,
        sinks=sinks,
        q_sink=q_sink,
        known=known,
        ascending=ascending,
        before=before,
        scales=scales,
    )


def _biased(call: AttendCall, bias: BiasPolicy | Bound | Tensor) -> AttendResult:
    """The call with this bias; one in dense rows is asked for a block of queries at a time."""
    if isinstance(bias, Tensor):
        return kernels.run(replace(call, bias=_of_tensor(bias, call)))
    policy = bias.policy if isinstance(bias, Bound) else bias
    looks_at_keys = isinstance(policy, Policy) and policy.keys
    call = joined(call) if looks_at_keys else call
    context = BiasContext(
        *(call.q_pos, call.k_pos, call.q, call.scale),
        *(call.window, call.sink_tokens, call.lookahead, call.block),
        known=call.known,
        q_sink=call.q_sink,
        k=call.k if looks_at_keys else None,
    )
    context = bias.complete(context) if isinstance(bias, Bound) else context
    T, S = call.q.shape[2], call.k_pos.shape[1]
    block = max(1, ROWS // (call.q.shape[0] * call.q.shape[1] * S))
    keep = bias.keep if isinstance(bias, Bound) else None
    if not isinstance(policy, Policy) or (keep is None and (block >= T or not policy.writes_rows(context))):
        return kernels.run(replace(call, bias=_fitting(policy, policy.terms(context), call)))
    block = block if policy.writes_rows(context) else T
    parts, whole = [], context
    for start in range(0, T, block):
        stop = min(start + block, T)
        rows, part = (query_block(call, start, stop), context.queries(start, stop)) if block < T else (call, context)
        parts.append(kernels.run(replace(rows, bias=_fitting(policy, policy.terms(part), rows))))
        if policy.renews and (stop < T or keep is not None):
            context = context._replace(extra=policy.renewed(part, whole))
    if keep is not None and context.extra is not None:
        keep(context.k_pos, context.extra)
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _fitting(policy: BiasPolicy, terms: BiasTerms, call: AttendCall) -> BiasTerms:
    """The terms, which kernels read as they are.

    Raises:
        ValueError: terms of another shape than the call's.
    """
    (B, H, T, _), S = call.q.shape, call.k_pos.shape[1]
    shapes = {"slope": (H,), "key": (B, H, S), "row": (B, H, T), "table": (H, 0), "dense": (B, H, T, S)}
    for name, wanted in shapes.items():
        term = getattr(terms, name)
        if term is None:
            continue
        shared = {"slope": 0, "table": 1}.get(name, 2)  # dimensions that may stand for all with 1
        fits = len(term.shape) == len(wanted) and all(
            n == w or not w or (n == 1 and i < shared) for i, (n, w) in enumerate(zip(term.shape, wanted, strict=True))
        )
        if not fits:
            raise ValueError(
                f"attend: {type(policy).__name__} gave `{name}` of {tuple(term.shape)} for a call with B, H, T, S = "
                f"{(B, H, T, S)}; wanted the shapes of `BiasTerms`"
            )
    return terms


def _of_tensor(bias: Tensor, call: AttendCall) -> BiasTerms:
    wanted = (*call.q.shape[:3], call.k_pos.shape[1])
    if bias.dim() != 4 or any(n not in (1, w) for n, w in zip(bias.shape[:2], wanted, strict=False)):
        raise ValueError(f"attend: bias is {tuple(bias.shape)}, wanted [B|1, H|1, T, S] with B, H, T, S = {wanted}")
    if tuple(bias.shape[2:]) != wanted[2:]:
        raise ValueError(f"attend: bias is {tuple(bias.shape)}, wanted [B|1, H|1, T, S] with B, H, T, S = {wanted}")
    return BiasTerms(dense=bias)


def _check(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, q_sink: Tensor | None, *, packed: bool = False
) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"attend: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: wanted [B, H, T, D] and [B, K, S, D]"
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attend: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} disagree: wanted the same B and D, "
            "as many keys as values, and query heads a multiple of kv heads"
        )
    if packed and not k.dtype == v.dtype == FP8:
        raise ValueError(f"attend: k is {k.dtype}, v {v.dtype}: with scales they are {FP8}")
    if not packed and not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attend: q is {q.dtype}, k {k.dtype}, v {v.dtype}: wanted one type (fp8 goes with scales)")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"attend: sinks are {tuple(sinks.shape)}, wanted ({q.shape[1]},), one logit a query head")
    if q_sink is not None and q_sink.shape != q.shape:
        raise ValueError(f"attend: q_sink is {tuple(q_sink.shape)}, wanted the shape of q, {tuple(q.shape)}")


def _check_pieces(
    q: Tensor, k: Tensor, before: tuple[Tensor, Tensor] | None, scales: tuple[Tensor, Tensor] | None
) -> None:
    B, K, S, D = k.shape
    for name, given in zip(("k", "v"), before or (), strict=False):
        if given.dim() != 4 or (*given.shape[:2], given.shape[3]) != (B, K, D) or given.dtype != q.dtype:
            raise ValueError(
                f"attend: before holds {name} {tuple(given.shape)} of {given.dtype}, "
                f"wanted [{B}, {K}, S0, {D}] of {q.dtype}"
            )
    if before is not None and before[0].shape != before[1].shape:
        raise ValueError(f"attend: before holds k {tuple(before[0].shape)} and v {tuple(before[1].shape)}")
    for name, scale in zip(("k", "v"), scales or (), strict=False):
        if tuple(scale.shape) != (B, K, S) or scale.dtype != torch.float32:
            raise ValueError(
                f"attend: scales of {name} are {scale.dtype} {tuple(scale.shape)}, wanted fp32 {(B, K, S)}"
            )


def _check_positions(name: str, pos: Tensor, batch: int, length: int) -> None:
    if pos.dim() != 2 or pos.shape[0] not in (1, batch) or pos.shape[1] != length or pos.dtype != torch.int64:
        raise ValueError(
            f"attend: {name} is {pos.dtype} of shape {tuple(pos.shape)}, "
            f"wanted int64 [1, {length}] or [{batch}, {length}]"
        )
