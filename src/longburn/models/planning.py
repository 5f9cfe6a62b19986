"""How much memory a model needs: weights, caches and activations in bytes, from its sizes alone.

B rows, C positions (context), T tokens of a prefill chunk; the other letters as everywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from longburn.cache import AttnWindow
from longburn.models.gpt_oss import GptOssConfig
from longburn.models.llama import LlamaConfig
from longburn.nn import ExpertStorage

MXFP4_BLOCK, MXFP4_BYTES = 32, 17  # values, and bytes with their scale
WIDE = 4  # bytes of a sum, and of a position's cosine


@dataclass(frozen=True)
class Sizes:
    """What memory depends on. `experts` 0 is a dense feed-forward; `windows` has one entry a layer."""

    vocabulary: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    windows: tuple[AttnWindow, ...]
    experts: int = 0
    chosen: int = 0
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    learned_sinks: bool = False
    qk_norm: bool = False

    @classmethod
    def of(cls, config: LlamaConfig | GptOssConfig, window: AttnWindow | None = None) -> "Sizes":
        """Of a model's configuration; `window` is for the layers that see all keys as they were trained."""
        full, layers = window or AttnWindow(), config.num_hidden_layers
        moe = isinstance(config, GptOssConfig)
        return cls(
            vocabulary=config.vocab_size,
            dim=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            hidden=config.intermediate_size,
            windows=config.policy(full).windows(layers) if isinstance(config, GptOssConfig) else (full,) * layers,
            experts=config.num_experts if isinstance(config, GptOssConfig) else 0,
            chosen=config.experts_per_token if isinstance(config, GptOssConfig) else 0,
            tied=False if isinstance(config, GptOssConfig) else config.tie_word_embeddings,
            attention_bias=moe or (isinstance(config, LlamaConfig) and config.attention_bias),
            mlp_bias=moe or (isinstance(config, LlamaConfig) and config.mlp_bias),
            learned_sinks=moe,
            qk_norm=isinstance(config, LlamaConfig) and config.qk_norm,
        )

    @property
    def layers(self) -> int:
        """L."""
        return len(self.windows)


@dataclass(frozen=True)
class Plan:
    """Bytes by what they are for. `caches` is keyed by the kind of layer and holds (layers, bytes of all of them)."""

    weights: Mapping[str, int]
    caches: Mapping[str, tuple[int, int]]
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.weights.values()) + sum(size for _, size in self.caches.values()) + self.activations


def plan_memory(
    sizes: Sizes,
    context: int,
    batch: int = 1,
    *,
    itemsize: int = 2,
    experts: ExpertStorage = "mxfp4",
    chunk: int = 1024,
) -> Plan:
    """The memory of a model that holds `context` positions of `batch` rows and reads prompts `chunk` tokens at a time.

    Args:
        itemsize: bytes of a number of the weights (experts in MXFP4 aside), the cache and the activations.
        experts: how a mixture's expert weights are held.
    """
    caches: dict[str, tuple[int, int]] = {}
    for window in sizes.windows:
        kind = "full" if window.size is None else f"window {window.size}"
        kind += f" + {window.sink_tokens} sink tokens" * bool(window.sink_tokens and window.size)
        layers, size = caches.get(kind, (0, 0))
        caches[kind] = layers + 1, size + cache_bytes(sizes, window, context, batch, itemsize)
    weights = weight_bytes(sizes, itemsize, experts)
    return Plan(weights, caches, activation_bytes(sizes, min(chunk, context), batch, itemsize, experts))


def weight_bytes(sizes: Sizes, itemsize: int, experts: ExpertStorage = "mxfp4") -> dict[str, int]:
    """Embedding and head, attention, feed-forward (or router and experts) and norms of all layers."""
    M, D, q, kv = sizes.dim, sizes.head_dim, sizes.heads, sizes.kv_heads
    L, E, hidden = sizes.layers, sizes.experts, sizes.hidden
    attention = (q + 2 * kv) * D * M + q * D * M + q * sizes.learned_sinks
    attention += ((q + 2 * kv) * D + M) * sizes.attention_bias
    bytes_of = {
        "embedding and head": sizes.vocabulary * M * (1 if sizes.tied else 2) * itemsize,
        "attention": L * attention * itemsize,
        "norms": ((2 * L + 1) * M + 2 * L * D * sizes.qk_norm) * itemsize,
    }
    matrices, biases = 3 * hidden * M, (2 * hidden + M) * sizes.mlp_bias
    if not E:
        return bytes_of | {"feed-forward": L * (matrices + biases) * itemsize}
    packed = experts == "mxfp4"
    values = matrices // MXFP4_BLOCK * MXFP4_BYTES if packed else matrices * itemsize
    name = "experts, MXFP4" if packed else "experts, dense"
    return bytes_of | {name: L * E * (values + biases * itemsize), "routers": L * E * (M + 1) * itemsize}


def cache_slots(window: AttnWindow, context: int) -> int:
    """Positions that a layer holds: all, or the window and kept sink tokens."""
    return context if window.size is None else min(window.size + window.sink_tokens, context)


def cache_bytes(sizes: Sizes, window: AttnWindow, context: int, batch: int, itemsize: int) -> int:
    """Keys, values and positions of one layer, made by `init_cache(batch, max_length=context)`.

    One slot more than positions takes what is not a token. A cache without `max_length` grows by a quarter at a time,
    and for a moment holds the old buffer beside the new one.
    """
    slots = cache_slots(window, context) + 1
    return 2 * batch * sizes.kv_heads * slots * sizes.head_dim * itemsize + 8 * slots


def activation_bytes(sizes: Sizes, chunk: int, batch: int, itemsize: int, experts: ExpertStorage = "mxfp4") -> int:
    """At most what a forward of a chunk holds beside weights and caches: the largest of attention, feed-forward, head.

    Tokens of a chunk that choose one expert may be all of them. An expert in MXFP4 is unpacked while it is used.
    """
    tokens, M, D = batch * chunk, sizes.dim, sizes.head_dim
    q, qkv = sizes.heads * D, (sizes.heads + 2 * sizes.kv_heads) * D
    stream = tokens * (2 * M * itemsize + M * WIDE)  # x, its norm, and the norm's sums
    # Projected, rotated in fp32 and rounded; the output in parts (past, present, sinks) and merged.
    attention = tokens * (2 * qkv * itemsize + 2 * qkv * WIDE + 2 * q * itemsize + 3 * q * WIDE)
    sliding = [cache_slots(w, w.size) for w in sizes.windows if w.size is not None]
    attention += 2 * batch * (max(sliding, default=0) + chunk) * sizes.kv_heads * D * itemsize  # old keys beside new
    if sizes.experts:
        up = tokens * sizes.hidden * (2 * itemsize + 2 * WIDE + 4 * WIDE + itemsize)  # both halves, widened, clamped
        feed_forward = up + tokens * (3 * M * WIDE + 2 * M * itemsize)  # old and new sum, what is added
        feed_forward += 2 * sizes.hidden * M * itemsize if experts == "mxfp4" else 0
    else:
        feed_forward = tokens * (4 * sizes.hidden + M) * itemsize
    head = 2 * batch * sizes.vocabulary * WIDE
    return stream + max(attention, feed_forward, head)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 1 .. most that fits, where less fits if more does; 0 if none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
