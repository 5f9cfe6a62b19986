"""What a policy adds, written out query by query while a layer runs: the numbers behind a picture of it."""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from longburn.bias.policy import BiasContext, BiasPolicy
from longburn.kernels.attend import AttendCall, BiasTerms
from longburn.kernels.attend.call import bias_matrix


class BiasRow(NamedTuple):
    """What one query's scores are given: `bias[h, i]` is added to the score of the key at position `keys[i]`."""

    position: int  # of the query
    keys: Tensor  # [n] int64, on the CPU: every key that it sees, by rising position
    bias: Tensor  # [H, n] fp32, on the CPU


@contextmanager
def record_bias(
    policy: BiasPolicy, *, positions: Container[int] | None = None, row: int = 0
) -> Iterator[list[BiasRow]]:
    """Within this context, every call of attention that asks the policy for its bias appends what it was given.

    It sees what attention sees, so a layer that streams over a ring shows the keys that are still there, whichever slot
    they are in. The numbers are read by the host: this is for looking, not for speed, and a step that was recorded
    before (a CUDA graph) asks nobody.

    Args:
        policy: the very object that the layer uses.
        positions: of the queries to keep, such as `range(0, 4096, 16)`; default all.
        row: of the batch.

    Yields:
        The rows so far, in the order of the calls. A position that is computed twice is there twice.
    """
    rows: list[BiasRow] = []
    original, outer = policy.terms, vars(policy).get("terms")

    def terms(context: BiasContext) -> BiasTerms:
        found = original(context)
        asked = of_row(context.q_pos, row).tolist()
        kept = [t for t, p in enumerate(asked) if p >= 0 and (positions is None or p in positions)]
        if kept:
            rows.extend(_rows(found, context, row, kept))
        return found

    # On the object, in front of its class: any layer that holds it then comes through here.
    vars(policy)["terms"] = terms
    try:
        yield rows
    finally:
        if outer is None:
            del vars(policy)["terms"]
        else:
            vars(policy)["terms"] = outer


def _rows(terms: BiasTerms, context: BiasContext, row: int, kept: Sequence[int]) -> Iterator[BiasRow]:
    """The row's queries in the columns `kept`."""
    q = context.q
    seen = context.visible()
    # The form of a bias needs positions only; no key is looked at.
    written = bias_matrix(AttendCall(q, q, q, context.q_pos, context.k_pos, context.scale, bias=terms))
    whole = q.new_zeros(1) if written is None else written.detach()
    bias = whole.expand(*q.shape[:3], seen.shape[3])[row].float().cpu()
    seen, q_pos, k_pos = (of_row(x, row).cpu() for x in (seen[:, 0], context.q_pos, context.k_pos))
    for t in kept:
        slots = seen[t].nonzero()[:, 0]
        slots = slots[k_pos[slots].argsort()]
        yield BiasRow(int(q_pos[t]), k_pos[slots], bias[:, t, slots])


def of_row(x: Tensor, row: int) -> Tensor:
    """The row's part of a tensor that may hold one for all rows."""
    return x[row if x.shape[0] > 1 else 0]


@dataclass(frozen=True)
class BiasPicture:
    """Rows and what is to be said beside them; `as_dict` is what the page draws.

    Attributes:
        title: one line.
        notes: lines that say what the layer was given and where its parameters are from.
        rows: of at least one query, every one with the same heads.
        sink_tokens: kept first positions, which are drawn apart.
        labels: the text of every token, by position; empty if there is none.
    """

    title: str
    notes: tuple[str, ...]
    rows: tuple[BiasRow, ...]
    sink_tokens: int = 0
    labels: tuple[str, ...] = ()

    @property
    def heads(self) -> int:
        """H."""
        return self.rows[0].bias.shape[0]

    @property
    def numbers(self) -> int:
        """How many biases and key positions there are in all."""
        return sum(row.bias.numel() + row.keys.numel() for row in self.rows)

    def as_dict(self, digits: int = 4) -> dict[str, Any]:
        """Plain numbers for JSON; biases are rounded to so many significant digits."""

        def rounded(line: list[float]) -> list[float]:
            return [float(f"{value:.{digits}g}") for value in line]

        return {
            "title": self.title,
            "notes": list(self.notes),
            "sink_tokens": self.sink_tokens,
            "labels": list(self.labels),
            "rows": [
                {"position": row.position, "keys": row.keys.tolist(), "bias": [rounded(b) for b in row.bias.tolist()]}
                for row in self.rows
            ],
        }
