"""Attention of a few queries over many keys: the keys are split among blocks, and the last block to finish merges.

All queries that read one kv head (its group's heads times T) are rows of one tile, so that a key is read once. Within a
block every warp keeps a softmax of its own over its own keys: they are the batch of a batched product, and nothing is
exchanged before the end.
"""

from functools import cache

import torch
from torch import Tensor

from longburn.kernels.attend.call import AttendCall, AttendResult, BiasTerms, later_keys
from longburn.kernels.triton.arguments import FARTHEST, ordered
from longburn.kernels.triton.decode_kernel import decode_kernel
from longburn.kernels.triton.launch import launch

MAX_QUERIES = 16  # T
MAX_HEAD = 256
MAX_SPLITS = 128
ROUNDS = 8  # of one block on every multiprocessor, where fewer leave many of them idle
LEAST_KEYS = 128  # of a split
SCAN_FROM = 8  # times the window: from here on the positions are read first, to see which tiles to read
FEW_KEYS = 16  # slots of a cache: one tile of one warp, of which a multiprocessor runs many at once
ALIGNED = 16  # slots: a cut there leaves keys, positions and biases as aligned as they were
MERGED = 16384  # elements of partial results that a block loads at once
NO_BIAS = BiasTerms()


def decode_why_not(call: AttendCall) -> str | None:
    """Why this kernel cannot compute the call: it takes few queries, and no gradients."""
    q, k, v = call.q, call.k, call.v
    if q.shape[2] > MAX_QUERIES:
        return f"takes up to {MAX_QUERIES} queries, got {q.shape[2]}"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bf16, fp16 and fp32, got {q.dtype}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD:
        return f"takes head sizes up to {MAX_HEAD}, got {q.shape[3]} and {v.shape[3]}"
    parts = (q, k, v, call.q_sink, *(call.before or ()))
    if any(x is not None and x.stride(3) != 1 for x in parts):
        return "queries, keys or values have gaps within a head"
    if call.k_pos.stride(1) != 1 or any(x.stride(2) != 1 for x in call.scales or ()):
        return "positions or scales have gaps between slots"
    return "has no gradients" if call.needs_grad else None


def decode(call: AttendCall) -> AttendResult:
    """Output `[B, H, T, D]` in the type of q and log-sum-exp `[B, H, T]` in fp32; one launch, no wait for the device.

    It does not overlap with the kernels around it: while they still hold some of the multiprocessors, its blocks, one
    for each, would gather on the others.

    How the keys are cut depends on B, K and H * T, on whether the cache has room for more than a few, and on the row's
    own positions: beside other rows, a row's bits depend on their number B alone (and, where a cache grows, on how far
    it has grown for them); with `torch.use_deterministic_algorithms(True)` not on that either.
    """
    call = _nearest(call)
    q, k, v, bias = call.q, call.k, call.v, call.bias or NO_BIAS
    B, H, T, D = q.shape
    K, S, DV = k.shape[1], k.shape[2], v.shape[3]
    G = H // K
    k_before, v_before = call.before or (None, None)
    k_scale, v_scale = call.scales or (None, None)
    S0 = 0 if k_before is None else k_before.shape[2]
    block_d, block_dv = _power_of_two(D), _power_of_two(DV)
    exact = q.dtype == torch.float32
    rows = 32 if G * T > 16 and block_d <= 128 and block_dv <= 128 and not exact else 16
    ways, keys, least, warps, stages = _tiles(rows, block_d, exact, _is_small(k, S0))
    tile = ways * keys
    heads = K * -(-G * T // rows)
    limit = _most_splits(
        heads if torch.are_deterministic_algorithms_enabled() else B * heads, k.element_size(), q.device
    )
    splits = max(1, min(limit, (-(-S0 // tile) + -(-S // tile)) // least))
    out = torch.empty(B, T, H, DV, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    partial = counters = None
    if splits > 1:
        partial = torch.empty(B * heads * splits * rows * (block_dv + 2), dtype=torch.float32, device=q.device)
        counters = _counters(q.device, B * heads)
    window, lookahead = call.window, call.lookahead
    launch(
        decode_kernel,
        (splits, heads, B),
        (
            *(q, call.q_sink, k, v, k_scale, v_scale, k_before, v_before, call.q_pos, call.k_pos),
            *(call.sinks, bias.slope, bias.key, bias.row, bias.table, bias.dense, out, lse, partial, counters),
        ),
        (
            *(
                S,
                S0,
                H,
                G,
                T,
                limit,
                call.scale,
                min(window or 0, FARTHEST),
                call.sink_tokens,
                min(lookahead or 0, FARTHEST),
            ),
            *(bias.zero, 0 if bias.table is None else bias.table.shape[1]),
            *_bias_strides(bias),
        ),
        (
            *(q.stride()[:3], _strides(call.q_sink, 3), k.stride()[:3], v.stride()[:3]),
            *(_strides(k_scale, 2), _strides(v_scale, 2), _strides(k_before, 3), _strides(v_before, 3)),
            *((_step(call.q_pos, 0), call.q_pos.stride(1)), (_step(call.k_pos, 0),)),
            *(D, DV, block_d, block_dv, rows, ways, keys, call.block, window is not None, lookahead is not None),
            call.ascending,
            bias.key is not None and bias.key.shape[1] > 1,
            window is not None and SCAN_FROM * (window + call.sink_tokens + T + tile) < S,
            *(least, max(1, MERGED // (rows * block_dv))),
        ),
        num_warps=warps,
        num_stages=stages,
    )
    return out.transpose(1, 2), lse


def _nearest(call: AttendCall) -> AttendCall:
    """The call without the keys before its window, where the host knows their places.

    A cache's slots are not cut: a recorded step, of which the host knows nothing, must give the same bits.
    """
    known = ordered(call)
    if known is None or call.ascending or call.window is None or call.sink_tokens or call.before is not None:
        return call
    first = known.q_start - call.window + 1 + known.head - known.k_start
    first = min(first, call.k.shape[2] - 1) // ALIGNED * ALIGNED
    return later_keys(call, first) if first > 0 else call


def _bias_strides(bias: BiasTerms) -> tuple[int, ...]:
    """Of key [B|1, H|1, S], row [B|1, H|1, T], table [H|1, n] and dense [B|1, H|1, T, S]."""
    if bias is NO_BIAS:
        return (0,) * 11
    key, row, table, dense = bias.key, bias.row, bias.table, bias.dense
    return (
        *((0, 0, 0) if key is None else (_step(key, 0), _step(key, 1), key.stride(2))),
        *((0, 0, 0) if row is None else (_step(row, 0), _step(row, 1), row.stride(2))),
        0 if table is None else _step(table, 0),
        *((0, 0, 0, 0) if dense is None else (_step(dense, 0), _step(dense, 1), *dense.stride()[2:])),
    )


def _power_of_two(size: int) -> int:
    """The least one that holds this many and that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def _strides(x: Tensor | None, n: int) -> tuple[int, ...] | None:
    return None if x is None else x.stride()[:n]


def _step(x: Tensor, dim: int) -> int:
    """The stride of a dimension that may stand for many."""
    return 0 if x.shape[dim] == 1 else x.stride(dim)


def _is_small(k: Tensor, before: int) -> bool:
    """Whether keys lie in a buffer without room for many, filled or not: so a recorded step chooses as others do.

    Not in deterministic mode: a cache's size may come from the longest row.
    """
    room = k.stride(1) // max(k.stride(2), 1)  # a buffer's slots, and one for what is written nowhere
    is_buffer = k.shape[2] <= room
    return is_buffer and before + room <= FEW_KEYS + 1 and not torch.are_deterministic_algorithms_enabled()


@cache
def _tiles(rows: int, block_d: int, exact: bool, few: bool) -> tuple[int, int, int, int, int]:
    """Softmaxes in a block (W), keys of each in a step (N), tiles of a split (at least), warps, and tiles in flight.

    With several softmaxes, half of the tiles in flight are positions, by which values are masked on their way.
    """
    if few:
        return 1, FEW_KEYS, 2, 1 if block_d <= 128 and not exact else 4, 1
    if exact:  # products in true fp32 are no work for tensor cores: all warps share one small tile
        return 1, 16, LEAST_KEYS // 16, 8, 1 if block_d > 128 else 2
    if block_d > 128:  # a softmax of a warp's own would not fit its registers
        return 1, 32, LEAST_KEYS // 32, 4, 3
    return 4, 32, LEAST_KEYS // 128, 4, 6 if rows * block_d <= 2048 else 3


@cache
def _most_splits(units: int, itemsize: int, device: torch.device) -> int:
    """Splits that give every multiprocessor one block, and few of them idle in the last round.

    fp8 wants two: converting it takes longer than reading it. Between one block and three there is a loss, because some
    multiprocessors have two and others one.
    """
    cuda = device.type == "cuda"
    sms = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 132
    places = 2 * sms if itemsize == 1 else sms

    def idle(splits: int) -> float:
        rounds = -(-units * splits // places)
        return 1 - units * splits / (rounds * places)

    fewest = min(MAX_SPLITS, places // units if units <= sms else 2)
    most = max(fewest, min(MAX_SPLITS, ROUNDS * places // units))
    return next((n for n in range(fewest, most + 1) if idle(n) < 0.1), min(range(fewest, most + 1), key=idle))


_held: dict[tuple[torch.device, int], Tensor] = {}
_outgrown: list[Tensor] = []  # recorded graphs may still count in them


def _counters(device: torch.device, n: int) -> Tensor:
    """Zeros, which every call leaves as zeros; calls on one stream run one after the other and share them."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _held.get((device, stream))
    if held is not None and held.numel() >= n:
        return held
    fresh = torch.zeros(max(n, 4096), dtype=torch.int32, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return fresh  # the graph's own memory, cleared by every replay
    if held is not None:
        _outgrown.append(held)
    _held[device, stream] = fresh
    return fresh
