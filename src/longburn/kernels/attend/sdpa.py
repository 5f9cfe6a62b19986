"""Attention through PyTorch's own fused kernels.

On the CPU, without gradients, ATen's flash kernel also returns the log-sum-exp. Sinks and the separate treatment of
kept sink tokens are then merges, and where the host knows the order of the keys, a call is cut into pieces that need no
mask or one small band mask. Everywhere else `scaled_dot_product_attention` gives no log-sum-exp: learned sinks become
one zero key.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from longburn.kernels.attend.call import (
    AttendCall,
    AttendResult,
    Known,
    add_sinks,
    bias_matrix,
    by_query_blocks,
    visible,
)
from longburn.kernels.attend.merging import merge

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

PACK_QUERIES = 16  # up to here the queries of a group are packed as more queries of their kv head
BAND_BLOCK = 256  # queries that share one band of keys; their band mask has BAND_BLOCK x (BAND_BLOCK + window) entries
SPLIT_KEYS = 2048  # keys a thread reads alone before a decode call is split over the length


def why_not(call: AttendCall) -> str | None:
    """Why PyTorch's fused attention cannot compute this call."""
    if call.k.shape[-1] != call.v.shape[-1]:
        return f"keys of size {call.k.shape[-1]} and values of size {call.v.shape[-1]} differ"
    if call.q_sink is not None and not _is_known(call):
        return "relative sinks need keys whose order the host knows"
    if _has_lse(call):
        return None
    if call.q_sink is not None:
        return "relative sinks need the log-sum-exp, which it returns on the CPU without gradients only"
    if call.wants_lse:
        return "it returns the log-sum-exp on the CPU without gradients only"
    if call.q.dtype in (torch.float16, torch.bfloat16) and (call.bias is not None or call.sinks is not None):
        return f"a bias or sink beside {call.q.dtype} queries would be rounded to their type"
    return None


def attend_sdpa(call: AttendCall) -> AttendResult:
    """Fused attention; `why_not` says for which calls."""
    if not _has_lse(call):
        return _plain_causal(call) if _is_plain_causal(call) else by_query_blocks(call, _zero_key)
    if call.known is None or not _is_known(call):
        return by_query_blocks(call, _masked)
    if len(call.known) == 1 and call.known[0].q_count == call.q.shape[2]:
        result = _pieces(call, call.known[0])
    else:
        every = call.known * call.q.shape[0] if len(call.known) == 1 else call.known
        rows = [_row(call, b, known) for b, known in enumerate(every)]
        result = torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])
    return add_sinks(result, call.sinks)


def _has_lse(call: AttendCall) -> bool:
    return call.q.device.type == "cpu" and not call.needs_grad


def _is_regular(call: AttendCall) -> bool:
    return call.bias is None and call.lookahead == 0 and call.block == 1


def _is_known(call: AttendCall) -> bool:
    return call.known is not None and _is_regular(call)


# --- with the log-sum-exp: CPU, no gradients -------------------------------------------------------------------------


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, mask: Tensor | None = None, causal: bool = False
) -> AttendResult:
    """One fused call over filled keys. `causal`: query i sees keys 0 .. i."""
    B, H, T, D = q.shape
    if causal and T > 1:
        out, lse = _flash_cpu(q, k, v, 0.0, True, scale=scale)
        return out, lse
    K, S = k.shape[1], k.shape[2]
    if T > PACK_QUERIES or (mask is not None and mask.shape[1] != 1):
        out, lse = _flash_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        return out, lse
    # Without a mask by head, the queries of a group are just more queries: every key is then read once, not H/K times.
    groups = H // K
    packed = q.reshape(B, K, groups * T, D)
    if mask is not None:
        mask = mask.repeat(1, 1, groups, 1)
    if mask is None and B == 1 and groups * T <= 32 and S >= 2 * SPLIT_KEYS:
        out, lse = _split(packed[0], k[0], v[0], scale, parts=S // SPLIT_KEYS)
    else:
        out, lse = _flash_cpu(packed, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return out.reshape(B, H, T, D), lse.reshape(B, H, T)


def _split(q: Tensor, k: Tensor, v: Tensor, scale: float, *, parts: int) -> AttendResult:
    """Few queries over many keys: cut the keys (`[K, S, D]`) so that every thread has some, and merge."""
    K, S, D = k.shape
    size = S // parts
    spread = q[:, None].expand(K, parts, *q.shape[1:])
    cut = [x[:, : parts * size].view(K, parts, size, D) for x in (k, v)]
    out, lse = _flash_cpu(spread, *cut, 0.0, False, scale=scale)
    pieces = [merge([(out[:, i], lse[:, i]) for i in range(parts)])]
    if parts * size < S:
        rest = slice(parts * size, S)
        out, lse = _flash_cpu(q[:, None], k[:, None, rest], v[:, None, rest], 0.0, False, scale=scale)
        pieces.append((out[:, 0], lse[:, 0]))
    return merge(pieces)


def _pieces(call: AttendCall, known: Known) -> AttendResult:
    """A run of queries over keys that the host knows, cut so that almost nothing is masked."""
    call = replace(call, k=call.k[:, :, : known.keys], v=call.v[:, :, : known.keys], k_pos=call.k_pos[:, : known.keys])
    if not known.ordered:
        return _ring(call, known)
    first, count = known.q_start, known.q_count
    if call.window is None:
        return _causal(call.q, call.k, call.v, call.scale, past=first)
    # Positions below max(window, sink_tokens) see everything before them, and relative sinks at their true distance.
    free = min(max(max(call.window, call.sink_tokens) - first, 0), count)
    parts = []
    if free:
        keys = slice(0, first + free)
        parts.append(_causal(call.q[:, :, :free], call.k[:, :, keys], call.v[:, :, keys], call.scale, past=first))
    parts.extend(_band(call, known, a, min(a + BAND_BLOCK, count)) for a in range(free, count, BAND_BLOCK))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _ring(call: AttendCall, known: Known) -> AttendResult:
    """Queries over a ring that has wrapped: the kept sink tokens, all seen, and the ring in slot order."""
    head, q_end = known.head, known.q_start + known.q_count
    last_key = known.k_start + known.keys - head - 1
    all_seen = last_key <= known.q_start and (call.window is None or q_end - 1 - known.k_start < call.window)
    if all_seen and call.q_sink is None:
        return _flash(call.q, call.k, call.v, call.scale)
    parts = []
    if head:
        q_sink = call.q if call.q_sink is None else call.q_sink
        parts.append(_flash(q_sink, call.k[:, :, :head], call.v[:, :, :head], call.scale))
    ring = replace(
        call, k=call.k[:, :, head:], v=call.v[:, :, head:], k_pos=call.k_pos[:, head:], q_sink=None, sink_tokens=0
    )
    parts.append(_flash(ring.q, ring.k, ring.v, ring.scale) if all_seen else by_query_blocks(ring, _masked_filled))
    return merge(parts)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, *, past: int) -> AttendResult:
    """Queries that are the last of the keys' positions: all of the past, and a causal triangle."""
    if q.shape[2] == 1:
        return _flash(q, k, v, scale)
    own = _flash(q, k[:, :, past:], v[:, :, past:], scale, causal=True)
    return own if past == 0 else merge([_flash(q, k[:, :, :past], v[:, :, :past], scale), own])


def _band(call: AttendCall, known: Known, a: int, b: int) -> AttendResult:
    """Queries `a .. b - 1` of a windowed run: the kept sink tokens, and the band of keys that their windows touch.

    The band's mask depends on the distance alone and is far smaller than the keys that it saves from being visited.
    """
    assert call.window is not None
    first, last = known.q_start + a, known.q_start + b - 1
    q = call.q[:, :, a:b]
    sinks = call.sink_tokens  # all of them: a query with a band is later than every kept sink token
    low = max(first - call.window + 1, known.k_start, sinks)
    offset = known.head - known.k_start  # slot of position j in the ordered part: j + offset
    keys = slice(low + offset, last + 1 + offset)
    p = torch.arange(first, last + 1)[:, None]
    j = torch.arange(low, last + 1)[None, :]
    seen = (j <= p) & (p - j < call.window)
    mask = torch.zeros(seen.shape, dtype=_mask_dtype(q)).masked_fill_(~seen, float("-inf"))
    band = _flash(q, call.k[:, :, keys], call.v[:, :, keys], call.scale, mask=mask[None, None])
    if sinks == 0:
        return band
    q_sink = q if call.q_sink is None else call.q_sink[:, :, a:b]
    return merge([_flash(q_sink, call.k[:, :, :sinks], call.v[:, :, :sinks], call.scale), band])


def _row(call: AttendCall, b: int, known: Known) -> AttendResult:
    """Row b of a ragged batch on its own; columns that hold no query give 0 and -inf."""
    H, T, D = call.q.shape[1:]
    out = call.q.new_zeros(1, H, T, D)
    lse = torch.full((1, H, T), float("-inf"), dtype=_lse_dtype(call.q))
    if known.q_count:
        columns = slice(known.q_offset, known.q_offset + known.q_count)
        row = slice(b, b + 1)
        alone = AttendCall(
            q=call.q[row, :, columns],
            k=call.k[row, :, : known.keys],
            v=call.v[row, :, : known.keys],
            q_pos=_of_row(call.q_pos, b)[:, columns],
            k_pos=_of_row(call.k_pos, b)[:, : known.keys],
            scale=call.scale,
            window=call.window,
            sink_tokens=call.sink_tokens,
            q_sink=None if call.q_sink is None else call.q_sink[row, :, columns],
        )
        out[:, :, columns], lse[:, :, columns] = _pieces(alone, known._replace(q_offset=0))
    return out, lse


def _of_row(positions: Tensor, b: int) -> Tensor:
    return positions if positions.shape[0] == 1 else positions[b : b + 1]


def _masked(call: AttendCall) -> AttendResult:
    """Any call, with the mask from its positions. Empty slots may hold NaN, which a mask cannot stop: clear them."""
    filled = (call.k_pos >= 0)[:, None, :, None]
    k, v = torch.where(filled, call.k, 0), torch.where(filled, call.v, 0)
    return add_sinks(_by_mask(call, k, v), call.sinks)


def _masked_filled(call: AttendCall) -> AttendResult:
    return _by_mask(call, call.k, call.v)


def _by_mask(call: AttendCall, k: Tensor, v: Tensor) -> AttendResult:
    seen = visible(call)
    bias = bias_matrix(call)
    plain = torch.zeros((), dtype=_mask_dtype(call.q)) if bias is None else bias.to(_mask_dtype(call.q))
    mask = torch.where(seen, plain, float("-inf"))
    out, lse = _flash(call.q, k, v, call.scale, mask=mask)
    sees = seen.any(-1)
    return torch.where(sees.unsqueeze(-1), out, 0), lse.masked_fill(~sees, float("-inf"))


def _mask_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


_lse_dtype = _mask_dtype


# --- without it: gradients, other devices ----------------------------------------------------------------------------


def _is_plain_causal(call: AttendCall) -> bool:
    if call.known is None or len(call.known) != 1 or not _is_regular(call) or call.sinks is not None:
        return False
    known = call.known[0]
    within = call.window is None or known.q_start + known.q_count <= call.window
    whole = known.ordered and known.head == 0 and known.k_start == 0 and known.q_count == call.q.shape[2]
    return whole and within


def _plain_causal(call: AttendCall) -> AttendResult:
    assert call.known is not None
    S, T = call.known[0].keys, call.q.shape[2]
    k, v = call.k[:, :, :S], call.v[:, :, :S]
    gqa = call.groups > 1
    if T == 1:
        out = F.scaled_dot_product_attention(call.q, k, v, scale=call.scale, enable_gqa=gqa)
    elif T == S:
        out = F.scaled_dot_product_attention(call.q, k, v, is_causal=True, scale=call.scale, enable_gqa=gqa)
    else:
        # Imported here because it brings in PyTorch's whole compiler.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(T, S)
        out = F.scaled_dot_product_attention(call.q, k, v, attn_mask=mask, scale=call.scale, enable_gqa=gqa)
    return out, out.new_empty(0)


def _zero_key(call: AttendCall) -> AttendResult:
    """Sinks as one more key of zeros whose bias is the sink's logit: differentiable, without a log-sum-exp."""
    filled = (call.k_pos >= 0)[:, None, :, None]
    k, v = torch.where(filled, call.k, 0), torch.where(filled, call.v, 0)
    seen = visible(call)
    sees = seen.any(-1, keepdim=True)
    bias = bias_matrix(call)
    # A row that sees nothing is computed over everything and then dropped, so that its gradient is 0 and not NaN.
    plain = torch.zeros((), dtype=call.q.dtype, device=call.q.device) if bias is None else bias.to(call.q.dtype)
    mask = torch.where(seen | ~sees, plain, float("-inf"))
    if call.sinks is not None:
        H, T = call.q.shape[1:3]
        column = call.sinks.to(mask.dtype)[None, :, None, None].expand(mask.shape[0], H, T, 1)
        mask = torch.cat([column, mask.expand(-1, H, -1, -1)], -1)
        k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
    out = F.scaled_dot_product_attention(call.q, k, v, attn_mask=mask, scale=call.scale, enable_gqa=call.groups > 1)
    return torch.where(sees, out, 0), out.new_empty(0)
