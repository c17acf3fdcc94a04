"""Where the tokens near to a query are kept, against a plain list of them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from linearized.near import Near


@given(
    group=st.integers(1, 6), window=st.integers(0, 3), sinks=st.integers(0, 6),
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=4),
)  # fmt: skip
def test_slots_hold_what_the_next_token_is_near_to(group, window, sinks, lengths):
    near = Near(group, window, min(sinks, group))
    kept = [listed(near, length) for length in lengths]
    held = near.held(torch.tensor(lengths))
    assert held.tolist() == [[row.get(slot, -1) for slot in range(near.slots)] for row in kept]
    longest = max(length if window else length % group for length in lengths)
    filled = near.filled(longest)
    assert (held[:, filled:] == -1).all()
    assert torch.equal(near.held(torch.tensor(lengths), filled), held[:, :filled])
    for length, row in zip(lengths, kept, strict=True):
        before = torch.arange(length)
        seen = before[near.sees(torch.tensor(length), before)]
        assert seen.tolist() == sorted(row.values())
        far = [position for position in range(length) if position not in seen.tolist()]
        assert len(far) == max(int(near.oldest(torch.tensor(length))) - near.sinks, 0)


def listed(near: Near, length: int) -> dict[int, int]:
    """Positions by their slots after so many tokens, one after the other, each into a slot that is
    free. A group goes when it lies more than the window behind the next token's."""
    kept: dict[int, int] = {}
    for position in range(length):
        slot = int(near.slot(torch.tensor(position)))
        assert 0 <= slot < near.slots and slot not in kept
        kept[slot] = position
        oldest = (position + 1) // near.group - near.window
        kept = {s: p for s, p in kept.items() if p < near.sinks or p // near.group >= oldest}
    return kept
