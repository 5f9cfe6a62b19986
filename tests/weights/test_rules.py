"""Rules between two sets of names: what fills what, in both directions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from longburn.weights.match import match, match_to_save
from longburn.weights.rules import (
    InterleavedRows,
    Link,
    Merge,
    NewAxis,
    Part,
    Range,
    Rename,
    Skip,
    Split,
    Stack,
    Tied,
)


def test_numbers_are_bound_alike_on_both_sides() -> None:
    rules = [Rename("blk.{i}.up.{j}.weight", "layers.{i}.{j}.up")]
    found = match(rules, ["blk.0.up.7.weight", "blk.12.up.0.weight"], ["layers.0.7.up", "layers.12.0.up"])
    assert set(found.links) == {
        Link("blk.0.up.7.weight", "layers.0.7.up"),
        Link("blk.12.up.0.weight", "layers.12.0.up"),
    }
    assert not found.missing
    assert not found.unused


@pytest.mark.parametrize(
    "name", ["blk.01.x", "blk.-1.x", "blk.a.x", "blk.1.xx", "ablk.1.x", "blk.1.2.x", "blkX1.x", "blk.١.x"]
)
def test_only_whole_names_with_plain_numbers_match(name: str) -> None:
    found = match([Rename("blk.{i}.x", "layers.{i}.x")], [name], [])
    assert found.unused == {name: "no rule names it"}


def test_a_placeholder_used_twice_is_one_number() -> None:
    rules = [Rename("{i}.copy.{i}", "x.{i}")]
    assert match(rules, ["3.copy.3"], ["x.3"]).links == (Link("3.copy.3", "x.3"),)
    assert match(rules, ["3.copy.4"], []).unused == {"3.copy.4": "no rule names it"}


def test_missing_says_from_where_it_was_wanted() -> None:
    rules = [Merge((Part("{i}.q", 2), Part("{i}.k", 1)), "qkv.{i}"), Rename("{i}.fused", "qkv.{i}")]
    found = match(rules, [], ["qkv.5", "other"])
    assert found.missing == {"qkv.5": "wanted from 5.k, 5.q or wanted from 5.fused", "other": "no rule names it"}


def test_half_a_merge_lacks_the_other_half() -> None:
    found = match([Merge((Part("{i}.q", 2), Part("{i}.k", 1)), "qk.{i}")], ["0.q", "0.k", "1.q"], ["qk.0", "qk.1"])
    assert {link.ours for link in found.links} == {"qk.0"}
    assert found.missing == {"1.k": "needed for qk.1"}


def test_what_the_model_lacks_is_unused() -> None:
    found = match([Split("qk", (Part("q", 2), Part("k", 1)))], ["qk"], ["q"])
    assert found.unused == {"qk": "the model has no k"}
    assert not found.links
    assert match([Tied("head", "embed")], ["head"], []).unused == {"head": "the model has no embed"}


def test_of_several_rules_the_one_with_tensors_there_is_taken() -> None:
    rules = [Rename("fused", "qk"), Merge((Part("q", 2), Part("k", 1)), "qk")]
    assert [link.theirs for link in match(rules, ["q", "k"], ["qk"]).links] == ["q", "k"]
    assert [link.theirs for link in match(rules, ["fused"], ["qk"]).links] == ["fused"]
    with pytest.raises(ValueError, match="qk is claimed by two rules"):
        match(rules, ["q", "k", "fused"], ["qk"])


def test_skip_is_used_and_not_copied() -> None:
    found = match([Skip("rope.{i}.inv_freq", "computed")], ["rope.0.inv_freq", "rope.x.inv_freq"], [])
    assert found.unused == {"rope.x.inv_freq": "no rule names it"}
    assert not found.links


@pytest.mark.parametrize(
    "rule",
    [
        Rename("a.{i}", "b"),
        Rename("a", "b.{i}"),
        Rename("a.{i}", "b.{j}"),
        Merge((Part("a.{i}", 1), Part("b", 1)), "c.{i}"),
        Stack("a.{i}", "b.{i}", 2),
    ],
)
def test_a_rule_whose_names_cannot_belong_together_is_refused(rule: Rename | Merge | Stack) -> None:
    with pytest.raises(ValueError, match=r"placeholders|number of the entry"):
        match([rule], ["a.0", "a"], [])


def test_saving_takes_the_first_rule_that_fits_and_names_what_none_does() -> None:
    rules = [Rename("fused", "qk"), Merge((Part("q", 2), Part("k", 1)), "qk"), Tied("head", "embed"), Skip("x", "")]
    assert [link.theirs for link in match_to_save(rules, ["qk"])] == ["fused"]
    with pytest.raises(ValueError, match="no rule names it: embed, other"):
        match_to_save(rules, ["qk", "other", "embed"])
    with pytest.raises(ValueError, match="the model has no k"):
        match_to_save([Split("qk", (Part("q", 2), Part("k", 1)))], ["q"])


def test_ranges_follow_the_sizes() -> None:
    q, k, v = Merge((Part("q", 6), Part("k", 2), Part("v", 1)), "qkv", dim=1).links()
    assert [link.our_range for link in (q, k, v)] == [Range(1, 0, 6, 9), Range(1, 6, 2, 9), Range(1, 8, 1, 9)]
    whole = torch.arange(18).view(2, 9)
    assert torch.equal(k.our_range.of(whole), whole[:, 6:8])  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"the parts make 9 in dimension 1, the whole is \[2, 10\]"):
        Range(1, 0, 6, 9).of(torch.empty(2, 10))


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 1, 6), (1, 1, 2)])
def test_interleaved_rows_undo_what_gguf_does(heads: int, kv_heads: int, size: int) -> None:
    """Against transformers, which undoes the same reordering."""
    theirs = LlamaTensorProcessor()
    for count in (heads, kv_heads):
        rows = torch.randn(count * size, 5)
        ours = InterleavedRows(count).to_ours(rows)
        assert torch.equal(ours, torch.from_numpy(theirs._reverse_permute_weights(rows.numpy(), heads, count)))
        assert torch.equal(InterleavedRows(count).to_ours(rows[:, 0]), ours[:, 0])


@given(heads=st.integers(1, 5), half=st.integers(1, 8), width=st.integers(1, 3))
def test_interleaved_rows_turn_pairs_into_halves_and_back(heads: int, half: int, width: int) -> None:
    layout = InterleavedRows(heads)
    rows = torch.randn(heads * 2 * half, width)
    ours = layout.to_ours(rows)
    for head in range(heads):
        base = head * 2 * half
        for j in range(half):
            assert torch.equal(ours[base + j], rows[base + 2 * j])
            assert torch.equal(ours[base + half + j], rows[base + 2 * j + 1])
    assert torch.equal(layout.to_theirs(ours), rows)


def test_layouts_refuse_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"\[10, 3\] is not 4 heads"):
        InterleavedRows(4).to_ours(torch.empty(10, 3))
    assert NewAxis(1).to_theirs(NewAxis(1).to_ours(torch.empty(2, 3))).shape == (2, 3)
