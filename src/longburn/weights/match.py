"""Applies rules to the names that a checkpoint and a model really have."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from longburn.weights.rules import Link, Merge, Rename, Rule, Skip, Split, Stack, Tied


@dataclass(frozen=True)
class Match:
    """Rules applied to the names of a checkpoint and of a model.

    Attributes:
        links: what to copy, complete on both sides.
        ties: what to compare with what was copied.
        missing: names of ours that nothing fills, and of theirs that a rule lacks while it has others; each with why.
        unused: names of theirs that no rule names, or whose counterpart the model lacks; each with why.
    """

    links: tuple[Link, ...]
    ties: tuple[Link, ...]
    missing: Mapping[str, str]
    unused: Mapping[str, str]


def match(rules: Sequence[Rule], theirs: Collection[str], ours: Collection[str]) -> Match:
    """Finds what fills what. A rule takes part wherever the checkpoint has at least one of its tensors.

    Several rules may lead to one tensor of ours (checkpoints differ), if a checkpoint holds the tensors of only one.

    Raises:
        ValueError: two rules take the same tensor of theirs or fill the same one of ours, or a rule is itself wrong.
    """
    links: list[Link] = []
    ties: list[Link] = []
    missing: dict[str, str] = {}
    unused: dict[str, str] = {}
    taken: dict[str, Rule] = {}
    filled: dict[str, Rule] = {}
    for rule in rules:
        if isinstance(rule, Skip):
            _claim(taken, [name for name in theirs if _pattern(rule.theirs).fullmatch(name)], rule)
            continue
        for bound in _bind(rule, "theirs", theirs):
            sources, targets = ({getattr(link, side) for link in bound} for side in ("theirs", "ours"))
            _claim(taken, sources.intersection(theirs), rule)
            if not isinstance(rule, Tied):
                _claim(filled, targets.intersection(ours), rule)
            lacking, homeless = sources.difference(theirs), targets.difference(ours)
            missing |= dict.fromkeys(lacking, f"needed for {_listed(targets)}")
            if homeless:
                unused |= dict.fromkeys(sources - lacking, f"the model has no {_listed(homeless)}")
            elif not lacking:
                (ties if isinstance(rule, Tied) else links).extend(bound)
    missing |= {name: _expected(rules, name) for name in ours if name not in filled}
    unused |= {name: "no rule names it" for name in theirs if name not in taken}
    return Match(tuple(links), tuple(ties), missing, unused)


def match_to_save(rules: Sequence[Rule], ours: Collection[str]) -> tuple[Link, ...]:
    """Finds under which names to save the tensors named `ours`; where several rules fit a tensor, by the first.

    Raises:
        ValueError: a tensor that no rule names, or a rule with only some of its tensors there.
    """
    links: list[Link] = []
    done: set[str] = set()
    for rule in rules:
        if isinstance(rule, Skip | Tied):
            continue
        for bound in _bind(rule, "ours", ours):
            names = {link.ours for link in bound}
            if lacking := names.difference(ours):
                raise ValueError(f"{rule} cannot be saved: the model has no {_listed(lacking)}")
            if not names & done:
                links.extend(bound)
                done |= names
    if unnamed := set(ours) - done:
        raise ValueError(f"cannot be saved, because no rule names it: {_listed(unnamed)}")
    return tuple(links)


def _bind(rule: Rename | Merge | Split | Stack | Tied, side: str, names: Collection[str]) -> Iterator[tuple[Link, ...]]:
    """The links of `rule`, once for each set of numbers for which one of `names` matches on that `side`."""
    links = rule.links()
    if len({frozenset(_PLACEHOLDER.findall(name)) for link in links for name in (link.theirs, link.ours)}) != 1:
        raise ValueError(f"{rule}: every name of a rule must have the same placeholders")
    patterns = [_pattern(name) for name in dict.fromkeys(getattr(link, side) for link in links)]
    found = (pattern.fullmatch(name) for name in names for pattern in patterns)
    for numbers in dict.fromkeys(tuple(m.groupdict().items()) for m in found if m):
        yield tuple(
            replace(link, theirs=_fill_in(link.theirs, numbers), ours=_fill_in(link.ours, numbers)) for link in links
        )


def _claim(claims: dict[str, Rule], names: Collection[str], rule: Rule) -> None:
    for name in names:
        if name in claims:
            raise ValueError(f"{name} is claimed by two rules: {claims[name]} and {rule}")
        claims[name] = rule


def _expected(rules: Sequence[Rule], name: str) -> str:
    """From where a tensor of ours could have been filled."""
    bound = [b for rule in rules if not isinstance(rule, Skip | Tied) for b in _bind(rule, "ours", [name])]
    return " or ".join(f"wanted from {_listed({link.theirs for link in b})}" for b in bound) or "no rule names it"


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """Matches the names that `name` stands for, with one group for each placeholder."""
    seen: set[str] = set()
    out = ""
    for i, piece in enumerate(_PLACEHOLDER.split(name)):  # literal text and placeholders take turns
        if i % 2 == 0:
            out += re.escape(piece)
        else:
            out += f"(?P={piece})" if piece in seen else f"(?P<{piece}>0|[1-9][0-9]*)"
            seen.add(piece)
    return re.compile(out)


def _fill_in(name: str, numbers: Collection[tuple[str, str]]) -> str:
    for placeholder, number in numbers:
        name = name.replace(f"{{{placeholder}}}", number)
    return name
