"""Learned sinks by kv head: which logit belongs to which query head."""

import pytest
import torch

from longburn import attend, sinks_from_per_head


def test_head_h_is_group_h_mod_g_of_kv_head_h_div_g() -> None:
    sinks = torch.arange(12.0)
    grouped = sinks_from_per_head(sinks, 3)
    assert grouped.shape == (3, 4)
    for h in range(12):
        assert grouped[h // 4, h % 4] == sinks[h]
    assert sinks_from_per_head(sinks, 12).shape == (12, 1)
    assert sinks_from_per_head(sinks, 1).shape == (1, 12)


def test_it_is_the_order_in_which_attend_reads_them() -> None:
    """Each kv head on its own, with its own row of the grouped sinks, is the same as all at once."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, 5, 8, generator=g)
    k, v = torch.randn(2, 1, 2, 5, 8, generator=g)
    sinks = 3 * torch.randn(6, generator=g)
    whole = attend(q, k, v, sinks=sinks)
    for head, own in enumerate(sinks_from_per_head(sinks, 2)):
        part = attend(q[:, 3 * head : 3 * head + 3], k[:, head : head + 1], v[:, head : head + 1], sinks=own)
        torch.testing.assert_close(whole[:, 3 * head : 3 * head + 3], part)


@pytest.mark.parametrize(("shape", "kv_heads"), [((12,), 5), ((12,), 0), ((3, 4), 3), ((), 1)])
def test_what_it_refuses(shape: tuple[int, ...], kv_heads: int) -> None:
    with pytest.raises(ValueError, match=rf"sinks_from_per_head: sinks are .* for {kv_heads} kv heads; wanted \[H\]"):
        sinks_from_per_head(torch.zeros(shape), kv_heads)
