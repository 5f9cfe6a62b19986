"""Few combinations instead of all: what a slow interpreter tests of a grid that a GPU tests entirely."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one level of each factor, in which every two levels of different factors meet.

    Each begins with a pair that has not met yet, and takes of every other factor the level that meets most of its
    partners for the first time; of equals the first, so that the list is always the same.
    """
    missing = {
        ((i, a), (j, b))
        for i, j in combinations(range(len(factors)), 2)
        for a, b in product(range(len(factors[i])), range(len(factors[j])))
    }
    rows = []
    while missing:
        row = dict(min(missing))
        for i in sorted(set(range(len(factors))) - set(row)):
            new = [sum(tuple(sorted([(i, a), one])) in missing for one in row.items()) for a in range(len(factors[i]))]
            row[i] = new.index(max(new))
        missing -= set(combinations(sorted(row.items()), 2))
        rows.append(tuple(levels[row[i]] for i, levels in enumerate(factors)))
    return rows


def every_pair(*factors: Sequence[Any]) -> list[Any]:
    """All combinations, as parameters of a test: without a GPU only those of `pairwise` are run."""
    few = pairwise(*(range(len(levels)) for levels in factors))
    return [
        pytest.param(
            *(level for _, level in row),
            marks=() if tuple(i for i, _ in row) in few else pytest.mark.cuda,
            id="-".join(str(getattr(level, "name", level)) for _, level in row),
        )
        for row in product(*map(enumerate, factors))
    ]
