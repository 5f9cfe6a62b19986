"""Rows of packed weights times few tokens, in Gluon: the weights go straight to the tensor cores' registers.

One `mma` multiplies 16 rows of weights with 8 columns of tokens. Which 16 of a row's values it sums is free as long as
both sides agree, so each thread takes what 16 bytes hold: one block of 32 values in each of two rows, with the scale
of each. Lane 4 g + t thus loads block t of rows g and holds, of the sums, columns 2 t and 2 t + 1 of rows g: `c0` and
`c1` of the first eight rows (upper), `c2` and `c3` of the last (lower). Warps share the blocks of a row.

What these kernels wait for, beside memory, is the unpacking. A number of four bits becomes a bf16 by two masks and a
multiplication; the bf16 is the number times 2^-126, so one more product, with the block's scale and 2^62, leaves it
times 2^-64, and the sums are multiplied by 2^64. This holds scale bytes to 192 (weights to 2^67), and weights below
2^-62 lose digits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

ROWS = gl.constexpr(8)  # of weights, of each of the two halves of an `mma`
WORDS = gl.constexpr(4)  # of eight values, in a block
ONCE = gl.constexpr(".cg")  # weights are used once: they must not push tokens out of the first cache
GROWN = gl.constexpr(2.0**64)  # see above


def _unpack(word: str, scale: str, to: str) -> str:
    """PTX: eight numbers of four bits to the pairs (0, 4), (1, 5), (2, 6) and (3, 7) of bf16; see `mxfp4.UNPACK`."""
    lines = [f"shr.u32 u, {word}, 8;"]
    for pair, (source, mask, factor) in enumerate(
        [(word, "0x000F000F", 4160), (word, "0x00F000F0", 260), ("u", "0x000F000F", 4160), ("u", "0x00F000F0", 260)]
    ):
        name = f"{to}{pair}"
        lines += [
            f"and.b32 {name}, {source}, {mask};",
            f"mul.lo.u32 {name}, {name}, {factor};",
            f"and.b32 {name}, {name}, 0x81C081C0;",
            f"fma.rn.bf16x2 {name}, {name}, {scale}, none;",
        ]
    return "\n".join(lines)


def _mma(c: list[str], a: list[str], b: list[str]) -> str:
    return (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {s0, s1, s2, s3}, "
        f"{{{', '.join(a)}}}, {{{', '.join(b)}}}, {{{', '.join(c)}}};"
    )


# $0 .. $3: the sums after; $4, $5: a word of the upper and of the lower rows; $6, $7: their scales, twice in 32 bits;
# $8 .. $11: tokens, in pairs as of the weights; $12 .. $15: the sums before.
MULTIPLY = gl.constexpr(
    "\n".join(
        [
            "{",
            ".reg .b32 u, none, p0, p1, p2, p3, q0, q1, q2, q3;",
            ".reg .f32 s0, s1, s2, s3;",
            "mov.b32 none, 0x80008000;",
            _unpack("$4", "$6", "p"),
            _unpack("$5", "$7", "q"),
            _mma(["$12", "$13", "$14", "$15"], ["p0", "q0", "p1", "q1"], ["$8", "$9"]),
            _mma(["s0", "s1", "s2", "s3"], ["p2", "q2", "p3", "q3"], ["$10", "$11"]),
            *(f"mov.f32 ${i}, s{i};" for i in range(4)),
            "}",
        ]
    )
)


@gluon.jit
def _pairs(first, second, SELECT: gl.constexpr):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, " + SELECT + ";", "=r,r,r", [first, second], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _load(at, shift, block, first: gl.constexpr, BLOCKS: gl.constexpr, CACHE: gl.constexpr):
    """What lies `shift` behind `at`; nothing where the blocks, `first` behind `block`, are beyond those of a row."""
    if first + block.shape[1] <= BLOCKS:
        values = gl.load(at + shift, cache_modifier=CACHE)
    else:
        values = gl.load(at + shift, mask=block < BLOCKS - first, other=0, cache_modifier=CACHE)
    return values


@gluon.jit
def _tokens(
    x,
    row,
    first: gl.constexpr,
    BLOCKS: gl.constexpr,
    L: gl.constexpr,
    X: gl.constexpr,
    WARPS: gl.constexpr,
    PAIRED: gl.constexpr,
):
    """Blocks of 32 values of rows of bf16 (given as words of 32 bits): the four pairs of each eight values.

    PAIRED: the values lie in the order of pairs already.
    """
    block = gl.arange(0, 4 * WARPS, gl.SliceLayout(1, gl.SliceLayout(0, X)))[:, None][None, :, :]
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(0, X)))[None, :][None, :, :]
    at = x + (row[:, None][:, :, None] * (16 * BLOCKS) + block * 16 + column)
    values = _load(at, first * 16, block, first, BLOCKS, "")
    even, odd = gl.split(gl.reshape(values, [ROWS, 4 * WARPS, WORDS, 2, 2]))
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    w0, w1 = gl.convert_layout(w0, L, assert_trivial=True), gl.convert_layout(w1, L, assert_trivial=True)
    w2, w3 = gl.convert_layout(w2, L, assert_trivial=True), gl.convert_layout(w3, L, assert_trivial=True)
    if PAIRED:
        pairs = (w0, w1, w2, w3)
    else:
        pairs = (
            _pairs(w0, w2, "0x5410"),
            _pairs(w0, w2, "0x7632"),
            _pairs(w1, w3, "0x5410"),
            _pairs(w1, w3, "0x7632"),
        )
    return pairs


@gluon.jit
def _weights(words, scales, row, first: gl.constexpr, BLOCKS: gl.constexpr, L: gl.constexpr, WARPS: gl.constexpr):
    """Blocks of rows: their words and their scale bytes."""
    block = gl.arange(0, 4 * WARPS, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :]
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(0, L)))[None, :][None, :, :]
    at = row[:, None] * BLOCKS + block
    values = _load(words + (at[:, :, None] * WORDS + word), first * WORDS, block[:, :, None], first, BLOCKS, ONCE)
    return values, _load(scales + at, first, block, first, BLOCKS, "")


@gluon.jit
def _factor(scale, like):
    """2^62 times what scale bytes stand for, as two bf16 in 32 bits, for each word of their blocks."""
    bits = (gl.minimum(scale.to(gl.int32), 192) + 62) << 7
    bits = gl.where(scale == 255, 0x7FC0, bits)
    return gl.broadcast((bits * 0x10001)[:, :, None], like)[0]


@gluon.jit
def _multiply(sums, first, second, tokens):
    """The sums of two groups of rows, after this step."""
    w, w_scale = first
    v, v_scale = second
    x0, x1, x2, x3 = tokens
    c0, c1, c2, c3 = sums
    return gl.inline_asm_elementwise(
        MULTIPLY,
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f",
        [w, v, _factor(w_scale, w), _factor(v_scale, v), x0, x1, x2, x3, c0, c1, c2, c3],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def append(values, value):
    return values + (value,)  # noqa: RUF005 (the compiler knows no other way)


@gluon.jit
def zeros(L: gl.constexpr, WARPS: gl.constexpr):
    return gl.zeros([ROWS, 4 * WARPS, WORDS], gl.float32, L)


@gluon.jit
def sums(
    x, source, words, scales, rows, L: gl.constexpr, GROUPS: gl.constexpr, PAIRED: gl.constexpr,
    BLOCKS: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """Each thread's part of the sums of GROUPS times sixteen rows of weights with the eight rows `source` of x.

    rows: the upper and the lower eight rows of each group. AHEAD: loads that are under way before the first is used.
    WAIT: x is ready once the kernel before this one has ended.
    """
    X: gl.constexpr = gl.BlockedLayout([1, 1, 16], [8, 4, 1], [1, WARPS, 1], [2, 1, 0])
    STEPS: gl.constexpr = (BLOCKS + 4 * WARPS - 1) // (4 * WARPS)
    parts, ahead = (), ()
    for _ in gl.static_range(GROUPS):
        parts = append(parts, (zeros(L, WARPS), zeros(L, WARPS), zeros(L, WARPS), zeros(L, WARPS)))
    for i in gl.static_range(min(AHEAD, STEPS * GROUPS)):
        for half in gl.static_range(2):
            line = rows[i % GROUPS * 2 + half]
            ahead = append(ahead, _weights(words, scales, line, i // GROUPS * 4 * WARPS, BLOCKS, L, WARPS))
    if WAIT:
        gdc_wait()
    gl.thread_barrier()  # which loads are not moved across: all these are under way before one is waited for
    for i in gl.static_range(STEPS * GROUPS):
        if i % GROUPS == 0:
            tokens = _tokens(x, source, i // GROUPS * 4 * WARPS, BLOCKS, L, X, WARPS, PAIRED)
        parts = append(parts, _multiply(parts[i], ahead[2 * i], ahead[2 * i + 1], tokens))
        if i + AHEAD < STEPS * GROUPS:
            for half in gl.static_range(2):
                line = rows[(i + AHEAD) % GROUPS * 2 + half]
                ahead = append(
                    ahead, _weights(words, scales, line, (i + AHEAD) // GROUPS * 4 * WARPS, BLOCKS, L, WARPS)
                )
    last = ()
    for i in gl.static_range(GROUPS):
        last = append(last, parts[STEPS * GROUPS + i])
    return last


@gluon.jit
def columns(sums, Y: gl.constexpr, WARPS: gl.constexpr):
    """`[rows, columns]` of the upper and of the lower rows: sums over words, and over the warps that share a row."""
    upper = gl.join(gl.sum(sums[0], 2), gl.sum(sums[1], 2))
    lower = gl.join(gl.sum(sums[2], 2), gl.sum(sums[3], 2))
    parts = gl.reshape(gl.join(upper, lower), [ROWS, WARPS, 4, 2, 2])
    upper, lower = gl.split(gl.sum(parts, 1))  # each [rows, t, 2]
    upper = gl.convert_layout(gl.reshape(upper, [ROWS, ROWS]), Y)
    lower = gl.convert_layout(gl.reshape(lower, [ROWS, ROWS]), Y)
    return upper * GROWN, lower * GROWN
