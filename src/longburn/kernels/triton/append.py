"""Rotation of queries and keys, and the cache append, in one kernel."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longburn.kernels.triton import overlaps
from longburn.kernels.triton.rotate import channels, rows_of_a_program, turned

if TYPE_CHECKING:
    from longburn.kernels.append import AppendCall


@triton.jit
def _put(
    x, inside, d, D, slot, kept, sink_tokens, cache, cache_head, scale, scale_head, before, before_head, LEAST, MOST
):
    """x `[n, PAD]` into slots `[n]` where `kept`; each `_head` `[n]` is where the head of the row begins."""
    if before is not None:
        apart = kept & (slot < sink_tokens)
        tl.store(before + (before_head + slot * D)[:, None] + d, x, mask=inside & apart[:, None])
        kept = kept & (slot >= sink_tokens)
        slot = slot - sink_tokens
    if scale is not None:
        wide = x.to(tl.float32)
        factor = tl.maximum(tl.max(tl.abs(wide), 1), LEAST) * (1 / MOST)
        tl.store(scale + scale_head + slot, factor, mask=kept)
        x = tl.div_rn(wide, tl.broadcast_to(factor[:, None], wide.shape))
    at = cache + (cache_head + slot * D)[:, None] + d
    tl.store(at, x.to(cache.dtype.element_ty), mask=inside & kept[:, None])


@triton.jit
def _write(
    n, b, k, v, strides, weight, angles, positions, newest, held, row_strides, caches, scales, before, head_strides,
    T, K, R, D, sink_tokens, ring, nowhere,
    PAD: tl.constexpr, INTERLEAVED: tl.constexpr, EPS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Keys and values of the heads and tokens `n` of row b into their slots."""
    valid, t, h, d = n < T * K, (n // K).to(tl.int64), n % K, tl.arange(0, PAD)[None, :]
    inside = valid[:, None] & (d < D)
    p = tl.load(positions + b * row_strides[0] + t, mask=valid, other=-1)
    slot, kept = p, p >= 0
    if ring is not None:
        slot = tl.where(p < sink_tokens, p, sink_tokens + (p - sink_tokens) % ring)
        if newest is not None:
            kept = kept & ((p < sink_tokens) | (p > tl.load(newest + b * row_strides[1]) - ring))
    kept = kept & (slot < nowhere)  # whatever the positions are, never beyond the buffers
    tl.store(held + b * row_strides[2] + slot, p, mask=kept & (h == 0) & ((b == 0) | (row_strides[2] > 0)))
    row = k + b * strides[1][0] + h * strides[1][1] + t * strides[1][2]
    if angles is not None:
        wide, other = channels(row, valid, R, D, weight, PAD, INTERLEAVED, EPS)
        x = turned(wide, other, angles[0], angles[1], b * row_strides[3] + t, valid, R, PAD).to(k.dtype.element_ty)
    else:
        x = tl.load(row[:, None] + d, mask=inside, other=0.0)
    row = v + b * strides[2][0] + h * strides[2][1] + t * strides[2][2]
    y = tl.load(row[:, None] + d, mask=inside, other=0.0)
    c = b * head_strides[0][0] + h * head_strides[0][1]
    s = b * head_strides[1][0] + h * head_strides[1][1]
    o = b * head_strides[2][0] + h * head_strides[2][1]
    _put(x, inside, d, D, slot, kept, sink_tokens, caches[0], c, scales[0], s, before[0], o, LEAST, MOST)
    _put(y, inside, d, D, slot, kept, sink_tokens, caches[1], c, scales[1], s, before[1], o, LEAST, MOST)


@triton.jit
def _turn(
    n, b, q, strides, weight, q_out, q_sink, angles, sink_angles, row_strides,
    T, H, R, D, PAD: tl.constexpr, INTERLEAVED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Queries of the heads and tokens `n` of row b, by both pairs of angles."""
    valid, t, h, d = n < T * H, (n // H).to(tl.int64), n % H, tl.arange(0, PAD)[None, :]
    inside, at = valid[:, None] & (d < D), ((b * H + h) * T + t)[:, None] * D + d
    row, token = q + b * strides[0][0] + h * strides[0][1] + t * strides[0][2], b * row_strides[3] + t
    x, other = channels(row, valid, R, D, weight, PAD, INTERLEAVED, EPS)
    if angles is not None:
        out = turned(x, other, angles[0], angles[1], token, valid, R, PAD)
        tl.store(q_out + at, out.to(q_out.dtype.element_ty), mask=inside)
    if sink_angles is not None:
        far = turned(x, other, sink_angles[0], sink_angles[1], token, valid, R, PAD)
        tl.store(q_sink + at, far.to(q_sink.dtype.element_ty), mask=inside)


@triton.jit
def _append(
    q,
    k,
    v,
    strides,  # of q, k and v: rows, heads, tokens
    q_weight,  # of norms; None where there are none, as k_weight
    k_weight,
    q_out,
    q_sink,
    angles,  # cos and sin, as sink_angles; None where there are none
    sink_angles,
    positions,
    newest,
    held,
    row_strides,  # of positions, newest, held, and of the angles in tokens; 0 where all rows share one
    caches,
    scales,
    before,
    head_strides,  # of caches, scales and before: rows, heads
    T,
    H,
    K,
    R,
    D,
    sink_tokens,
    ring,
    nowhere,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EPS: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(1).to(tl.int64)
    queries = tl.cdiv(T * H, BLOCK) if q is not None else 0  # programs
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) < queries:
        if q is not None:
            _turn(
                *(n, b, q, strides, q_weight, q_out, q_sink, angles, sink_angles, row_strides),
                *(T, H, R, D, PAD, INTERLEAVED, EPS),
            )
    else:
        _write(
            *(n - queries * BLOCK, b, k, v, strides, k_weight, angles, positions, newest, held, row_strides),
            *(
                caches,
                scales,
                before,
                head_strides,
                T,
                K,
                R,
                D,
                sink_tokens,
                ring,
                nowhere,
                PAD,
                INTERLEAVED,
                EPS,
                LEAST,
                MOST,
            ),
        )


def append(call: "AppendCall", least: float, most: float) -> tuple[Tensor | None, Tensor | None]:
    """The Impl `triton` of the operation `append`; `least` and `most` magnitudes of fp8 as in `quantised`."""
    q, k, v = call.q, call.k, call.v
    (B, K, T, D), H = k.shape, 0 if q is None else q.shape[1]
    q_out, q_sink = (
        None if q is None or pair is None else torch.empty(B, H, T, D, dtype=k.dtype, device=k.device)
        for pair in (call.angles, call.sink_angles)
    )
    if not k.numel():
        return q if call.angles is None else q_out, q_sink
    angles = call.angles or call.sink_angles
    R, ring = 0 if angles is None else angles[0].shape[-1], call.ring
    newest = call.positions.amax(1) if ring is not None and ring < T else None
    scales, before = call.scales or (None, None), call.before or (None, None)
    block = rows_of_a_program(B * T * max(H, K))
    pdl = overlaps(k.device)
    queries = 0 if q_out is None and q_sink is None else H
    q_weight, k_weight, eps = call.norms or (None, None, 0.0)
    _append[(triton.cdiv(T * queries, block) + triton.cdiv(T * K, block), B)](
        q if queries else None,
        k,
        v,
        tuple((0, 0, 0) if x is None else x.stride()[:3] for x in (q, k, v)),
        q_weight,
        k_weight,
        q_out,
        q_sink,
        call.angles,
        call.sink_angles,
        call.positions,
        newest,
        call.held,
        (
            _row_stride(call.positions),
            0 if newest is None else _row_stride(newest),
            _row_stride(call.held),
            0 if angles is None or angles[0].shape[0] == 1 else T,
        ),
        (call.k_cache, call.v_cache),
        scales,
        before,
        tuple((0, 0) if x is None else x.stride()[:2] for x in (call.k_cache, scales[0], before[0])),
        T,
        queries,
        K,
        R,
        D,
        call.sink_tokens,
        ring,
        call.held.shape[1] - 1,
        BLOCK=block,
        PAD=triton.next_power_of_2(D),
        INTERLEAVED=call.interleaved,
        EPS=float(eps),
        LEAST=least,
        MOST=most,
        PDL=pdl,
        launch_pdl=pdl,
    )
    return q if call.angles is None else q_out, q_sink


def _row_stride(tensor: Tensor) -> int:
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)
