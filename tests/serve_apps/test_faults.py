"""Replicas that are killed, stopped, slowed down and fooled under eight streams; and a soak."""

from __future__ import annotations

import pytest

from jobs.faults import FAULTS, KILLS, LIES, SETTINGS, endure, left_behind
from jobs.fleet import Fleet
from jobs.soak import soak
from jobs.streams import Streams

SHORT = [
    "kill -9 of a target and a draft",
    "kill -9 of the ingress",
    "SIGTERM to a target",
    "garbage from and to targets",
    "drafts 500 ms away",
    "hostile bodies",
]


async def suffer(folders, faults, *, tokens=80, **counts):
    async with Fleet(folders["target"], folders["draft"], settings=SETTINGS, **counts) as fleet:
        streams = Streams(fleet.url, "target", tokens=tokens)
        try:
            rows = await endure(fleet, streams, faults, await streams.learn())
            assert not await left_behind(fleet)
        finally:
            await streams.close()
    for row in rows:
        assert row.good, row
        assert row.same + sum(row.errors.values()) == 8 * row.tries
    return rows


@pytest.mark.timeout(400)
async def test_every_text_is_that_of_a_calm_run_or_has_a_clear_error(folders):
    rows = await suffer(folders, dict.fromkeys(SHORT, 1), drafts=1)
    assert sum(row.same for row in rows) >= 8 * (len(SHORT) - 1)


async def test_trees_that_cannot_be_change_nothing(folders):
    (row,) = await suffer(folders, {LIES: 1}, targets=1, drafts=0, liars=2)
    assert row.same == 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_two_hundred_kills(folders):
    faults = dict.fromkeys(FAULTS, 3) | dict.fromkeys(KILLS, 200 // len(KILLS))
    await suffer(folders, faults, drafts=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_nothing_stays_of_many_requests(folders):
    it = await soak(folders["target"], folders["draft"], requests=1500, at_a_time=16)
    assert not it.problems() and it.outcomes["the same text"] > 100
