"""The caches against a dictionary: whatever is written, taken back and cleared, the right keys are there to be seen.

The model of a row is `{position: number}` of everything that was written and not taken back. Every key that is written
carries a number of its own, so a key at the wrong slot, a stale one or a lost one shows.
"""

import pytest
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from longburn import AttnWindow, CacheManager
from longburn.cache import KeyValues, Step, buffers
from longburn.cache.rolling import PAGE
from longburn.kernels.append import AppendCall, Rotated

KV_HEADS, HEAD_DIM = 2, 3
NAN = float("nan")


def visible(window: AttnWindow, p: int, j: int) -> bool:
    return j <= p and (window.size is None or p - j < window.size or j < window.sink_tokens)


class Caches(RuleBasedStateMachine):
    """Two layers, one windowed and one that sees everything, under one clock."""

    @initialize(
        batch=st.integers(1, 3),
        size=st.sampled_from([1, 2, 3, 5, 8]),
        sinks=st.sampled_from([0, 1, 3]),
        slack=st.sampled_from([0, 1, 4]),
        max_length=st.sampled_from([None, None, 40]),
    )
    def build(self, batch: int, size: int, sinks: int, slack: int, max_length: int | None) -> None:
        self.windows = (AttnWindow(size, sink_tokens=sinks), AttnWindow())
        self.batch, self.slack, self.max_length = batch, slack, max_length
        self.manager = CacheManager(
            batch,
            self.windows,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            max_length=max_length,
            slack=slack,
            dtype=torch.float64,
        )
        self.written: list[dict[int, int]] = [{} for _ in range(batch)]
        self.at = [0] * batch
        self.high = [0] * batch
        self.serial = 0

    # --- what can happen ---------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 13))
    def append(self, count: int) -> None:
        """The same number of tokens in every row."""
        self._forward([count] * self.batch, None, commit=True)

    @rule(data=st.data(), left=st.booleans())
    def append_ragged(self, data: st.DataObject, left: bool) -> None:
        """Rows of different lengths, padded on one side; some have no token at all."""
        counts = data.draw(st.lists(st.integers(0, 9), min_size=self.batch, max_size=self.batch), label="counts")
        self._forward(counts, left, commit=True)

    @rule(count=st.integers(1, 9), drafts=st.integers(1, 2), shorter=st.booleans())
    def rewrite(self, count: int, drafts: int, shorter: bool) -> None:
        """A block is drafted and not committed, then written again, whole or only its first tokens."""
        if self.slack < count - 1:  # a draft beyond the slack pushes out what its own rewrite would need
            count = self.slack + 1
        for _ in range(drafts):
            self._forward([count] * self.batch, None, commit=False)
        self._forward([max(1, count - 1) if shorter else count] * self.batch, None, commit=True)

    @rule(data=st.data(), together=st.booleans())
    def rewind(self, data: st.DataObject, together: bool) -> None:
        """Tokens are taken back within the slack, one number for all rows or one each."""
        most = [self.at[b] - self._earliest(b) for b in range(self.batch)]
        if together:
            tokens = data.draw(st.integers(0, max(0, min(most))), label="tokens")
            back, argument = [tokens] * self.batch, tokens
        else:
            back = argument = [data.draw(st.integers(0, max(0, n)), label="tokens") for n in most]
        self.manager.rewind(argument)
        for b, n in enumerate(back):
            self.at[b] -= n
            self.written[b] = {j: number for j, number in self.written[b].items() if j < self.at[b]}

    @precondition(lambda self: self.max_length is None)
    @rule(data=st.data())
    def rewind_too_far(self, data: st.DataObject) -> None:
        """Refused as a whole, with nothing changed in any row or layer."""
        row = data.draw(st.integers(0, self.batch - 1), label="row")
        assume(self._earliest(row) > 0)
        back = [0] * self.batch
        back[row] = self.at[row] - data.draw(st.integers(0, self._earliest(row) - 1), label="to")
        before = [cache.positions.clone() for cache in self.manager]
        with pytest.raises(
            ValueError, match=rf"row {row} back to position .* can go back to {self._earliest(row)} only"
        ):
            self.manager.rewind(back)
        assert all(torch.equal(a, cache.positions) for a, cache in zip(before, self.manager, strict=True))

    @rule(data=st.data())
    def reset_rows(self, data: st.DataObject) -> None:
        """Some rows begin anew while the others go on."""
        rows = data.draw(st.sets(st.integers(0, self.batch - 1)), label="rows")
        self.manager.reset(sorted(rows))
        for b in rows:
            self.at[b], self.high[b], self.written[b] = 0, 0, {}

    @rule()
    def reset_all(self) -> None:
        self.manager.reset()
        self.at, self.high, self.written = [0] * self.batch, [0] * self.batch, [{} for _ in range(self.batch)]

    @precondition(lambda self: self.max_length is not None)
    @rule()
    def overflow(self) -> None:
        """One token too many is refused before anything is written."""
        row = max(range(self.batch), key=lambda b: self.at[b])
        count = self.max_length - self.at[row] + 1
        with pytest.raises(ValueError, match=f"{count} tokens from position {self.at[row]} of row .* max_length 40"):
            self.manager.positions(count)

    # --- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def the_clock_is_right(self) -> None:
        if hasattr(self, "manager"):
            assert self.manager.row_positions == tuple(self.at)
            assert self.manager.position == max(self.at)

    @invariant()
    def the_memory_is_bounded(self) -> None:
        if not hasattr(self, "manager"):
            return
        windowed, full = self.manager
        size, sinks = self.windows[0].size, self.windows[0].sink_tokens
        need = sinks + size + self.slack
        assert windowed.slots == need if self.max_length is None else min(need, self.max_length)
        if self.max_length is None:
            assert full.slots % PAGE == 0
            assert full.slots < max(self.high) * 1.25 + 2 * PAGE
        else:
            assert full.slots == self.max_length
        for cache in self.manager:
            rows = cache.positions.shape[0]
            assert rows in (1, self.batch)
            slots = cache.slots + 1
            assert cache.nbytes == 2 * self.batch * KV_HEADS * slots * HEAD_DIM * 8 + 8 * rows * slots

    # --- how ---------------------------------------------------------------------------------------------------------

    def _earliest(self, b: int) -> int:
        """Where a row can go on with its whole window: nothing that it needs has been overwritten."""
        if self.max_length is not None and self.manager[0].window.size is None:
            return 0
        slots = self.windows[0].sink_tokens + self.windows[0].size + self.slack
        return 0 if self.high[b] <= slots else self.high[b] - self.slack - 1

    def _forward(self, counts: list[int], left: bool | None, *, commit: bool) -> None:
        if self.max_length is not None:
            counts = [min(n, self.max_length - at) for n, at in zip(counts, self.at, strict=True)]
            if left is None and len(set(counts)) > 1:
                left = False
        width = max(counts)
        if width == 0:
            return
        columns = [slice(width - n, width) if left else slice(0, n) for n in counts]
        if left is None:
            step = self.manager.positions(width)
        else:
            tokens = torch.full((self.batch, width), -1)
            for b, own in enumerate(columns):
                tokens[b, own] = 0
            step = self.manager.positions(tokens)
        numbers = torch.full((self.batch, width), NAN, dtype=torch.float64)
        for b, (n, own) in enumerate(zip(counts, columns, strict=True)):
            numbers[b, own] = torch.arange(self.serial, self.serial + n, dtype=torch.float64)
            # what was drafted beyond this block is stale: no later query may be handed it as its own past
            self.written[b] = {j: number for j, number in self.written[b].items() if j < self.at[b]}
            self.written[b] |= {self.at[b] + t: self.serial + t for t in range(n)}
            self.serial += n
        k = numbers[:, None, :, None].expand(-1, KV_HEADS, -1, HEAD_DIM).contiguous()
        for window, cache in zip(self.windows, self.manager, strict=True):
            held = cache.update(k, -k, step)
            for b, n in enumerate(counts):
                self._check_row(window, held, b, range(self.at[b], self.at[b] + n))
            self._check_known(held, step, counts)
        for b, n in enumerate(counts):
            if n:
                self.high[b] = max(self.high[b], self.at[b] + n)
            if commit:
                self.at[b] += n
        if commit:
            self.manager.advance(step)

    def _check_row(self, window: AttnWindow, held: KeyValues, b: int, queries: range) -> None:
        """Every query of the call finds each key of its window once, with its own contents."""
        pos, k, v = _row(held, b)
        for p in queries:
            found = [(j, slot) for slot, j in enumerate(pos) if j >= 0 and visible(window, p, j)]
            wanted = {j: number for j, number in self.written[b].items() if visible(window, p, j)}
            assert sorted(j for j, _ in found) == sorted(wanted), f"row {b}, query at {p}"
            for j, slot in found:
                assert (k[:, slot] == wanted[j]).all()
                assert (v[:, slot] == -wanted[j]).all()

    def _check_known(self, held: KeyValues, step: Step, counts: list[int]) -> None:
        """What the cache tells the host is true of the positions on the device."""
        if held.known is None:
            return
        assert len(held.known) in (1, self.batch)
        for b, n in enumerate(counts):
            known = held.known[b if len(held.known) > 1 else 0]
            pos, _, _ = _row(held, b)
            queries = step.positions[b if step.positions.shape[0] > 1 else 0].tolist()
            own = queries[known.q_offset : known.q_offset + known.q_count]
            assert known.q_count == n
            assert own == [*range(known.q_start, known.q_start + n)]
            assert sum(p >= 0 for p in queries) == n
            assert pos[: known.head] == [*range(known.head)]
            rest = pos[known.head : known.keys]
            assert (rest if known.ordered else sorted(rest)) == [*range(known.k_start, known.k_start + len(rest))]
            if n:  # whatever it leaves out is nothing that these queries see
                assert not [j for j in pos[known.keys :] if 0 <= j < known.q_start + n]


def _row(held: KeyValues, b: int) -> tuple[list[int], Tensor, Tensor]:
    pos = held.pos[b if held.pos.shape[0] > 1 else 0].tolist()
    before = held.before or (held.k[:, :, :0], held.v[:, :, :0])
    k, v = (torch.cat(parts, 2)[b] for parts in zip(before, (held.k, held.v), strict=True))
    assert k.shape[1] == v.shape[1] == len(pos)
    return pos, k, v


Caches.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestCaches = Caches.TestCase


def test_the_model_would_notice_a_lost_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine above is no oracle of itself: a cache whose slots are one off makes it fail."""
    right = buffers.append

    def one_off(call: AppendCall) -> Rotated:
        return right(call if call.ring is None else call._replace(positions=call.positions + (call.positions >= 0)))

    monkeypatch.setattr(buffers, "append", one_off)
    machine = Caches()
    machine.build(batch=2, size=5, sinks=1, slack=4, max_length=None)
    with pytest.raises(AssertionError, match="row 0, query at 0"):
        machine.append(3)
