"""How many tokens of prompts are read at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linearized.speculative.pace import LEAST, MOST, START, Pace


def paced(pace: Pace, seconds, sizes, times: int = 4) -> Pace:
    for size in sizes:
        for _ in range(times):
            pace.took(size, seconds(size))
    return pace


def test_as_long_as_nothing_is_known():
    pace = Pace()
    assert pace.fastest() == START and pace.within(0.001) == START and pace.fewest() >= LEAST


@pytest.mark.parametrize("best", [64, 256, 512, 1024, 4096])
def test_what_is_fastest_is_found(best):
    """A fixed price for each pass; beyond some size, caches are too small."""

    def seconds(size):
        return 10.0 + size if size <= best else 1.5 * size

    pace = paced(Pace(), seconds, (32, 64, 128, 256))  # as prompts end
    for _ in range(60):
        size = pace.fastest()
        pace.took(size, seconds(size))
    assert seconds(pace.fastest()) / pace.fastest() <= 1.06 * min(
        seconds(size) / size for size in (64, 128, 256, 512, 1024, 2048, 4096)
    )


def test_no_more_than_may_be_read_at_once():
    pace = paced(Pace(most=START), lambda size: 1.0, (64, 512))
    assert pace.fastest() == START and pace.within(99.0) == START


@given(
    st.floats(0, 0.2), st.floats(1e-5, 1e-2), st.floats(0.01, 2.0),
    st.lists(st.integers(1, MOST), max_size=12),
)  # fmt: skip
def test_what_is_read_in_some_time_takes_no_longer(fixed, each, patience, seen):
    """Once it is known how long pieces of about that size take: nothing is ever asked for again
    that took too long."""

    def seconds(size):
        return fixed + each * size

    pace = paced(Pace(), seconds, seen, times=1)
    for _ in range(40):
        size = min(max(pace.within(patience) or pace.fewest(), LEAST), MOST)
        pace.took(size, seconds(size))
    size = pace.within(patience)
    best = max((n for n in (LEAST, size) if n), default=0)
    if size:
        assert seconds(size) <= 1.01 * patience
        fits = (patience - fixed) / each
        assert size >= min(fits, MOST) / 2.1, "nor is time wasted"
    else:
        assert seconds(best or LEAST) > patience / 2.1


def test_one_slow_call_is_forgotten():
    pace = Pace()
    pace.took(512, 50.0)  # something was set up
    for _ in range(20):
        size = max(pace.within(0.5) or pace.fewest(), LEAST)
        pace.took(size, size / 1000)
    assert pace.within(0.5) == 500
