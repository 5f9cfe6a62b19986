from collections import Counter

import pytest
import torch

from longburn.sampling import TokenCounts


def test_counts_are_those_of_collections_counter():
    torch.manual_seed(0)
    prompt = torch.randint(-1, 11, (3, 40))
    steps = torch.randint(-1, 11, (25, 3))
    counts = TokenCounts.zeros(3, 11)
    for chunk in prompt.split(7, dim=1):
        counts.add_prompt(chunk)
    for step in steps:
        counts.add_generated(step)
    for tensor, rows in ((counts.prompt, prompt), (counts.generated, steps.T)):
        assert tensor.dtype == torch.int32
        for row, tokens in zip(tensor, rows, strict=True):
            seen = Counter(token for token in tokens.tolist() if token >= 0)
            assert row.tolist() == [seen[token] for token in range(11)]


def test_no_token_leaves_token_zero_alone():
    counts = TokenCounts.zeros(2, 4)
    counts.add_generated(torch.tensor([-1, 0]))
    assert counts.generated.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("shape", [(3,), (1, 4), (2, 2, 2)])
def test_tokens_of_other_rows_are_refused(shape):
    with pytest.raises(ValueError, match="counts of 2 rows"):
        TokenCounts.zeros(2, 4).add_prompt(torch.zeros(shape, dtype=torch.int64))
