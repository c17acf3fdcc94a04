"""Documents in a row against plain loops."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from linearized import documents

rows = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 2), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
    )
)


@given(row=rows, causal=st.booleans(), masked=st.booleans())
def test_it_is_what_loops_say(row, causal, masked):
    segments, kept = row
    kept = kept if masked else [True] * len(kept)
    number, rank, numbers, positions = -1, 0, [], []
    for column, segment in enumerate(segments):
        if column == 0 or segment != segments[column - 1]:
            number, rank = number + 1, 0
        rank += kept[column]
        numbers.append(number)
        positions.append(max(rank - 1, 0))
    tokens, mask = torch.tensor([segments]), torch.tensor([kept]) if masked else None
    assert documents.numbers(tokens).tolist() == [numbers]
    assert documents.positions(tokens, mask).tolist() == [positions]
    columns = torch.arange(len(segments))
    seen = documents.visible(columns, causal=causal, mask=mask, segments=tokens)
    want = [
        [numbers[i] == numbers[j] and kept[j] and (j <= i or not causal) for j in columns]
        for i in columns
    ]
    assert seen.tolist() == [want]
    some = documents.visible(columns, causal=causal, mask=mask, segments=tokens, rows=slice(1, 3))
    assert torch.equal(some, seen[:, 1:3])


def test_a_mask_alone_counts_its_tokens():
    mask = torch.tensor([[False, True, True, False, True]])
    assert documents.positions(None, mask).tolist() == [[0, 0, 1, 1, 2]]
    alone = documents.visible(torch.arange(3), causal=True)
    assert alone.tolist() == [[[True, False, False], [True, True, False], [True, True, True]]]
