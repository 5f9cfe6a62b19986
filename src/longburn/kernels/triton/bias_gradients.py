"""Gradients of the terms of a bias that stand for many pairs: a table by distance, and a number a pair."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longburn.kernels.attend.call import AttendCall
from longburn.kernels.triton import ranges
from longburn.kernels.triton.pairs import UNSPECIALISED, keys_at, matrix, pairs, queries_at, query_tile
from longburn.kernels.triton.ranges import NUMBERS
from longburn.kernels.triton.tiles import sees_pairs

BINS = 128  # entries of a table that one program adds up


@triton.jit
def _gradients(
    given, queries, keys, b, h, first, column, G: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The gradients of the scores of one tile of pairs, `[BT, BN]`, 0 where nothing is seen."""
    heads, head_strides, numbers, main, row, row_strides, H, T, scale, per_pair = given
    k, v, k_strides, v_strides = main
    k += b * k_strides[0] + (h // G) * k_strides[1]
    v += b * v_strides[0] + (h // G) * v_strides[1]
    mine = query_tile(
        heads[0], heads[1], heads[2], head_strides, numbers, row, row_strides, b, h, H, T, first, queries[0],
        queries[1], D, BT, BD, True,
    )  # fmt: skip
    k_here = matrix(k, k_strides[2], column, keys[1], D, BN, BD, True)
    v_here = matrix(v, v_strides[2], column, keys[1], D, BN, BD, True)
    _, ds = pairs(mine, k_here, v_here, queries, keys, b, h, scale, per_pair, WINDOWED, True, False)
    return ds


@triton.jit
def _seen(queries, keys, WINDOWED: tl.constexpr):
    return sees_pairs(keys[2][None, :], keys[3][None, :], queries[3][:, None], queries[4][:, None], WINDOWED)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _table(
    heads, head_strides, numbers, main, q_pos, q_pos_stride, newest, newest_stride, codes, codes_stride, ranges,
    ranges_stride, slope, row, row_strides, bias, bias_strides, zero, entries, dtable, T, S0, S, window, sink_tokens,
    lookahead, scale, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """dtable [B, H, tiles of BT queries, entries]: each entry's sum over the pairs at its distance."""
    tiles = tl.cdiv(T, BT)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    entry0 = tl.program_id(1) * BINS
    t = tile * BT + tl.arange(0, BT)
    q_pos += b * q_pos_stride
    codes += b * codes_stride
    base = tl.load(newest + b * newest_stride)
    queries = queries_at(q_pos, t, T, base, window, lookahead, BLOCK, BOUNDED)
    per_pair = (heads[1], slope, row, bias, bias_strides, zero, entries)
    given = (heads, head_strides, numbers, main, row, row_strides, H, T, scale, per_pair)
    bins = entry0 + tl.arange(0, BINS)
    sums = tl.zeros((BINS,), tl.float32)
    at = ranges + b * ranges_stride + tile * NUMBERS
    kept, low, high = tl.load(at), tl.load(at + 1), tl.load(at + 4)
    for i in range(0, kept + high - low):
        column = tl.where(i < kept, i, i - kept + low) * BN
        keys = keys_at(codes, column + tl.arange(0, BN), S)
        entry = tl.minimum(tl.maximum(queries[2][:, None] - keys[2][None, :] + zero, 0), entries - 1)
        mine = _seen(queries, keys, WINDOWED) & (entry >= entry0) & (entry < entry0 + BINS)
        first = tl.min(tl.min(tl.where(mine, entry, entry0 + BINS), 1), 0)
        last = tl.max(tl.max(tl.where(mine, entry, entry0 - 1), 1), 0)
        if first <= last:
            ds = _gradients(given, queries, keys, b, h, tile * BT, column, G, D, BT, BN, BD, WINDOWED)
            for one in range(first, last + 1):
                total = tl.sum(tl.sum(tl.where(entry == one, ds, 0.0), 1), 0)
                sums += tl.where(bins == one, total, 0.0)
    tl.store(dtable + ((b * H + h) * tiles + tile) * entries + bins, sums, mask=bins < entries)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _dense(
    heads, head_strides, numbers, main, q_pos, q_pos_stride, newest, newest_stride, codes, codes_stride, slope, row,
    row_strides, bias, bias_strides, zero, entries, ddense, batches, heads_each, T, S0, S, window, sink_tokens,
    lookahead, scale, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One tile of ddense [B|1, H|1, T, S]: the sum over the batch rows and the heads that share it."""
    shared_heads = H // heads_each
    b0, h0 = tl.program_id(2) // shared_heads * batches, tl.program_id(2) % shared_heads * heads_each
    first, column = tl.program_id(1) * BT, tl.program_id(0) * BN
    t = first + tl.arange(0, BT)
    per_pair = (heads[1], slope, row, bias, bias_strides, zero, entries)
    given = (heads, head_strides, numbers, main, row, row_strides, H, T, scale, per_pair)
    total = tl.zeros((BT, BN), tl.float32)
    for i in range(0, batches * heads_each):
        b, h = (b0 + i // heads_each).to(tl.int64), (h0 + i % heads_each).to(tl.int64)
        positions = q_pos + b * q_pos_stride
        base = tl.load(newest + b * newest_stride)
        queries = queries_at(positions, t, T, base, window, lookahead, BLOCK, BOUNDED)
        keys = keys_at(codes + b * codes_stride, column + tl.arange(0, BN), S)
        if tl.max(tl.max(_seen(queries, keys, WINDOWED).to(tl.int32), 1), 0) > 0:
            total += _gradients(given, queries, keys, b, h, first, column, G, D, BT, BN, BD, WINDOWED)
    columns = column + tl.arange(0, BN)
    at = (tl.program_id(2).to(tl.int64) * T + t)[:, None] * S + columns[None, :]
    tl.store(ddense + at, total.to(ddense.dtype.element_ty), mask=(t < T)[:, None] & (columns < S)[None, :])


def of_table(call: AttendCall, table: Tensor, shared: dict[str, Any]) -> Tensor:
    """The gradient of a table [H|1, n]."""
    B, H, T, _ = call.q.shape
    tile = _tile(call)
    tiles, entries = triton.cdiv(T, tile["BT"]), table.shape[1]
    visits = ranges.of_queries(call, tile["BT"], tile["BN"])
    parts = torch.empty(B, H, tiles, entries, device=call.q.device)
    _table[(B * H * tiles, triton.cdiv(entries, BINS))](
        **shared, **tile, ranges=visits, ranges_stride=ranges.stride(visits), dtable=parts, BINS=BINS
    )
    return parts.sum((0, 2)).sum_to_size(table.shape).to(table.dtype)


def of_dense(call: AttendCall, dense: Tensor, shared: dict[str, Any]) -> Tensor:
    """The gradient of a dense bias [B|1, H|1, T, S]."""
    B, H, T, _ = call.q.shape
    S = call.k.shape[2]
    tile = _tile(call)
    found = torch.empty(dense.shape, dtype=dense.dtype, device=dense.device)
    grid = (triton.cdiv(S, tile["BN"]), triton.cdiv(T, tile["BT"]), dense.shape[0] * dense.shape[1])
    _dense[grid](**shared, **tile, ddense=found, batches=B // dense.shape[0], heads_each=H // dense.shape[1])
    return found


def _tile(call: AttendCall) -> dict[str, int]:
    D = call.q.shape[3]
    small = call.q.dtype == torch.float32 or D > 64
    return {"BT": 32 if small else 64, "BN": 32 if small else 64, "num_warps": 4 if D <= 128 else 8, "num_stages": 1}
