"""What the parts of the kernel for Hopper share: the law in tiles, and rings of tiles in shared memory.

Queries and keys are counted in slots: the query in column t stands at slot `first + t`, where its own key would be. It
sees the slots up to its `last`, and of these those from its `begin` on and those below `kept`. The first slots may lie
in another tensor; tiles start at both tensors' border, so that each lies in one, and the very first at slot `-pad`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

GROUPS = gl.constexpr(2)  # of four warps that multiply
ROWS = gl.constexpr(64)  # queries of a group: the height of one instruction of the tensor cores
TILE = gl.constexpr(128)  # keys


@aggregate
class Law:
    """Which tiles of queries there are, which tiles of keys each visits, and which slots each query sees."""

    T: gl.tensor
    keys: gl.tensor
    first: gl.tensor
    rest: gl.tensor  # of the position of the first query, divided by BLOCK
    lookahead: gl.tensor
    window: gl.tensor
    kept: gl.tensor
    border: gl.tensor  # how many of the first slots lie in another tensor
    H: gl.tensor
    G: gl.tensor
    pairs: gl.tensor  # of batch row and head
    BLOCK: gl.constexpr
    BOUNDED: gl.constexpr
    WINDOWED: gl.constexpr
    SPLIT: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, T, keys, first, rest, lookahead, window, kept, border, H, G, pairs, BLOCK, BOUNDED, WINDOWED, SPLIT
    ):
        self.T, self.keys, self.first, self.rest = T, keys, first, rest
        self.lookahead, self.window = lookahead, window
        self.kept, self.border = kept, border
        self.H, self.G, self.pairs = H, G, pairs
        self.BLOCK = gl.constexpr(BLOCK)
        self.BOUNDED, self.WINDOWED, self.SPLIT = gl.constexpr(BOUNDED), gl.constexpr(WINDOWED), gl.constexpr(SPLIT)

    @gluon.jit
    def tiles(self):
        return gl.cdiv(self.T, GROUPS * ROWS)

    @gluon.jit
    def rounds(self):
        return gl.cdiv(self.tiles() * self.pairs, gl.num_programs(0))

    @gluon.jit
    def work(self, turn):
        """A block's tile in this round (-1: none is left), row of the batch and head.

        Blocks take turns in being first, so that all get as many long tiles.
        """
        blocks = gl.num_programs(0)
        index = turn * blocks + gl.where(turn % 2 == 0, gl.program_id(0), blocks - 1 - gl.program_id(0))
        pair = index % self.pairs
        return self.tiles() - 1 - index // self.pairs, pair // self.H, pair % self.H

    @gluon.jit
    def last(self, t):
        """The last slot that queries in these columns see."""
        last = t * 0 + (self.keys - 1)
        if self.BOUNDED:
            near = t + self.first + self.lookahead
            if self.BLOCK > 1:
                near = gl.maximum(near, t + self.first - (t + self.rest) % self.BLOCK + (self.BLOCK - 1))
            last = gl.minimum(last, near)
        return last

    @gluon.jit
    def begin(self, t):
        """The first slot within the windows of queries in these columns."""
        begin = t * 0
        if self.WINDOWED:
            begin = gl.maximum(t + self.first - self.window + 1, 0)
        return begin

    @gluon.jit
    def pad(self):
        """How far before the first slot its tile starts."""
        return (TILE - self.border % TILE) % TILE

    @gluon.jit
    def tiles_below(self, slot):
        """How many tiles start below this slot."""
        return gl.cdiv(slot + self.pad(), TILE)

    @gluon.jit
    def tiles_within(self, slot):
        """How many tiles lie entirely below this slot."""
        return (slot + self.pad()) // TILE

    @gluon.jit
    def visits(self, tile):
        """How many tiles of keys a tile of queries visits near itself, the last of them, and how many of kept keys."""
        start = tile * (GROUPS * ROWS)
        end = gl.minimum(start + GROUPS * ROWS, self.T)
        high = gl.maximum(self.tiles_below(self.last(end - 1) + 1), 1)
        low = 0
        kept = 0
        if self.WINDOWED:
            low = gl.minimum(self.tiles_within(self.begin(start)), high - 1)
            kept = gl.minimum(gl.where(self.kept > 0, self.tiles_below(self.kept), 0), low)
        return high - low, high - 1, kept

    @gluon.jit
    def slot(self, i, near, top, kept):
        """The first slot of the i-th tile of keys: from the latest down, then the kept ones."""
        return gl.where(i < near, top - i, near + kept - 1 - i) * TILE - self.pad()


@aggregate
class Ring:
    """Tiles in shared memory, each with a barrier that says it is full and one that says all are done with it."""

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    done: gl.shared_memory_descriptor
    SIZE: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, tiles, full, done, SIZE):
        self.tiles, self.full, self.done, self.SIZE = tiles, full, done, gl.constexpr(SIZE)

    @gluon.jit
    def load(self, descriptor, at, i):
        """Load what is the i-th tile of all that go through this ring, once its place is free."""
        place = i % self.SIZE
        mbarrier.wait(self.done.index(place), (i // self.SIZE & 1) ^ 1)
        mbarrier.expect(self.full.index(place), descriptor.block_type.nbytes)
        tma.async_copy_global_to_shared(descriptor, at, self.full.index(place), self.tiles.index(place))

    @gluon.jit
    def wait(self, i, there):
        """Until the i-th tile is full, if there will be one."""
        mbarrier.wait(self.full.index(i % self.SIZE), i // self.SIZE & 1, pred=there)

    @gluon.jit
    def matrix(self, i):
        tile = self.tiles.index(i % self.SIZE)
        return tile.reshape([tile.shape[2], tile.shape[3]])

    @gluon.jit
    def give_back(self, i):
        mbarrier.arrive(self.done.index(i % self.SIZE), count=1)


@gluon.jit
def new_ring(descriptor, SIZE: gl.constexpr, READERS: gl.constexpr):
    shape: gl.constexpr = [SIZE] + descriptor.block_shape  # noqa: RUF005 - the device has no starred expressions
    tiles = gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)
    full = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SIZE):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(done.index(i), count=READERS)
    return Ring(tiles, full, done, SIZE)
